"""Held-out loss, perplexity and bits per byte, and the change that quantized weights make to them."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lowrank_jax.config import MOST_LENGTH, ModelConfig, PhaseConfig, RunConfig, UsageError, read_sources, shown
from lowrank_jax.data import stream
from lowrank_jax.inference import cpu_decoder, decoder, quantize
from lowrank_jax.inference.engine import prepare
from lowrank_jax.machine import console, faults, processes, sharding
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


def check_sizes(lengths: Sequence[int], tokens: int, dashes: str = "") -> None:
    """Raise UsageError for sizes that `of_run` cannot take, whose flags on a command line begin with `dashes`."""
    if wrong := [n for n in (*lengths, tokens) if not isinstance(n, Integral) or isinstance(n, bool)]:
        raise UsageError(f"{dashes}lengths and {dashes}tokens must be whole numbers, not {shown(wrong[0])}")
    if tokens < 0 or any(n < 1 for n in lengths):
        raise UsageError(f"{dashes}lengths and {dashes}tokens must be above 0")
    if any(n > MOST_LENGTH for n in lengths):
        raise UsageError(f"{dashes}lengths={max(lengths)} must be at most {MOST_LENGTH}")


def of_run(run, lengths: Sequence[int] = (), data="", tokens: int = 0, weights: str = "") -> Iterator[dict]:
    """Yield {length, scored} | `evaluate` of a Trained or Model for each length.

    By default, the held-out part of the first phase is read at its longest length; `data` is other sources. Texts are
    "scored" on the same tokens at each length. "chats" are scored as in SFT: whole, in the template, on the assistant's
    tokens alone. Where a run has both, or `data` has, the result holds that of chats as "chats". With `weights`, "with"
    is `compare_weights`. Raises UsageError where the data does not fill a row.
    """
    check_sizes(lengths, tokens)
    if weights and weights not in quantize.KINDS:
        raise UsageError(f"weights must be one of {', '.join(quantize.KINDS)}, not {shown(weights)}")
    byte_lengths, of_kinds = run.tokenizer.byte_lengths(), {}
    for kind, (documents, phase) in _open(run, data).items():
        try:
            own = lengths or [phase.lengths[-1]]
            of_kinds[kind] = _of_lengths(documents, own, tokens or phase.eval_tokens, kind == "chats")
        except UsageError as e:
            if data or not of_kinds:
                raise
            console.say(f"the held-out {kind} of the run are not scored: {e}")
    for all_rows in zip(*(of_lengths.items() for of_lengths in of_kinds.values())):
        results = [
            {"length": length, "scored": kind} | evaluate(run.config, run.params, batches, byte_lengths)
            for kind, (length, batches) in zip(of_kinds, all_rows)
        ]
        if weights:
            results[0]["with"] = compare_weights(run.config, run.params, all_rows[0][1], byte_lengths, weights)
        yield results[0] | {result["scored"]: result for result in results[1:]}


def _open(run, data) -> dict[str, tuple[Callable[[], stream.Stream], PhaseConfig]]:
    """Return {"text" or "chats": (a function that opens documents from their start, the phase that they are like)}."""
    config, tok = run.config, run.tokenizer
    if not data:
        held_out = lambda p, chats: lambda: stream.open_held_out(p, tok, config.seed, chats)
        kinds = {"text": "pretrain", "chats": "sft"}
        return {
            kind: (held_out(config.phases[name], name == "sft"), config.phases[name])
            for kind, name in kinds.items()
            if name in config.phases
        }
    configs = read_sources(data, "data")
    chats = [source for source in configs if stream.is_chat(source)]
    parts = {"text": [source for source in configs if source not in chats], "chats": chats}
    first, read = next(iter(config.phases.values())), lambda part, kind: stream.read_once(part, tok, kind == "chats")
    return {kind: (functools.partial(read, part, kind), first) for kind, part in parts.items() if part}


def _of_lengths(documents: Callable, lengths: Sequence[int], tokens: int, chats: bool) -> dict[int, Batches]:
    batches = {length: batches_of(documents(), length, tokens) for length in lengths}
    for length in lengths:
        if not batches[length]:
            missing = f"fill one row of {length} tokens" if not chats else f"answer within {length} tokens"
            remedy = "use shorter lengths or more data" if not chats else "use longer lengths or other chats"
            raise UsageError(f"the data does not {missing}; {remedy}")
    if chats:  # whole conversations: rows of other lengths have other tokens
        return batches
    shared = min(tokens, *(sum(batch["tokens"].size for batch in rows) for rows in batches.values()))
    if shared < tokens:
        console.say(f"the data fills rows of every length with {shared} tokens, fewer than {tokens}")
    for rows in batches.values():
        ignore_after(rows, shared)
    return batches


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
