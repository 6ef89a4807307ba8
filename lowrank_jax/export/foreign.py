"""Compression of BLOOM and MPT in Hugging Face form: projections of attention become products of a rank.

LayerNorm, GELU and biases keep them from becoming runs. The result is a folder of the same class and size, for every
program that runs the dense model, and a file of factors, which is smaller.
"""

import functools
import json
import math
import os

import numpy as np

from lowrank_jax.config import UsageError, read_sources
from lowrank_jax.data import sources
from lowrank_jax.export import compression, verify
from lowrank_jax.machine import console

# Per family: the fused Q, K and V; whether its rows alternate between the three, head by head; O.
FAMILIES = {
    "bloom": ("self_attention.query_key_value", True, "self_attention.dense"),
    "mpt": ("attn.Wqkv", False, "attn.out_proj"),
}
FACTORS = "factors.safetensors"
LENGTH, BATCH = 256, 8  # tokens per row, rows per batch
PARTS = 10  # of the text, with one held out


def family(folder: str) -> str:
    """Return the family of a Hugging Face folder, or an empty text for any other folder."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            name = json.load(f)["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return name if name in FAMILIES else ""


def compress(source: str, folder: str, rank: int, split: tuple[float, ...], data: str, tokens: int) -> dict:
    """Write the compressed model into `folder`; print and return errors per layer and bits per byte."""
    verify.need("torch", "transformers", "safetensors")
    import torch
    import transformers
    from safetensors.numpy import save_file

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    net = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=True).eval()
    tok = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
    ranks = {part: max(1, round(4 * rank * share / sum(split))) for part, share in zip("qkvo", split)}
    if (largest := max(ranks.values())) > (width := net.config.hidden_size):
        raise UsageError(f"--rank={rank} gives a largest rank of {largest}, more than the width of {width}")
    text, held_out = (torch.tensor(rows).split(BATCH) for rows in _rows(tok, data, tokens))
    with torch.no_grad():
        moments, new_moments = _moments(net, text), _moments(net, held_out)
        before = _bits_per_byte(net, tok, held_out)
        factors, errors = {}, {}
        for name, linear in _matrices(net):
            row = errors.setdefault(next(word for word in name.split(".") if word.isdigit()), {})
            for part, view in _split(net, name, linear.weight.detach().numpy()).items():
                w_IO = view.reshape(-1, view.shape[-1]).T.astype(np.float64)
                down, up = compression.factors(w_IO, moments[name], ranks[part])
                factors |= {f"{name}.{part}.down": down, f"{name}.{part}.up": up}
                product = down.astype(np.float64) @ up
                row[part] = compression.error(w_IO, product, new_moments[name])
                view[...] = product.T.reshape(view.shape)
        after = _bits_per_byte(net, tok, held_out)
    net.save_pretrained(folder)
    tok.save_pretrained(folder)
    save_file(factors, os.path.join(folder, FACTORS))
    facts = {"ranks": list(ranks.values()), "calibration_tokens": sum(ids.numel() for ids in text)}
    facts |= compression.report(list(errors.values()), before, after)
    console.say(f"saved as {type(net).__name__}, with products of rank {rank} on average; {FACTORS} has the factors")
    return facts


def _rows(tok, data: str, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids [N, LENGTH] of the text to calibrate with, and of the part that is held out."""
    ids, readers = [], [sources.open_source(config) for config in read_sources(data, "--data")]
    documents = (s.document(row) for s in readers for block in range(s.blocks) for row in s.rows(block))
    wanted = tokens * PARTS // (PARTS - 1) + LENGTH * PARTS
    for document in documents:
        if "text" not in document:
            raise UsageError(f"--data={data} must hold texts, not chats")
        ids += tok(document["text"])["input_ids"]
        if len(ids) >= wanted:
            break
    rows = np.array(ids[: min(len(ids), wanted) // LENGTH * LENGTH]).reshape(-1, LENGTH)
    if len(rows) < PARTS:
        raise UsageError(f"--data={data} has {len(ids)} tokens; at least {PARTS * LENGTH} are needed")
    is_held_out = np.arange(len(rows)) % PARTS == PARTS - 1
    return rows[~is_held_out], rows[is_held_out]


def _matrices(net) -> list:
    fused, _, out = FAMILIES[net.config.model_type]
    return [(name, module) for name, module in net.named_modules() if name.endswith((fused, out))]


def _split(net, name: str, w_OI: np.ndarray) -> dict[str, np.ndarray]:
    """Return views [..., in] of the projections in a matrix, by their letters."""
    fused, in_turns, _ = FAMILIES[net.config.model_type]
    if not name.endswith(fused):
        return {"o": w_OI}
    shape = (net.config.num_attention_heads, 3, -1) if in_turns else (1, 3, -1)
    return dict(zip("qkv", w_OI.reshape(*shape, w_OI.shape[1]).swapaxes(0, 1)))


def _moments(net, batches: list) -> dict[str, np.ndarray]:
    """Return second moments [I, I] of the inputs to each matrix, by its name."""
    sums = {}

    def record(name: str, module, args) -> None:
        x = args[0].flatten(0, -2).double()
        sums[name] = sums.get(name, 0) + x.T @ x

    hooks = [linear.register_forward_pre_hook(functools.partial(record, name)) for name, linear in _matrices(net)]
    for ids in batches:
        net(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: x.numpy() for name, x in sums.items()}


def _bits_per_byte(net, tok, batches: list) -> float:
    import torch

    nats = size = 0.0
    for ids in batches:
        logits = net(ids, use_cache=False).logits[:, :-1]
        nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        size += sum(len(tok.decode(row[1:]).encode()) for row in ids)
    return nats / math.log(2) / size
