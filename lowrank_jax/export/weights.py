"""Parameters by the names, and sizes by the keys, that files for PyTorch have, and both of them back."""

import math

import jax
import numpy as np

from lowrank_jax.config import ModelConfig, UsageError
from lowrank_jax.data import chat
from lowrank_jax.data.tokenizer import Tokenizer
from lowrank_jax.machine.sharding import path_name
from lowrank_jax.model import network

FILE = "model.safetensors"
PREFIX = "model."  # of all names but the head's; lowrank.py has no such level
# What is not in a block: its name, and whether it is turned around. A matrix of torch is [out, in], and so is a table.
ALONE = {
    "embed/table": ("model.embed_tokens.weight", False),
    "embed/up": ("model.embed_up.weight", True),
    "head/table": ("lm_head.weight", False),
    "head/up": ("lm_head_down.weight", False),  # from D to E, where ours is from E to D
    "norm/gain": ("model.norm.weight", False),
}
SIZES = {  # key of config.json: what of the ModelConfig it is
    "vocab_size": "vocab",
    "hidden_size": "d",
    "intermediate_size": "hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "shared_kv": "shared_kv",
    "latent_norm": "latent_norm",
    "mlp_rank": "mlp_rank",
    "embed_rank": "embed_rank",
    "tie_word_embeddings": "tied",
}
RANKS = ("rank_q", "rank_k", "rank_v", "rank_o")
TYPE = "lowrank_alibi"


def tensors(params: dict) -> dict[str, np.ndarray]:
    """fp32 weights by the names of modeling_lowrank.py."""
    found = {}
    for path, w in jax.tree_util.tree_leaves_with_path(params):
        w = np.asarray(w)
        if path_name(path) in ALONE:
            name, turned = ALONE[path_name(path)]
            found[name] = w.T if turned else w
        else:
            found |= {_in_block(path, i): w_layer.T for i, w_layer in enumerate(w)}
    return {name: np.ascontiguousarray(w, np.float32) for name, w in found.items()}


def params(c: ModelConfig, found: dict[str, np.ndarray]) -> dict:
    """What `tensors` was given, of a state dict with or without PREFIX; raises UsageError where it does not fit `c`."""
    left = {_whole_name(name): w for name, w in found.items()}

    def take(name: str, shape: tuple[int, ...], turned: bool) -> np.ndarray:
        if name not in left:
            raise UsageError(f"the weights have no {name}")
        w = left.pop(name)
        w = w.T if turned else w
        if w.shape != shape:
            raise UsageError(f"{name} is {list(w.shape)}, and config.json makes it {list(shape)} (as [in, out])")
        return np.ascontiguousarray(w, np.float32)

    def leaf(path, x) -> np.ndarray:
        if path_name(path) in ALONE:
            name, turned = ALONE[path_name(path)]
            return take(name, x.shape, turned)
        return np.stack([take(_in_block(path, i), x.shape[1:], len(x.shape) == 3) for i in range(c.layers)])

    taken = jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(lambda: network.init(c, jax.random.key(0))))
    if c.tied and "lm_head.weight" in left:  # PyTorch's state has what is tied twice
        if not np.array_equal(left.pop("lm_head.weight"), taken["embed"]["table"]):
            raise UsageError("lm_head.weight is not the embedding, though config.json has tie_word_embeddings")
    if left:
        raise UsageError(f"the weights have {min(left)}, of which config.json knows nothing")
    return taken


def settings(c: ModelConfig, tokenizer: Tokenizer, length: int) -> dict:
    """What config.json says of the model; `length` is the longest it was trained on."""
    ids = {"eos_token_id": chat.stop_ids(tokenizer)} | special_ids(tokenizer)
    return {"model_type": TYPE, **sizes(c), "rms_norm_eps": network.EPS, "max_position_embeddings": length, **ids}


def sizes(c: ModelConfig) -> dict:
    """The keys of config.json that come from `c`."""
    return {key: getattr(c, name) for key, name in SIZES.items()} | dict(zip(RANKS, c.ranks))


def special_ids(tokenizer: Tokenizer) -> dict:
    pad = tokenizer.names["pad_token"] if "pad_token" in tokenizer.names else tokenizer.names["eos_token"]
    return {"bos_token_id": tokenizer.bos, "pad_token_id": tokenizer.specials[pad]}


def model_keys(values: dict) -> dict:
    """The keys of config.model that give the sizes in config.json, `values`; raises UsageError for another model's.

    Ranks come back as shares of their sum in lowest terms, which give the same ranks.
    """
    if values.get("model_type") != TYPE:
        raise UsageError(f"config.json has model_type={values.get('model_type')!r}; only {TYPE} can be imported")
    values = {"tie_word_embeddings": True} | values  # which transformers leaves out
    missing = [key for key in (*SIZES, *RANKS, "rms_norm_eps") if key not in values]
    if missing:
        raise UsageError(f"config.json has no {missing[0]}")
    if values["rms_norm_eps"] != network.EPS:
        raise UsageError(f"config.json has rms_norm_eps={values['rms_norm_eps']}; the model's is {network.EPS:g}")
    wrong = [key for key in (*SIZES, *RANKS) if not isinstance(values[key], int) or values[key] < 0]
    if wrong:
        raise UsageError(f"config.json has {wrong[0]}={values[wrong[0]]!r}")
    found = {name: values[key] for key, name in SIZES.items()}
    found["mlp"] = found.pop("hidden")
    ranks = [values[key] for key in RANKS]
    if found["shared_kv"] and sum(ranks) % 4 == 1:  # ModelConfig.ranks rounds the mean of two different ones up
        ranks[1] -= 1
    if sum(ranks) % 4:
        raise UsageError(f"config.json has ranks {ranks} of Q, K, V, O, whose mean is no whole number")
    if not any(ranks):
        return found | {"rank": 0}
    divisor = math.gcd(*ranks)
    return found | {"rank": sum(ranks) // 4, "rank_split": [float(rank // divisor) for rank in ranks]}


def save(found: dict[str, np.ndarray], path: str, format: str) -> None:
    """Writes a .safetensors file; raises UsageError where the package is missing."""
    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise UsageError(f"--format={format} needs the package safetensors: pip install safetensors") from None
    save_file(found, path, metadata={"format": "pt"})


def _in_block(path, layer: int) -> str:
    keys = [key.key for key in path[1:] if key.key != "gain"]
    return f"{PREFIX}layers.{layer}.{'.'.join(keys)}.weight"


def _whole_name(name: str) -> str:
    return name if name.startswith((PREFIX, "lm_head")) else PREFIX + name
