"""llama.cpp in this process, to verify and quantise GGUF files: the package xllamacpp.

It has no call for logits, but the answers of its server carry the log-probability of every token. It has no call that
quantises either, but its library exports the functions of ggml.
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
    """A client of a served model; see `serve`."""

    def __init__(self, address: str, vocab: int):
        self._host, self._vocab = address.removeprefix("http://"), vocab

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text alone."""
        return self._post("/tokenize", {"content": text, "add_special": False, "parse_special": False})["tokens"]

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """Return the ids of a conversation that the assistant is to continue, by the file's template."""
        text = self._post("/apply-template", {"messages": messages})["prompt"]
        return self._post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def log_probs(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return log-probabilities [P, V] of what follows each of the rising positions [P] in the token ids [T].

        Each position continues from the cache of the one before; for the last, all tokens are read anew at once.
        """
        log_probs_PV = np.full((len(positions), self._vocab), np.nan)
        # The server draws one token, and returns no probabilities where that ends the text or is half a character. A
        # bias, which is added after the probabilities are taken, makes it a letter.
        settings = {"n_predict": 1, "n_probs": self._vocab, "logit_bias": [[self.encode("a")[-1], 1e4]]}
        for row, position in zip(log_probs_PV, positions):
            prompt = {"prompt": tokens[: position + 1].tolist(), "cache_prompt": bool(position != positions[-1])}
            answer = self._post("/completion", settings | prompt)
            for token in answer["completion_probabilities"][0]["top_logprobs"]:
                row[token["id"]] = token["logprob"]
        return log_probs_PV

    def _post(self, path: str, body: dict) -> dict:
        connection = http.client.HTTPConnection(self._host)  # urllib would use a proxy where one is set
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode("utf-8", "replace")
        finally:
            connection.close()
        if answer.status != 200:
            raise RunFailure(f"llama.cpp does not run the export: {path} gave {answer.status} {text[:200]}")
        return json.loads(text)


def quantize(w: np.ndarray, kind: int) -> np.ndarray:
    """Return the matrix [rows, columns] packed by ggml as a ggml_type: uint8 [rows, bytes of a row]."""
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
def serve(path: str, vocab: int, tokens: int) -> Iterator[Llama]:
    """Serve a GGUF file on this machine, with a context of `tokens` and a cache in f32.

    With a cache in f16, the default, logits of toy models were off by 1e-3, which would hide mistakes. Raises
    RunFailure where llama.cpp does not load the file.
    """
    verify.need("xllamacpp")
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.n_gpu_layers = tokens, 1, 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup, params.verbosity = False, -1
    # Threads wait for each other by spinning: on a busy machine, two take 280 ms for a toy's token, one takes 0.3 ms.
    params.cpuparams.n_threads = 1 if os.path.getsize(path) < SMALL else os.cpu_count() or 1
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as e:
        raise RunFailure(f"llama.cpp does not load the export: {e}") from None
    try:
        yield Llama(server.listening_address, vocab)
    finally:
        del server  # ends its threads
