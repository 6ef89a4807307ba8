"""Time our decoding on this accelerator: prompts of 16 to 3,840 tokens, 1 to 64 rows, bf16 and int8 weights.

    python scripts/device/decoding.py            # one JSON object a line; --small: toy sizes on a CPU

The weights of preset `1b` are random, decoding is greedy, and one engine with 64 slots serves all numbers of rows.
The rows' prompts are read one after another; `first_token_seconds` is until the first row's first token, and
`all_first_token_seconds` until the last row's. `tokens_per_s` counts the time in which all rows decode. Cache bytes
are those of the rows' prompts, beside those of a dense twin's keys and values. The twin's own speed is the last arm.
"""

import functools
import gc
import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

from lowrank_jax import cli
from lowrank_jax.config import RunConfig
from lowrank_jax.model import costs
from scripts.bench import harness
from scripts.device import part, speed

SLOTS, CONTEXT, NEW, ROUNDS = 64, 4096, 129, 3


def arms(small: bool) -> list[dict]:
    """Return the arms, most important first; those of one engine stand together."""
    shapes = [(1, 1500), (64, 1500), (8, 1500), (1, 16), (64, 3840), (8, 16), (64, 16), (1, 3840), (8, 3840)]
    plan = [(rows, length, weights, "low rank", SLOTS) for weights in ("bf16", "int8") for rows, length in shapes]
    plan += [(rows, 3840, "bf16", "dense", 8) for rows in (1, 8)]  # 64 rows of a dense cache would need 55 GB
    if small:
        plan = [(1, 40, "bf16", "low rank", 2), (2, 16, "int8", "low rank", 2), (2, 40, "bf16", "dense", 2)]
    names = ("rows", "length", "weights", "model", "slots")
    arms = [{"small": small} | dict(zip(names, arm)) for arm in plan]
    return [{"check": name_of(arm)} | arm for arm in arms]


def name_of(arm: dict) -> str:
    twin = "" if arm["model"] == "low rank" else ", dense twin"
    return f"decoding of 1b, {arm['rows']} x {arm['length']} tokens, {arm['weights']}{twin}"


@functools.lru_cache(maxsize=1)
def engine_of(weights: str, model: str, slots: int, small: bool):
    arm = {"preset": "1b", "length": 64 if small else CONTEXT, "precision": "bf16", "model": model, "small": small}
    return random_engine(speed.config_of(arm), weights, slots)


def random_engine(config: RunConfig, weights: str, slots: int):
    """Return an engine with random weights, drawn on the device."""
    import jax
    import jax.numpy as jnp

    from lowrank_jax.inference import engine
    from lowrank_jax.machine import sharding
    from lowrank_jax.model import network

    def draw():  # some factors start at zero, and products of zeros take less power and so less time
        shapes = jax.eval_shape(lambda: network.init(config.model, jax.random.key(0)))
        keys = jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes)))
        normal = lambda key, w: 0.02 * jax.random.normal(key, w.shape, jnp.bfloat16)
        return jax.tree.map(normal, jax.tree.unflatten(jax.tree.structure(shapes), list(keys)), shapes)

    params = jax.jit(draw, out_shardings=sharding.whole(sharding.one_device()))()
    return engine.Engine(config.model, engine.prepare(config, params, weights), (), slots, CONTEXT)


def measure(arm: dict) -> dict:
    cli.use_compilation_cache()
    key = tuple(arm[name] for name in ("weights", "model", "slots", "small"))
    if key != getattr(measure, "last", key):
        engine_of.cache_clear()
        gc.collect()  # the last engine's arrays
    measure.last = key
    return figures(engine_of(*key), arm["rows"], arm["length"], 33 if arm["small"] else NEW)


def figures(e, rows: int, length: int, new: int) -> dict:
    """Return the figures of an engine: medians of ROUNDS, each with other prompts."""
    started = time.perf_counter()
    decode(e, rows, min(length, 300), 2, seed=0)  # compiles
    facts, samples = {"compile_seconds": round(time.perf_counter() - started, 1)}, []
    for seed in range(1, ROUNDS + 1):
        first, all_first, _ = decode(e, rows, length, 1, seed)
        _, _, tokens_per_s = decode(e, rows, length, new, seed)  # the latents of long prompts are reused
        samples.append(
            {"first_token_seconds": first, "all_first_token_seconds": all_first, "tokens_per_s": tokens_per_s}
        )
    facts |= harness.medians(samples)
    facts["prompt_tokens_per_s"] = rows * length / facts["all_first_token_seconds"]
    cache = costs.kv_bytes_per_token(e.config, 2)
    return facts | {"cache_bytes": rows * length * cache["latent"], "dense_cache_bytes": rows * length * cache["dense"]}


def decode(e, rows: int, length: int, new: int, seed: int) -> tuple[float, float, float]:
    """Return (seconds to the first row's first token, to the last row's, tokens per second while all rows decode).

    Behind prompts that the engine has just read, every row decodes from the first step on.
    """
    import numpy as np

    from lowrank_jax.inference import engine, sampling

    prompts = np.random.default_rng([seed, rows, length]).integers(5, e.config.vocab, (rows, length)).tolist()
    started, counts, events = time.perf_counter(), {}, []
    for prompt in prompts:
        counts[e.add(engine.Request(prompt, new, sampling.PRESETS["det"]))] = 0
    while e.free < e.slots:
        for slot, piece in e.step().items():
            counts[slot] += len(piece.ids)
        events.append((time.perf_counter() - started, min(counts.values()), max(counts.values()), sum(counts.values())))
    first = next(seconds for seconds, _, most, _ in events if most)
    together = [(seconds, total) for seconds, least, most, total in events if least and most < new] + [events[-1][::3]]
    (start, before), (end, after) = together[0], together[-1]
    last = next(seconds for seconds, least, _, _ in events if least)
    return first, last, (after - before) / (end - start) if end > start else 0.0


if __name__ == "__main__":
    part.main(__file__, arms, measure, lambda rows: [])
