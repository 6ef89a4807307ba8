"""A GGUF file for llama.cpp, of its architecture `refact`: RMSNorm, SwiGLU, ALiBi, no biases; and llama.cpp itself.

That architecture has dense projections. `attn=dense` merges the factors, and the cache holds keys and values.
`attn=latent` writes the down-projections of K and V as one key and value head that all query heads share, and folds
the up-projections into Q and O. The function is the same, and the cache holds latents.

The package xllamacpp verifies and quantises, without calls for either: the answers of its server carry the
log-probability of every token, and its library exports the functions of ggml.
"""

import contextlib
import ctypes
import http.client
import json
import os
from collections.abc import Iterator

import jax
import numpy as np

from lowrank_jax.config import ModelConfig, RunFailure, UsageError
from lowrank_jax.data import chat
from lowrank_jax.data.tokenizer import SentencePiece, Tokenizer
from lowrank_jax.export import hf_tokenizer, verify, weights
from lowrank_jax.machine import console
from lowrank_jax.model.network import EPS
from lowrank_jax.training.trained import Trained

FORMS, FILE = ("dense", "latent"), "model.gguf"
SMALL = 1 << 28  # bytes of a file that one thread serves best
CONTEXT = 4  # times the trained length: llama.cpp's server limits prompts to this, while ALiBi has no limit
TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_k_m": "Q4_K"}
PACKED_BY_LLAMA = ("Q4_K", "Q6_K")  # the package gguf cannot pack these
BLOCKS = {"F32": 1, "F16": 1, "BF16": 1, "Q8_0": 32, "Q5_0": 32, "Q4_K": 256, "Q6_K": 256}  # numbers that share a scale
LARGER = {"Q4_K": "Q5_0", "Q6_K": "Q8_0", "Q5_0": "F16", "Q8_0": "F16"}  # used where blocks do not divide a row
# llama.cpp rounds activations to f16 before it multiplies f16 weights: logits of a small model that spread by 3 were
# off by 6e-3. A tensor in the wrong place costs more than 1. For few bits, `quality` decides.
TOLERANCES = {"f32": verify.TOLERANCE, "f16": 0.1, "bf16": 0.5, "q8_0": 1.0, "q4_k_m": 4.0}


def write(trained: Trained, folder: str, attn: str = "dense", quant: str = "f32") -> str:
    """Write model.gguf into a folder, which is created, and return the file's path."""
    verify.need("gguf", *(["xllamacpp"] if TYPES[quant] in PACKED_BY_LLAMA else []))
    import gguf

    c, tokenizer = trained.config.model, trained.tokenizer
    _refuse(c, tokenizer, attn)
    pieces = hf_tokenizer.pieces(tokenizer)
    named = list(tensors(c, trained.params, attn))
    kinds, larger = {name: kind(name, quant, c.layers, c.tied) for name, w in named if w.ndim == 2}, {}
    for name, w in named:
        while w.shape[-1] % BLOCKS[kinds.get(name, "F32")]:
            kinds[name] = larger[name] = LARGER[kinds[name]]
    if larger:
        types, count = " or ".join(sorted(set(larger.values()))), f"{len(larger)} of {len(kinds)}"
        console.say(f"{quant}: blocks do not divide the rows of {count} matrices, kept as {types}")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, FILE)
    out = gguf.GGUFWriter(path, "refact")
    width = c.head_dim if attn == "dense" else c.ranks[1]
    out.add_name("lowrank_jax")
    out.add_context_length(CONTEXT * verify.longest(trained.config))
    out.add_vocab_size(c.vocab)
    out.add_embedding_length(c.d)
    out.add_block_count(c.layers)
    out.add_feed_forward_length(c.hidden)
    out.add_head_count(c.heads)
    out.add_head_count_kv(c.heads if attn == "dense" else 1)
    out.add_key_length(width)
    out.add_value_length(width)
    out.add_layer_norm_rms_eps(EPS)
    out.add_file_type(gguf.LlamaFileType[("ALL_" if quant == "f32" else "MOSTLY_") + quant.upper()])
    _add_tokenizer(out, tokenizer, pieces)
    for name, w in named:
        packed_as = gguf.GGMLQuantizationType[kinds.get(name, "F32")]
        pack = quantize if packed_as.name in PACKED_BY_LLAMA else gguf.quants.quantize
        out.add_tensor(f"{name}.weight", pack(w, packed_as), raw_dtype=packed_as)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def check(trained: Trained, path: str, attn: str = "dense", quant: str = "f32") -> float:
    """Return the largest difference of two log-probabilities."""
    tokens = max(len(row) for row, _ in verify.prompts(trained)) + 1
    with serve(path, trained.config.model.vocab, tokens) as client:
        # llama.cpp marks spaces as SentencePiece does, so it takes a mark in the text for a space.
        verify.check_ids(trained.tokenizer, client.encode)
        verify.check_chat(trained.tokenizer, client.encode_chat)
        return verify.check(trained, [client.log_probs], TOLERANCES[quant], log_probs=True)


def quality(trained: Trained, path: str, attn: str = "dense", quant: str = "f32", tokens: int = 0) -> dict:
    """Return what `quant` changes on held-out text, see `verify.measure`."""
    vocab = trained.config.model.vocab  # 2,048 probabilities of a token take 15 ms
    tokens = tokens or min(verify.MEASURED, max(2**21 // vocab, 256))
    with serve(path, vocab, verify.longest(trained.config) + 1) as client:
        return verify.measure(trained, lambda row: client.log_probs(row, np.arange(len(row))), tokens)


def kind(name: str, quant: str, layers: int, tied: bool) -> str:
    """Return the type of a matrix, such as Q4_K, chosen as llama.cpp's own quantiser does.

    `q4_k_m` keeps the head, and in half of the layers V and the MLP's last matrix, in 6 bits, the rest in 4.
    """
    if not name.startswith("blk."):
        is_sensitive = name == ("token_embd" if tied else "output")
    else:
        _, layer, part = name.split(".")
        i, eighth = int(layer), layers // 8
        is_chosen = i < eighth or i >= 7 * layers // 8 or (i - eighth) % 3 == 2
        is_sensitive = is_chosen and part in ("attn_v", "ffn_down")
    return "Q6_K" if quant == "q4_k_m" and is_sensitive else TYPES[quant]


def tensors(c: ModelConfig, params: dict, attn: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, fp32 array) of each tensor; a matrix is [out, in]."""
    fp32 = lambda w: np.ascontiguousarray(w, np.float32)
    yield "token_embd", fp32(_product(params["embed"]))
    if not c.tied:
        yield "output", fp32(_product(params["head"]))
    yield "output_norm", fp32(params["norm"]["gain"])
    for i in range(c.layers):
        block = jax.tree.map(lambda w, i=i: w[i], params["blocks"])
        for name, w in zip(("q", "k", "v", "output"), attention(c, block["attention"], attn)):
            yield f"blk.{i}.attn_{name}", fp32(w)
        for name, key in (("gate", "gate"), ("up", "up"), ("down", "out")):
            yield f"blk.{i}.ffn_{name}", fp32(_product(block["mlp"][key]).T)
        for name, key in (("attn_norm", "attention_norm"), ("ffn_norm", "mlp_norm")):
            yield f"blk.{i}.{name}", fp32(block[key]["gain"])


def attention(c: ModelConfig, block: dict, attn: str) -> tuple[np.ndarray, ...]:
    """Return Q, K, V and O of a layer as [out, in] float64, with a key head per query head or one head of latents.

    For latents: q_h . (U_h c) = (q_h U_h) . c, so Q takes the up-projection of K, and O that of V. llama.cpp divides
    scores by the root of the head's width, which is then the rank.
    """
    H, K, D = c.heads, c.head_dim, c.d
    q_DX, o_XD = _product(block["q"]), _product(block["o"])
    k, v = block["k"], dict(block["v"])
    if c.shared_kv:
        v["down"] = k["down"]
    if attn == "dense":
        return q_DX.T, _product(k).T, _product(v).T, o_XD.T
    rank = c.ranks[1]
    down_k_DR, down_v_DR = (np.asarray(w["down"], np.float64) for w in (k, v))
    up_k_RHK, up_v_RHK = (np.asarray(w["up"], np.float64).reshape(rank, H, K) for w in (k, v))
    q_DHR = np.einsum("DHK,RHK->DHR", q_DX.reshape(D, H, K), up_k_RHK, optimize=True) * (rank / K) ** 0.5
    o_HRD = np.einsum("RHK,HKD->HRD", up_v_RHK, o_XD.reshape(H, K, D), optimize=True)
    return q_DHR.reshape(D, -1).T, down_k_DR.T, down_v_DR.T, o_HRD.reshape(-1, D).T


def _refuse(c: ModelConfig, tokenizer: Tokenizer, attn: str) -> None:
    weights.refuse_unknown(c)
    if c.latent_norm and c.rank:
        advice = "train with config.model.latent_norm=False, or use --format=hf"
        raise UsageError(f"--format=gguf cannot hold the norms on latents of config.model.latent_norm; {advice}")
    if attn == "latent" and not c.rank:
        raise UsageError("--attn=latent needs latents, and config.model.rank=0 has none; use --attn=dense")
    if attn == "latent" and c.ranks[1] != c.ranks[2]:
        ranks = f"{c.ranks[1]} and {c.ranks[2]}"
        raise UsageError(f"--attn=latent needs one rank for K and V, but theirs are {ranks}; use --attn=dense")
    if not isinstance(tokenizer, SentencePiece):
        raise UsageError("--format=gguf takes SentencePiece tokenizers alone, and this run has a tokenizer.json")


def _add_tokenizer(out, tokenizer: SentencePiece, pieces: list) -> None:
    stops = [i for i in chat.stop_ids(tokenizer) if i != tokenizer.eos]
    out.add_tokenizer_model("llama")
    out.add_tokenizer_pre("default")
    out.add_token_list([piece.piece.encode() for piece in pieces])
    out.add_token_scores([piece.score for piece in pieces])
    out.add_token_types([piece.type for piece in pieces])  # GGUF numbers the types as SentencePiece does
    out.add_bos_token_id(tokenizer.bos)
    out.add_eos_token_id(tokenizer.eos)
    if stops:
        out.add_eot_token_id(stops[0])
    ids = {piece.piece: i for i, piece in reversed(list(enumerate(pieces)))}
    for key, add in (("unk_token", out.add_unk_token_id), ("pad_token", out.add_pad_token_id)):
        if tokenizer.names[key] in ids:
            add(ids[tokenizer.names[key]])
    out.add_add_bos_token(True)
    out.add_add_eos_token(False)
    out.add_add_space_prefix(False)
    out.add_chat_template(hf_tokenizer.without_generation(hf_tokenizer.template(tokenizer)))


def _product(w: dict) -> np.ndarray:
    """Return a projection [in, out] or a table [V, D] in float64, its factors multiplied."""
    first, *second = [np.asarray(w[key], np.float64) for key in ("kernel", "table", "down", "up") if key in w]
    return first @ second[0] if second else first


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
    """Serve a GGUF file with a context of `tokens`; raises RunFailure where llama.cpp does not load it."""
    verify.need("xllamacpp")
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.n_gpu_layers = tokens, 1, 0
    # With a cache in f16, the default, logits of toy models were off by 1e-3, which would hide mistakes.
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
