"""llama.cpp, to verify a GGUF file with: its own server in this process, from a wheel that is built already.

The wheel (xllamacpp) has no call for logits, but the server's answers carry the log-probability of every token. Nor has
it one to quantise with, but ggml's is among the symbols of its library.
"""

import contextlib
import ctypes
import http.client
import json
import os
from collections.abc import Iterator

import numpy as np

from lowrank_jax.config import RunFailure
from lowrank_jax.export import verify

SMALL = 1 << 28  # bytes of a file


class Llama:
    """A model that is served; see `opened`."""

    def __init__(self, address: str, vocab: int):
        self._host, self._vocab = address.removeprefix("http://"), vocab

    def encode(self, text: str) -> list[int]:
        """Ids of a text alone."""
        return self._ask("/tokenize", {"content": text, "add_special": False, "parse_special": False})["tokens"]

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """Ids of a conversation that the assistant is to go on with, by the file's template."""
        text = self._ask("/apply-template", {"messages": messages})["prompt"]
        return self._ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def log_probs(self, tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
        """[P, V] of what follows each of the places [P] among the token ids [T], which rise.

        Each place goes on from the cache of the one before; for the last, all is read anew at once.
        """
        found = np.full((len(places), self._vocab), np.nan)
        # It draws one token, and tells nothing if that is the end or half a character: a bias, which comes after the
        # probabilities, makes it a letter.
        settings = {"n_predict": 1, "n_probs": self._vocab, "logit_bias": [[self.encode("a")[-1], 1e4]]}
        for row, place in zip(found, places):
            asked = {"prompt": tokens[: place + 1].tolist(), "cache_prompt": bool(place != places[-1])}
            answer = self._ask("/completion", settings | asked)
            for token in answer["completion_probabilities"][0]["top_logprobs"]:
                row[token["id"]] = token["logprob"]
        return found

    def _ask(self, path: str, body: dict) -> dict:
        connection = http.client.HTTPConnection(self._host)  # urllib would go through a proxy, if one is set
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode("utf-8", "replace")
        finally:
            connection.close()
        if answer.status != 200:
            raise RunFailure(f"llama.cpp does not run the export: {path} gave {answer.status} {text[:200]}")
        return json.loads(text)


def is_installed() -> bool:
    try:
        import xllamacpp  # noqa: F401
    except ImportError:
        return False
    return True


def quantize(w: np.ndarray, kind: int) -> np.ndarray:
    """The matrix [rows, columns] as llama.cpp's quantiser packs it: the bytes [rows, bytes of a row] of a ggml_type."""
    import xllamacpp

    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    size = library.ggml_row_size
    size.restype, size.argtypes = ctypes.c_size_t, [ctypes.c_int, ctypes.c_int64]
    pack = library.ggml_quantize_chunk
    pack.restype = ctypes.c_size_t
    pack.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    w = np.ascontiguousarray(w, np.float32)
    packed = np.empty((len(w), size(kind, w.shape[1])), np.uint8)
    if pack(kind, w.ctypes.data, packed.ctypes.data, 0, *w.shape, None) != packed.nbytes:
        raise RunFailure("llama.cpp did not quantise a whole matrix")
    return packed


@contextlib.contextmanager
def opened(path: str, vocab: int, tokens: int) -> Iterator[Llama]:
    """The model in a GGUF file, served on this machine with room for so many tokens, keys and values in f32.

    (In f16, as llama.cpp has them unless told, logits of toy models came out 1e-3 off: faults would not show.) Raises
    NotInstalled where there is no llama.cpp, RunFailure where it does not take the file.
    """
    try:
        import xllamacpp
    except ImportError:
        raise verify.NotInstalled("pip install xllamacpp") from None
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.n_gpu_layers = tokens, 1, 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup, params.verbosity = False, -1
    # Threads wait for each other by spinning: on a busy machine, two take 280 ms for a toy's token, one takes 0.3.
    params.cpuparams.n_threads = 1 if os.path.getsize(path) < SMALL else os.cpu_count() or 1
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as e:
        raise RunFailure(f"llama.cpp does not load the export: {e}") from None
    try:
        yield Llama(server.listening_address, vocab)
    finally:
        del server  # ends its threads
