"""Other starts of the low-rank factors than the product's own, written as a run's folder that `init_from` can name."""

import functools
import math
import os

import jax
import jax.numpy as jnp

from lowrank_jax.config import ModelConfig, RunConfig
from lowrank_jax.data import tokenizer
from lowrank_jax.training import run_folder, step
from lowrank_jax.training.checkpoint import Checkpoints
from lowrank_jax.training.plan import Progress


def fan_in(c: ModelConfig, factors: dict, key: jax.Array) -> dict:
    """Factors N(0, 1/d_in) and N(0, 1/rank): their product has the variance of a dense fan-in draw."""
    _, rank, d_out = factors["up"].shape
    d_in = factors["down"].shape[1] if "down" in factors else c.d
    s = 0.9 * (1 + math.sqrt(d_out / d_in))  # the product's own scale, see network.Linear
    scales = {"down": math.sqrt(1 / s), "up": math.sqrt(d_out / (s * rank))}
    return {name: scales[name] * w for name, w in factors.items()}


def spectral(c: ModelConfig, factors: dict, key: jax.Array) -> dict:
    """Factors of the best approximation of a dense draw: U sqrt(S) and sqrt(S) V^T; a zero factor stays zero."""
    if "down" not in factors:
        return factors
    (layers, d_in, rank), d_out = factors["down"].shape, factors["up"].shape[2]
    dense = jax.random.normal(key, (layers, d_in, d_out)) * d_in**-0.5
    u, s, vt = jnp.linalg.svd(dense, full_matrices=False)
    root = jnp.sqrt(s[:, :rank])
    up = root[:, :, None] * vt[:, :rank] if factors["up"].any() else factors["up"]
    return {"down": u[:, :, :rank] * root[:, None], "up": up}


def scaled(c: ModelConfig, factors: dict, key: jax.Array, by: float) -> dict:
    """The product's own factors times a number."""
    return {name: by * w for name, w in factors.items()}


STARTS = {
    "fan_in": fan_in,
    "spectral": spectral,
    "half": functools.partial(scaled, by=0.5),
    "double": functools.partial(scaled, by=2.0),
}


def apply(c: ModelConfig, params: dict, name: str) -> dict:
    """Return the parameters with another start of all factors in the blocks."""
    keys, blocks = iter(jax.random.split(jax.random.key(1), 16)), dict(params["blocks"])
    for group in ("attention", "mlp"):
        blocks[group] = {
            part: STARTS[name](c, weights, next(keys)) if "up" in weights else weights
            for part, weights in blocks[group].items()
        }
    return params | {"blocks": blocks}


def write(config: RunConfig, name: str, folder: str) -> None:
    """Write a run's folder with these first weights, unless it has them already."""
    if run_folder.newest_checkpoint(folder) is not None:
        return
    tok = tokenizer.load(config.tokenizer.path)
    config = config.with_vocab(tok.vocab_size)
    os.makedirs(folder, exist_ok=True)
    tok.save(run_folder.tokenizer_folder(folder))
    run_folder.write_config(folder, config)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(step.first_state(config, apply(config.model, step.init_params(config), name)), Progress())
