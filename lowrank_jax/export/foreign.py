"""Compression of BLOOM and MPT in Hugging Face form: projections of attention become products of a rank.

LayerNorm, GELU and biases keep them from becoming runs. The result is a folder of the same class and size, for every
program that runs the dense model, and a file of factors, which is smaller.
"""

import contextlib
import functools
import math
import os
from collections.abc import Iterator

import numpy as np

from lowrank_jax.config import UsageError, read_sources, shown
from lowrank_jax.data import blocks, sources
from lowrank_jax.data.reader import ONCE, Limit, Reader
from lowrank_jax.export import checked, compression, verify, weights
from lowrank_jax.export.folder import as_json
from lowrank_jax.machine import console
from lowrank_jax.training import run_folder

# Per family: the fused Q, K and V; whether its rows alternate between the three, head by head; O.
FAMILIES = {
    "bloom": ("self_attention.query_key_value", True, "self_attention.dense"),
    "mpt": ("attn.Wqkv", False, "attn.out_proj"),
}
CLASSES = {  # in transformers
    "bloom": ("BloomConfig", "BloomForCausalLM"),
    "mpt": ("MptConfig", "MptForCausalLM"),
}
SIZES = (  # keys of config.json, each with its other names
    ("vocab_size",),
    ("hidden_size", "n_embed", "d_model"),
    ("num_hidden_layers", "n_layer", "n_layers"),
    ("num_attention_heads", "n_head", "n_heads"),
)
FACTORS, GENERATION = "factors.safetensors", "generation_config.json"
LENGTH, BATCH = 256, 8  # tokens per row, rows per batch
LONGEST = 1 << 20  # context of a config that is believed
PARTS = 10  # of the text, with one held out


def family(folder: str) -> str:
    """Return the family of a Hugging Face folder, or an empty text for any other folder."""
    path = os.path.join(folder, "config.json")
    name = checked.read_json(path).get("model_type") if os.path.lexists(path) else None
    return name if isinstance(name, str) and name in FAMILIES else ""


def compress(source: str, folder: str, rank: int, split: tuple[float, ...], data: str, tokens: int) -> dict:
    """Write the compressed model into `folder`; print and return errors per layer and bits per byte."""
    verify.need("torch", "transformers", "safetensors")
    net, tok = _open(source)
    path = os.path.join(source, GENERATION)
    generation = checked.read_json(path) if os.path.lexists(path) else {}
    import torch
    from safetensors.numpy import save_file

    ranks = {part: max(1, round(4 * rank * share / sum(split))) for part, share in zip("qkvo", split)}
    if (largest := max(ranks.values())) > (width := net.config.hidden_size):
        raise UsageError(f"--rank={rank} gives a largest rank of {largest}, more than the width of {width}")
    with _one_line(f"the tokenizer of {source}"):
        rows = _rows(tok, net.config.vocab_size, data, tokens)
    text, held_out = (torch.tensor(part).split(BATCH) for part in rows)
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
    with _one_line(source):
        net.save_pretrained(folder)
        tok.save_pretrained(folder)
    if generation:
        with open(os.path.join(folder, GENERATION), "w", encoding="utf-8") as f:
            f.write(as_json(generation))
    save_file(factors, os.path.join(folder, FACTORS))
    facts = {"ranks": list(ranks.values()), "calibration_tokens": sum(ids.numel() for ids in text)}
    facts |= compression.report(list(errors.values()), before, after)
    console.say(f"saved as {type(net).__name__}, with products of rank {rank} on average; {FACTORS} has the factors")
    return facts


def _open(source: str) -> tuple:
    """Return (model, tokenizer) of a folder; no code in it runs, and its config must describe its weights."""
    files = checked.weight_files(source)
    path, values = _settings(source, files)
    arrays = checked.arrays(files)
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config_class, model_class = (getattr(transformers, name) for name in CLASSES[values["model_type"]])
    with _one_line(path):
        config = config_class.from_dict(values)
    state = {name: torch.tensor(w) for name, w in arrays.items()}
    with _one_line(source):
        options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
        net, info = model_class.from_pretrained(None, config=config, state_dict=state, **options)
    with _one_line(f"the tokenizer of {source}"):
        tok = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    origin = files[0] if len(files) == 1 else source
    for name, stored, wanted in info["mismatched_keys"]:
        raise UsageError(f"{origin}: {shown(name)} is {list(stored)}, but config.json asks for {list(wanted)}")
    for fault, names in (("have no", info["missing_keys"]), ("have an unknown", info["unexpected_keys"])):
        if names:  # of a missing embedding and the head that is tied to it, the last in order is the embedding
            raise UsageError(f"{origin}: the weights {fault} {shown(max(names))}")
    with _one_line(path), torch.no_grad():
        net.eval()(torch.zeros((1, 2), dtype=torch.long), use_cache=False)  # settings that the class does not check
    return net, tok


def _settings(source: str, files: list[str]) -> tuple[str, dict]:
    """Return config.json's path and values; raises UsageError for sizes that cannot be, or that the files do not hold.

    This needs no library, as they take seconds to import.
    """
    path = os.path.join(source, "config.json")
    values, sizes = checked.read_json(path), []
    if "quantization_config" in values:
        raise UsageError(f"{path} has a quantization_config; only models that are not quantised can be compressed")
    for key, value in run_folder.flatten(values).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{path} has {shown(key)}={value}")
    for names in SIZES:
        known = {key: values[key] for key in names if key in values}
        for key, size in known.items():
            if type(size) is not int or not 0 < size <= weights.LARGEST:
                raise UsageError(f"{path} has {key}={shown(size)}; expected a whole number from 1")
        if len(set(known.values())) != 1:
            raise UsageError(f"{path} has {shown(known) if known else 'no ' + names[0]}; expected one size")
        sizes.append(next(iter(known.items())))
    (_, vocab), (_, width), (_, layers), (heads_key, heads) = sizes
    if width % heads:
        raise UsageError(f"{path} has {heads_key}={heads}, which does not divide the width {width}")
    context = values.get("max_seq_len", LENGTH)  # MPT makes a bias of this length for each head
    if type(context) is not int or not LENGTH <= context <= LONGEST:
        raise UsageError(f"{path} has max_seq_len={shown(context)}; expected {LENGTH} to {LONGEST:,}")
    with checked.named(source):
        checked.refuse_larger(files, vocab * width + 12 * layers * width**2, dict(sizes))
    return path, values


@contextlib.contextmanager
def _one_line(path: str) -> Iterator[None]:
    """Turn what a library raises for the content of a folder into a UsageError of one line."""
    try:
        yield
    except UsageError:
        raise
    except BaseException as e:  # a panic of the package tokenizers is no Exception
        if isinstance(e, (KeyboardInterrupt, SystemExit)) or (isinstance(e, OSError) and e.errno):
            raise
        raise UsageError(f"{path} cannot be used: {blocks.one_line(e)}") from None


def _rows(tok, vocab: int, data: str, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids [N, LENGTH] of the text to calibrate with, and of the part that is held out."""
    ids, configs = [], read_sources(data, "--data")
    readers = [Reader(sources.open_source(c), ONCE, Limit(c.spec, 0), chats=False) for c in configs]
    documents = (document for reader in readers for document in iter(reader.next, None))
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
    if (largest := rows.max()) >= vocab:
        raise UsageError(f"--from: the tokenizer gives the id {largest}, but the model has {vocab} pieces")
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
    moments = {name: x.numpy() for name, x in sums.items()}
    compression.require_finite(moments)
    return moments


def _bits_per_byte(net, tok, batches: list) -> float:
    import torch

    nats = size = 0.0
    for ids in batches:
        logits = net(ids, use_cache=False).logits[:, :-1]
        nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        size += sum(len(tok.decode(row[1:]).encode()) for row in ids)
    return nats / math.log(2) / size
