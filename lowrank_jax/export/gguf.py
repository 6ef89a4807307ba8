"""One GGUF file for llama.cpp, of the architecture `refact`: RMSNorm, SwiGLU, ALiBi, no biases.

Its projections of attention are dense. `attn=dense` merges the factors; the cache then holds keys and values.
`attn=latent` writes the down-projections of K and V as the one key and value head that all query heads share, and their
up-projections into Q and O: the same function, with the latents in the cache.
"""

import os

import numpy as np

from lowrank_jax.config import ModelConfig, UsageError
from lowrank_jax.data import chat
from lowrank_jax.data.tokenizer import SentencePiece, Tokenizer
from lowrank_jax.export import fidelity, llama, mix, pieces, template, verify
from lowrank_jax.machine import console
from lowrank_jax.model.network import EPS
from lowrank_jax.training.trained import Trained

FORMS, TYPES = ("dense", "latent"), tuple(mix.TYPES)
FILE = "model.gguf"
CONTEXT = 4  # of what it was trained to: llama.cpp's server gives a prompt no more than this, ALiBi has no limit
# llama.cpp rounds what it multiplies f16 weights by to f16: logits of a small model that spread by 3 came out 6e-3 off.
# A tensor in the wrong place costs more than 1; of few bits, what `fidelity` measures decides.
TOLERANCES = {"f32": verify.TOLERANCE, "f16": 0.1, "bf16": 0.5, "q8_0": 1.0, "q4_k_m": 4.0}


def write(trained: Trained, folder: str, attn: str = "dense", quant: str = "f32") -> str:
    """Writes model.gguf into `folder`, which it makes, and returns its path.

    Raises UsageError, before it writes, for a model or tokenizer that such a file cannot hold.
    """
    try:
        import gguf
    except ImportError:
        raise UsageError("--format=gguf needs the package gguf: pip install gguf") from None
    c, tokenizer = trained.config.model, trained.tokenizer
    _refuse(c, tokenizer, attn, quant)
    found = pieces.read(tokenizer.model)
    weights = list(tensors(c, trained.params, attn))
    sizes = {name: w.shape[-1] for name, w in weights if w.ndim == 2}
    kinds = {name: mix.kind(name, size, quant, c.layers, c.tied) for name, size in sizes.items()}
    if odd := [name for name in kinds if kinds[name] != mix.wanted(name, quant, c.layers, c.tied)]:
        instead = " or ".join(sorted({kinds[name] for name in odd}))
        console.say(
            f"{quant}: its blocks do not divide the rows of {len(odd)} of {len(kinds)} matrices, kept as {instead}"
        )
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
    _add_tokenizer(out, tokenizer, found)
    for name, w in weights:
        kind = gguf.GGMLQuantizationType[kinds[name] if name in kinds else "F32"]
        pack = llama.quantize if kind.name in mix.MADE_BY_LLAMA else gguf.quants.quantize
        out.add_tensor(f"{name}.weight", pack(w, kind), raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def check(trained: Trained, path: str, attn: str = "dense", quant: str = "f32") -> float:
    """The largest difference of two log-probabilities in llama.cpp, its cache in f32.

    Raises RunFailure where it is too large or the tokenizer is another, NotInstalled where nothing here runs it.
    """
    tokens = max(len(row) for row, _ in verify.prompts(trained)) + 1
    with llama.opened(path, trained.config.model.vocab, tokens) as run:
        # llama.cpp marks spaces as SentencePiece does, so to it a mark in the text is a space.
        verify.check_ids(trained.tokenizer, run.encode)
        verify.check_chat(trained.tokenizer, run.encode_chat)
        return verify.check(verify.log_prob_difference(trained, run.log_probs), TOLERANCES[quant])


def quality(trained: Trained, path: str, attn: str = "dense", quant: str = "f32", tokens: int = 0) -> dict:
    """What `quant` changes on held-out text, see `fidelity.measure`; raises NotInstalled where nothing here runs it.

    On fewer tokens for a larger vocabulary, unless `tokens` are asked for: 15 ms for each of 2,048 probabilities.
    """
    vocab = trained.config.model.vocab
    tokens = tokens or min(fidelity.TOKENS, max(2**21 // vocab, 256))
    with llama.opened(path, vocab, verify.longest(trained.config) + 1) as run:
        return fidelity.measure(trained, lambda row: run.log_probs(row, np.arange(len(row))), tokens)


def tensors(c: ModelConfig, params: dict, attn: str):
    """(name, fp32 array) of each tensor; a matrix is [out, in]."""
    yield "token_embd", _fp32(_table(params["embed"]))
    if not c.tied:
        yield "output", _fp32(_table(params["head"]))
    yield "output_norm", _fp32(params["norm"]["gain"])
    for i in range(c.layers):
        block = _layer(params["blocks"], i)
        for name, w in zip(("q", "k", "v", "output"), attention(c, block["attention"], attn)):
            yield f"blk.{i}.attn_{name}", _fp32(w)
        for name, key in (("gate", "gate"), ("up", "up"), ("down", "out")):
            yield f"blk.{i}.ffn_{name}", _fp32(_merged(block["mlp"][key]).T)
        for name, key in (("attn_norm", "attention_norm"), ("ffn_norm", "mlp_norm")):
            yield f"blk.{i}.{name}", _fp32(block[key]["gain"])


def attention(c: ModelConfig, weights: dict, attn: str) -> tuple[np.ndarray, ...]:
    """Q, K, V and O of a layer as [out, in] float64, for heads of their own or for one head of latents.

    Of latents: q_h . (U_h c) = (q_h U_h) . c, so the up-projection of K goes into Q, and that of V into O. llama.cpp
    divides scores by the root of the head's width, which is now the rank.
    """
    H, K, D = c.heads, c.head_dim, c.d
    q_DX, o_XD = _merged(weights["q"]), _merged(weights["o"])
    k, v = weights["k"], dict(weights["v"])
    if c.shared_kv:
        v["down"] = k["down"]
    if attn == "dense":
        return q_DX.T, _merged(k).T, _merged(v).T, o_XD.T
    rank = c.ranks[1]
    up_k_RHK, up_v_RHK = (_matrix(w["up"]).reshape(rank, H, K) for w in (k, v))
    q_DHR = np.einsum("DHK,RHK->DHR", q_DX.reshape(D, H, K), up_k_RHK, optimize=True) * (rank / K) ** 0.5
    o_HRD = np.einsum("RHK,HKD->HRD", up_v_RHK, o_XD.reshape(H, K, D), optimize=True)
    return q_DHR.reshape(D, -1).T, _matrix(k["down"]).T, _matrix(v["down"]).T, o_HRD.reshape(-1, D).T


def _refuse(c: ModelConfig, tokenizer: Tokenizer, attn: str, quant: str) -> None:
    if c.latent_norm and c.rank:
        raise UsageError(
            "--format=gguf cannot hold the norms of config.model.latent_norm, which stand between the factors; "
            "train with config.model.latent_norm=False, or use --format=hf"
        )
    if attn == "latent" and not c.rank:
        raise UsageError("--attn=latent needs latents, and config.model.rank=0 has none; use --attn=dense")
    if attn == "latent" and c.ranks[1] != c.ranks[2]:
        ranks = f"{c.ranks[1]} and {c.ranks[2]}"
        raise UsageError(f"--attn=latent needs one rank for K and V, and they have {ranks}; use --attn=dense")
    if not isinstance(tokenizer, SentencePiece):
        raise UsageError("--format=gguf takes SentencePiece tokenizers alone, and this run has a tokenizer.json")
    if quant in mix.NEED_LLAMA and not llama.is_installed():
        raise UsageError(f"--quant={quant} is packed by llama.cpp itself: pip install xllamacpp")


def _add_tokenizer(out, tokenizer: SentencePiece, found: list[pieces.Piece]) -> None:
    stops = [i for i in chat.stop_ids(tokenizer) if i != tokenizer.eos]
    out.add_tokenizer_model("llama")
    out.add_tokenizer_pre("default")
    out.add_token_list([piece.text.encode() for piece in found])
    out.add_token_scores([piece.score for piece in found])
    out.add_token_types([piece.kind for piece in found])
    out.add_bos_token_id(tokenizer.bos)
    out.add_eos_token_id(tokenizer.eos)
    if stops:
        out.add_eot_token_id(stops[0])
    for key, add in (("unk_token", out.add_unk_token_id), ("pad_token", out.add_pad_token_id)):
        names = [i for i, piece in enumerate(found) if piece.text == tokenizer.names[key]]
        if names:
            add(names[0])
    out.add_add_bos_token(True)
    out.add_add_eos_token(False)
    out.add_add_space_prefix(False)
    out.add_chat_template(template.plain(template.with_bos(tokenizer)))


def _layer(blocks: dict, i: int) -> dict:
    return {key: _layer(value, i) if isinstance(value, dict) else value[i] for key, value in blocks.items()}


def _table(w: dict) -> np.ndarray:
    """[V, D] float64 of an embedding or a head."""
    return _matrix(w["table"]) @ _matrix(w["up"]) if "up" in w else _matrix(w["table"])


def _merged(w: dict) -> np.ndarray:
    """[in, out] float64 of a projection, its factors multiplied."""
    return _matrix(w["kernel"]) if "kernel" in w else _matrix(w["down"]) @ _matrix(w["up"])


def _matrix(w) -> np.ndarray:
    return np.asarray(w, np.float64)


def _fp32(w) -> np.ndarray:
    return np.ascontiguousarray(w, np.float32)
