"""Held-out loss, perplexity and bits per byte, at any sequence length.

    python -m lowrank_jax.evaluate --workdir=runs/quickstart --lengths=256,512,1024

Each length cuts the same stream of held-out tokens into rows and scores the same targets: a longer row means more
context for them. `--weights=int8` tells as well what weights of that kind change, by the program that generates.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lowrank_jax.config import ModelConfig, PhaseConfig, RunConfig
from lowrank_jax.data import stream
from lowrank_jax.data.tokenizer import Tokenizer
from lowrank_jax.inference import cpu_decoder, decoder, quantize
from lowrank_jax.inference.engine import prepare
from lowrank_jax.machine import faults, sharding
from lowrank_jax.machine.interrupt import Interrupted
from lowrank_jax.model import loss, network, precision
from lowrank_jax.training import step

ROW_TOKENS = 8192  # tokens evaluated at a time


def held_out(p: PhaseConfig, tokenizer: Tokenizer, seed: int, chats: bool, length: int, note) -> list[stream.Batch]:
    """About `eval_tokens` of the phase's held-out part in rows of `length`; empty where it does not fill one row."""
    return batches_of(stream.open_held_out(p, tokenizer, seed, chats, note), length, p.eval_tokens)


def split(batches: list[stream.Batch], rows: int, of: int = 1) -> list[stream.Batch]:
    """The same rows, at most so many in a batch but a multiple of `of`; the last is filled with rows of no weight."""
    whole = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    count = len(whole["tokens"])
    rows = max(min(rows, count) // of, 1) * of
    whole = {key: np.pad(x, ((0, -count % rows), (0, 0))) for key, x in whole.items()}
    return [{key: x[at : at + rows] for key, x in whole.items()} for at in range(0, count, rows)]


def evaluate(
    config: RunConfig,
    params: dict,
    batches: list[stream.Batch],
    byte_lengths: np.ndarray,
    stop: Callable[[], bool] = lambda: False,
) -> dict:
    """{loss (nats a token), perplexity, bits_per_byte, tokens} over the weighted targets of `batches`.

    It is computed where the parameters are; of many processes each has the same batches. Raises Interrupted between two
    batches once `stop()` says so.
    """
    nats, mesh = 0.0, jax.tree.leaves(params)[0].sharding.mesh
    for batch in batches:
        faults.strike_evaluation()
        if stop():
            raise Interrupted
        placed = {key: sharding.put(x, sharding.of_rows(mesh, len(x))) for key, x in batch.items()}
        with jax.set_mesh(mesh):
            nats += float(_loss_sum(config, params, placed))
    return _measures(nats, batches, byte_lengths)


def compile_for(config: RunConfig, mesh: Mesh, rows: int, length: int) -> None:
    """Compiles what `evaluate` runs for batches of such a shape, which JAX then finds."""
    at = sharding.of_rows(mesh, rows)
    batch = {name: jax.ShapeDtypeStruct((rows, length), kind, sharding=at) for name, kind in step.BATCH.items()}
    with jax.set_mesh(mesh):
        _loss_sum.lower(config, step.abstract_state(config, mesh).params, batch).compile()


def _measures(nats: float, batches: list[stream.Batch], byte_lengths: np.ndarray) -> dict:
    tokens = sum(float(batch["weights"].sum()) for batch in batches)
    size = sum(float((byte_lengths[batch["targets"]] * batch["weights"]).sum()) for batch in batches)
    mean = nats / max(tokens, 1)
    bits_per_byte = nats / math.log(2) / max(size, 1)
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return {"loss": mean, "perplexity": perplexity, "bits_per_byte": bits_per_byte, "tokens": int(tokens)}


@functools.partial(jax.jit, static_argnums=0)
def _loss_sum(config: RunConfig, params: dict, batch: stream.Batch) -> jax.Array:
    dtype = precision.policy(config.precision).dtype
    x_BTD = network.features(config.model, params, batch["tokens"], batch["segments"], dtype)
    return loss.through_head(*network.head(config.model, params, x_BTD), batch["targets"], batch["weights"])[1]


def compare_weights(config: RunConfig, params: dict, batches: list[stream.Batch], byte_lengths, kind: str) -> dict:
    """{weights, bits_per_byte, change, weight_bytes, weight_bytes_before}: with weights of a kind, beside the run's.

    Both are computed as generation does, in chunks against a cache, where documents packed in one row see each other.
    """
    found = {}
    for each in ("auto", kind):
        w = prepare(config, params, each)
        nats = sum(
            float(_cached_loss_sum(config.model, w, batch["tokens"], batch["targets"], batch["weights"]))
            for batch in batches
        )
        found[each] = {"bytes": quantize.bytes_of(w)} | _measures(nats, batches, byte_lengths)
    before, after = found["auto"], found[kind]
    change = after["bits_per_byte"] - before["bits_per_byte"]
    sizes = {"weight_bytes": after["bytes"], "weight_bytes_before": before["bytes"]}
    return {"weights": kind, "bits_per_byte": after["bits_per_byte"], "change": change} | sizes


@functools.partial(jax.jit, static_argnums=0)
def _cached_loss_sum(c: ModelConfig, w: decoder.Weights, tokens_BT, targets_BT, weights_BT) -> jax.Array:
    B, T = tokens_BT.shape
    chunk = min(-(-T // cpu_decoder.LANES) * cpu_decoder.LANES, decoder.BLOCK)
    cache = decoder.empty_cache(c, B, -(-T // decoder.BLOCK) * decoder.BLOCK, decoder.dtype(w))
    in_chunks = lambda x: jnp.pad(x, ((0, 0), (0, -T % chunk))).reshape(B, -1, chunk).swapaxes(0, 1)

    def score(cache, at):
        i, tokens, targets, weights = at
        starts_B = jnp.full(B, i * chunk)
        window = decoder.empty_window(c, B, chunk, decoder.dtype(w))
        x_BTD, window = cpu_decoder.read(c, w, cache, window, tokens, decoder.Place(starts_B))
        logits_NV = decoder.logits(w, x_BTD.reshape(B * chunk, -1))
        nats = loss.objective_sum(logits_NV[None], targets.reshape(1, -1), weights.reshape(1, -1))[1]
        return decoder.keep(cache, window, starts_B), nats

    parts = [in_chunks(x) for x in (tokens_BT, targets_BT, weights_BT)]
    _, nats = jax.lax.scan(score, cache, (jnp.arange(len(parts[0])), *parts))
    return nats.sum()


def batches_of(documents: stream.Stream, length: int, tokens: int) -> list[stream.Batch]:
    batches, rows = [], max(1, min(tokens, ROW_TOKENS) // length)
    while len(batches) * rows * length < tokens:
        batch = documents.next(rows, length)
        if batch is None and not batches and rows > 1:
            rows = rows // 2  # a small held-out part: fewer rows at a time
            continue
        if batch is None:
            break
        batches.append(batch)
    return batches


def ignore_after(batches: list[stream.Batch], tokens: int) -> None:
    """Takes the weight off every target after the first `tokens` of the stream that the batches are cut from."""
    done = 0
    for batch in batches:
        position = done + np.arange(batch["weights"].size).reshape(batch["weights"].shape)
        batch["weights"] = batch["weights"] * (position < tokens)
        done += batch["weights"].size
