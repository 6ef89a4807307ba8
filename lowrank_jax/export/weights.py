"""Names of weights and keys of config.json in exports for PyTorch, and the way back."""

import math

import jax
import numpy as np

from lowrank_jax.config import ModelConfig, UsageError, shown
from lowrank_jax.data import chat
from lowrank_jax.data.tokenizer import Tokenizer
from lowrank_jax.machine.sharding import path_name
from lowrank_jax.model import costs, network
from lowrank_jax.training.run_folder import LATER

FILE, TYPE = "model.safetensors", "lowrank_alibi"
PREFIX = "model."  # of every name but the head's; lowrank.py has no such level
# Weights outside the blocks: (name, is transposed). Matrices of PyTorch are [out, in]; tables are [vocab, width].
OUTSIDE = {
    "embed/table": ("model.embed_tokens.weight", False),
    "embed/up": ("model.embed_up.weight", True),
    "head/table": ("lm_head.weight", False),
    "head/up": ("lm_head_down.weight", False),  # from D to E, where ours is from E to D
    "norm/gain": ("model.norm.weight", False),
}
SIZES = {  # key of config.json: attribute of ModelConfig
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
LARGEST = 2**31 - 1  # of a size
RANKS = ("rank_q", "rank_k", "rank_v", "rank_o")
# Settings that every format honours or refuses by name, by SIZES, RANKS and `hidden`.
EXPORTED = {*SIZES.values(), "mlp", "rank", "rank_split"} - {"hidden"}
FREE = {"attention", "scan", "remat"}  # settings that change how the function is computed, not the function
NOWHERE = {"kv_heads"}  # settings of dense models that no format takes, unless they have the value of LATER


def refuse_unknown(c: ModelConfig) -> None:
    """Raise UsageError for a setting that is in neither set, unless it leaves the model as models were without it."""
    for name, value in vars(c).items():
        if name not in EXPORTED | FREE and (name not in LATER or value != LATER[name]):
            raise UsageError(f"config.model.{name}={value!r} cannot be exported or imported; no format knows it")


def tensors(params: dict) -> dict[str, np.ndarray]:
    """Return fp32 weights by the names of modeling_lowrank.py."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = {name: w for path, stacked in leaves for name, w in _views(path, np.asarray(stacked)).items()}
    return {name: np.ascontiguousarray(w, np.float32) for name, w in named.items()}


def params(c: ModelConfig, state: dict[str, np.ndarray]) -> dict:
    """Return the parameters whose `tensors` are `state`, PREFIX or not; raises UsageError where it does not fit `c`."""
    left = {}
    for name, w in state.items():
        name = name if name.startswith((PREFIX, "lm_head")) else PREFIX + name
        if name in left:
            raise UsageError(f"{shown(name)} is among the weights twice, with and without {PREFIX}")
        left[name] = w

    def leaf(path, x) -> np.ndarray:
        for name, view in _views(path, np.broadcast_to(np.float32(0), x.shape)).items():
            if name not in left:
                raise UsageError(f"the weights have no {name}")
            if left[name].shape != view.shape:
                raise UsageError(f"{name} is {list(left[name].shape)}, but config.json asks for {list(view.shape)}")
        stacked = np.empty(x.shape, np.float32)
        for name, view in _views(path, stacked).items():
            view[...] = left.pop(name)
        return stacked

    tree = jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(lambda: network.init(c, jax.random.key(0))))
    if c.tied and "lm_head.weight" in left:  # a state of PyTorch has tied weights twice
        if not np.array_equal(left.pop("lm_head.weight"), tree["embed"]["table"]):
            raise UsageError("lm_head.weight is not the embedding, but config.json has tie_word_embeddings")
    if left:
        raise UsageError(f"the weights have {shown(min(left))}, which the model of config.json does not have")
    return tree


def _views(path, w: np.ndarray) -> dict[str, np.ndarray]:
    """Return a parameter's memory as PyTorch has it, by name: one array, or one of each layer."""
    if path_name(path) in OUTSIDE:
        name, is_transposed = OUTSIDE[path_name(path)]
        return {name: w.T if is_transposed else w}
    keys = ".".join(key.key for key in path[1:] if key.key != "gain")
    return {f"{PREFIX}layers.{i}.{keys}.weight": w_layer.T for i, w_layer in enumerate(w)}


def settings(c: ModelConfig, tokenizer: Tokenizer, longest: int) -> dict:
    """Return the keys of config.json for a model trained on sequences up to `longest`."""
    limits = {"rms_norm_eps": network.EPS, "max_position_embeddings": longest}
    return {"model_type": TYPE} | sizes(c) | limits | token_ids(tokenizer)


def sizes(c: ModelConfig) -> dict:
    """Return the keys of config.json that come from `c`; raises UsageError where they do not describe it."""
    refuse_unknown(c)
    return {key: getattr(c, name) for key, name in SIZES.items()} | dict(zip(RANKS, c.ranks))


def token_ids(tokenizer: Tokenizer) -> dict:
    pad = tokenizer.specials[tokenizer.names.get("pad_token", tokenizer.names["eos_token"])]
    return {"bos_token_id": tokenizer.bos, "eos_token_id": chat.stop_ids(tokenizer), "pad_token_id": pad}


def model_keys(values: dict) -> dict:
    """Return the keys of config.model for the sizes in a config.json; raises UsageError for another architecture."""
    if values.get("model_type") != TYPE:
        raise UsageError(f"config.json has model_type={shown(values.get('model_type'))}; only {TYPE} can be imported")
    values = {"tie_word_embeddings": True} | values  # transformers does not save this default
    for key in (*SIZES, *RANKS, "rms_norm_eps"):
        if key not in values:
            raise UsageError(f"config.json has no {key}")
        if key != "rms_norm_eps" and (not isinstance(values[key], int) or not 0 <= values[key] <= LARGEST):
            expected = f"a whole number from 0 to {LARGEST:,}, or true or false"
            raise UsageError(f"config.json has {key}={shown(values[key])}; expected {expected}")
    if values["rms_norm_eps"] != network.EPS:
        epsilon = shown(values["rms_norm_eps"])
        raise UsageError(f"config.json has rms_norm_eps={epsilon}; only {network.EPS:g} can be imported")
    keys = {name: values[key] for key, name in SIZES.items()}
    keys["mlp"] = keys.pop("hidden")
    ranks = [values[key] for key in RANKS]
    if keys["shared_kv"] and sum(ranks) % 4 == 1:  # ModelConfig.ranks rounds the mean of two different ranks up
        ranks[1] -= 1
    if sum(ranks) % 4:
        raise UsageError(f"config.json has ranks {ranks} of Q, K, V and O; their mean must be a whole number")
    if not any(ranks):
        return keys | {"rank": 0}
    divisor = math.gcd(*ranks)  # shares in lowest terms give the same ranks
    return keys | {"rank": sum(ranks) // 4, "rank_split": [float(rank // divisor) for rank in ranks]}


def count(keys: dict) -> int:
    """Return the number of parameters of a model with the keys of `model_keys`."""
    free = LATER | {"rank_split": (1.0,) * 4, "attention": "auto", "scan": True, "remat": False}
    return costs.parameters(ModelConfig(**free | keys))["total"]
