"""Held-out loss, perplexity and bits per byte, and the change that quantized weights make to them."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lowrank_jax.config import ModelConfig, RunConfig
from lowrank_jax.data import stream
from lowrank_jax.inference import cpu_decoder, decoder, quantize
from lowrank_jax.inference.engine import prepare
from lowrank_jax.machine import faults, processes, sharding
from lowrank_jax.machine.interrupt import Interrupted
from lowrank_jax.model import loss, network, precision
from lowrank_jax.model.kernels import build
from lowrank_jax.training import step

Batches, Stop = list[stream.Batch], Callable[[], bool]
BATCH_TOKENS = 8192  # of an evaluation's batches


def batches_of(documents: stream.Stream, length: int, tokens: int) -> Batches:
    """Return batches with at least `tokens` tokens, or all that the documents have, in rows of `length`."""
    batches, rows = [], max(1, min(tokens, BATCH_TOKENS) // length)
    while len(batches) * rows * length < tokens:
        if (batch := documents.next(rows, length)) is not None:
            batches.append(batch)
        elif batches or rows == 1:
            break
        else:
            rows = rows // 2  # the documents are few: fewer rows per batch
    return batches


def split(batches: Batches, most: int, multiple: int = 1) -> Batches:
    """Return the same rows in batches of at most `most`, and a multiple of `multiple`; padding rows have no weight."""
    whole = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    count = len(whole["tokens"])
    rows = max(min(most, count) // multiple, 1) * multiple
    whole = {key: np.pad(x, ((0, -count % rows), (0, 0))) for key, x in whole.items()}
    return [{key: x[start : start + rows] for key, x in whole.items()} for start in range(0, count, rows)]


def ignore_after(batches: Batches, tokens: int) -> None:
    """Set the weight of every target after the first `tokens` of the batches to zero."""
    for batch in batches:
        weights = batch["weights"]
        batch["weights"] = weights * (np.arange(weights.size).reshape(weights.shape) < tokens)
        tokens -= weights.size


def evaluate(config: RunConfig, params: dict, batches: Batches, byte_lengths, stop: Stop = lambda: False) -> dict:
    """Return {loss (nats per token), perplexity, bits_per_byte, tokens} over the weighted targets of `batches`.

    It runs on the parameters' devices; every process passes the same batches. Raises Interrupted once `stop()` is True.
    """
    nats, mesh = 0.0, jax.tree.leaves(params)[0].sharding.mesh
    for batch in batches:
        faults.strike_evaluation()
        processes.record_progress()
        if stop():
            raise Interrupted
        placed = {key: sharding.put(x, sharding.of_rows(mesh, len(x))) for key, x in batch.items()}
        with jax.set_mesh(mesh):
            nats += float(_loss_sum(config, params, placed))
    return _measures(nats, batches, byte_lengths)


def compile_for(config: RunConfig, mesh: Mesh, rows: int, length: int) -> None:
    """Compile the program of `evaluate` for batches of one shape, which JAX then takes from its cache."""
    with jax.set_mesh(mesh):
        params, batch = step.abstract_state(config, mesh).params, step.abstract_batch(rows, length, mesh)
        _loss_sum.lower(config, params, batch).compile()


def _measures(nats: float, batches: Batches, byte_lengths: np.ndarray) -> dict:
    tokens = sum(float(batch["weights"].sum()) for batch in batches)
    size = sum(float((byte_lengths[batch["targets"]] * batch["weights"]).sum()) for batch in batches)
    mean, bits_per_byte = nats / max(tokens, 1), nats / math.log(2) / max(size, 1)
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return {"loss": mean, "perplexity": perplexity, "bits_per_byte": bits_per_byte, "tokens": int(tokens)}


@functools.partial(jax.jit, static_argnums=0)
def _loss_sum(config: RunConfig, params: dict, batch: stream.Batch) -> jax.Array:
    dtype = precision.policy(config.precision).dtype
    x_BTD = network.features(config.model, params, batch["tokens"], batch["segments"], dtype)
    return loss.through_head(*network.head(config.model, params, x_BTD), batch["targets"], batch["weights"])[1]


def compare_weights(config: RunConfig, params: dict, batches: Batches, byte_lengths, kind: str) -> dict:
    """Return {weights, bits_per_byte, change, weight_bytes, weight_bytes_before} of weights in the format `kind`.

    `change` is the difference to the run's own weights. Both are computed as in generation, in chunks against a cache,
    where documents packed into one row see each other.
    """

    def measure(kind: str) -> tuple[float, int]:
        w, nats = prepare(config, params, kind), 0
        for batch in batches:
            nats += float(_cached_loss_sum(config.model, w, batch["tokens"], batch["targets"], batch["weights"]))
        return _measures(nats, batches, byte_lengths)["bits_per_byte"], quantize.bytes_of(w)

    (bits_before, bytes_before), (bits, size) = measure("auto"), measure(kind)
    change = {"weights": kind, "bits_per_byte": bits, "change": bits - bits_before}
    return change | {"weight_bytes": size, "weight_bytes_before": bytes_before}


@functools.partial(jax.jit, static_argnums=0)
def _cached_loss_sum(c: ModelConfig, w: decoder.Weights, tokens_BT, targets_BT, weights_BT) -> jax.Array:
    B, T = tokens_BT.shape
    chunk = min(-(-T // build.LANES) * build.LANES, decoder.BLOCK)
    cache = decoder.empty_cache(c, B, -(-T // decoder.BLOCK) * decoder.BLOCK, w.norm.dtype)
    in_chunks = lambda x: jnp.pad(x, ((0, 0), (0, -T % chunk))).reshape(B, -1, chunk).swapaxes(0, 1)

    def score(cache, numbered_chunk):
        i, tokens, targets, weights = numbered_chunk
        starts_B = jnp.full(B, i * chunk)
        window = decoder.empty_window(c, B, chunk, w.norm.dtype)
        x_BTD, window = cpu_decoder.read(c, w, cache, window, tokens, decoder.Place(starts_B))
        logits_NV = decoder.logits(w, x_BTD.reshape(B * chunk, -1))
        nats = loss.objective_sum(logits_NV[None], targets.reshape(1, -1), weights.reshape(1, -1))[1]
        return decoder.keep(cache, window, starts_B), nats

    parts = [in_chunks(x) for x in (tokens_BT, targets_BT, weights_BT)]
    _, nats = jax.lax.scan(score, cache, (jnp.arange(len(parts[0])), *parts))
    return nats.sum()
