"""Continuous batching: requests join and leave a compiled decoding loop whenever it returns to the host.

An Engine has a fixed number of slots, each with room for `context` tokens in one cache of latents. A request takes a
slot, and its prompt is read in chunks. Then one loop on the device adds up to MOST_DECODED tokens to every row. The
latents of a call's tokens are collected in a window, which the call's end writes to the cache: XLA would copy the whole
cache at every step of a loop that also writes to it. A request's output never depends on other requests in the batch.

The compiled programs depend on slots, context and a few fixed sizes: the chunk sizes, and the number of rows, rounded
up to a power of two. Attention reads only the filled part of a row.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.config import ModelConfig, RunConfig, UsageError, shown
from lowrank_jax.inference import cpu_decoder, decoder, quantize, sampling
from lowrank_jax.inference.decoder import Weights
from lowrank_jax.inference.sampling import Sampling
from lowrank_jax.machine import sharding
from lowrank_jax.model import precision

CHUNKS = (256, 32, 8)  # prompt tokens read per call; 8 only with packed weights, which the C++ decoder reads
AT_ONCE = 256  # prompt tokens read per step before the running rows decode
MOST_DECODED = 16  # most tokens decoded per row and call
MOST_ALTERNATIVES = 20  # most alternatives per token with log-probabilities, as in OpenAI's API
REUSED = 32  # tokens that a new prompt must share with an old one before the old latents are reused


@dataclass(frozen=True)
class Request:
    """A request to the engine: continue the prompt `ids` by at most `max_new` tokens.

    With `logprobs`, every token comes with its log-probability and those of that many most likely tokens. Latents of
    an earlier prompt are reused only if its `owner` was the same: the time to the first token would tell of it.
    Raises UsageError for values that no engine takes.
    """

    ids: Sequence[int]
    max_new: int
    sampling: Sampling = Sampling()
    logprobs: int = 0
    owner: str = ""

    def __post_init__(self):
        if not self.ids:
            raise UsageError("every prompt needs at least one token")
        if not isinstance(self.max_new, Integral) or self.max_new < 1:
            raise UsageError(f"max_new must be at least 1 and a whole number, not {shown(self.max_new)}")
        if not isinstance(self.logprobs, Integral) or not 0 <= self.logprobs <= MOST_ALTERNATIVES:
            raise UsageError(f"logprobs must be between 0 and {MOST_ALTERNATIVES}, not {shown(self.logprobs)}")


class Piece(NamedTuple):
    """A request's output of one step: token ids, and (log-probability, [(id, log-probability), ...]) for each.

    `finish` is "stop" if the last id is a stop id, "length" at a limit, and None while the request goes on.
    """

    ids: list[int]
    logprobs: list[tuple[float, list[tuple[int, float]]]]
    finish: str | None


def prepare(config: RunConfig, params: dict, kind: str) -> Weights:
    """Return the parameters as an Engine takes them, in one of quantize.KINDS, or `auto` for the run's precision."""
    if kind not in ("auto", *quantize.KINDS):
        raise UsageError(f"weights must be one of auto, {', '.join(quantize.KINDS)}, not {kind!r}")
    computed = kind if kind in ("fp32", "bf16", "fp16") else config.precision
    weights = decoder.prepare(config.model, params, kind, precision.policy(computed).dtype)
    return cpu_decoder.pack(config.model, weights) or weights


class Engine:
    """The slots of one model. Not safe for use by several threads."""

    def __init__(self, config: ModelConfig, weights: Weights, stop_ids: Sequence[int], slots: int, context: int):
        self.config, self.slots, self.context = config, slots, context
        self.stop_ids = tuple(stop_ids)
        self.has_run = False  # its first step compiles
        self._weights = weights
        size = -(-(context + CHUNKS[0]) // decoder.BLOCK) * decoder.BLOCK  # room for a padded last chunk
        cache = lambda: decoder.empty_cache(config, slots, size, weights.norm.dtype)
        empty = lambda: (cache(), jnp.zeros((slots, size), jnp.int32))
        self._cache, self._tokens = jax.jit(empty, out_shardings=sharding.whole(weights.norm.sharding.mesh))()
        self._requests: dict[int, Request] = {}  # by slot, in the order in which they came
        self._ids: list[list[int]] = [[] for _ in range(slots)]  # each slot's newest prompt and its answer
        self._owners = [""] * slots  # whose they are
        self._read = [0] * slots  # how many of these tokens have latents in the cache

    @property
    def free(self) -> int:
        """The number of free slots."""
        return self.slots - len(self._requests)

    @property
    def is_reading(self) -> bool:
        """True while a request's prompt is not read to its end."""
        return any(map(self._unread, self._requests))

    def _unread(self, slot: int) -> int:
        return len(self._ids[slot]) - 1 - self._read[slot]

    def add(self, request: Request) -> int:
        """Give a request a slot, and return the slot. Its answer also ends when the context is full.

        The slot is the free one that has read most of the prompt's beginning, or else the first free one.
        Raises UsageError if the prompt is too long or not of this vocabulary, or if no slot is free.
        """
        ids = list(request.ids)
        if len(ids) >= self.context:
            raise UsageError(f"a prompt of {len(ids)} tokens does not fit in a context of {self.context}")
        if not all(0 <= i < self.config.vocab for i in ids):
            raise UsageError(f"token ids must be between 0 and {self.config.vocab - 1}")
        free = [slot for slot in range(self.slots) if slot not in self._requests]
        if not free:
            raise UsageError("all slots are taken")
        mine = lambda slot: self._ids[slot][: self._read[slot]] if self._owners[slot] == request.owner else []
        shared = {slot: _shared(mine(slot), ids) for slot in free}
        slot = max(free, key=shared.get)
        self._owners[slot] = request.owner
        # The last token of the prompt is read by the first decoding step, which needs the logits after it.
        self._ids[slot], self._read[slot] = ids, min(shared[slot], len(ids) - 1)
        self._requests[slot] = dataclasses.replace(request, max_new=min(request.max_new, self.context - len(ids)))
        return slot

    def drop(self, slot: int) -> None:
        """End the request in `slot`, if there is one."""
        self._requests.pop(slot, None)

    def step(self, most: int = MOST_DECODED) -> dict[int, Piece]:
        """Read chunks of prompts until AT_ONCE tokens or more are read, then decode all rows whose prompts are read.

        Each row gets up to `most` tokens, but only one while any of them waits for its first. Returns the pieces by
        slot. A slot whose piece has a finish is free again.
        """
        self.has_run = True
        budget = AT_ONCE
        for slot in self._requests:
            while budget > 0 and self._unread(slot):
                budget -= self._prefill(slot, self._unread(slot))
        live = [slot for slot in self._requests if not self._unread(slot)]
        if not live:
            return {}
        is_first = any(len(self._ids[slot]) == len(self._requests[slot].ids) for slot in live)
        return self._decode(live, 1 if is_first else max(1, min(most, MOST_DECODED)))

    def _prefill(self, slot: int, left: int) -> int:
        """Read a chunk of a prompt of which `left` tokens are unread, and return its size."""
        sizes = CHUNKS if isinstance(self._weights.table, quantize.Panels) else CHUNKS[:2]
        T = next((size for size in sizes if left > size // 2), sizes[-1])
        start = self._read[slot]
        chunk = np.zeros((1, T), np.int32)
        chunk[0, : min(left + 1, T)] = self._ids[slot][start : start + T]
        place = np.int32(start), np.int32(slot)
        self._cache, self._tokens = _read_chunk(self.config, self._weights, self._cache, self._tokens, chunk, *place)
        self._read[slot] += min(left, T)
        return T

    def _decode(self, live: list[int], steps: int) -> dict[int, Piece]:
        B = min(self.slots, 1 << max(live).bit_length())  # a power of two: few shapes are compiled
        requests = [self._requests[slot] if slot in live else None for slot in range(B)]
        batch = _Batch(
            read_B=np.asarray(self._read[:B], np.int32),
            last_B=np.asarray([self._ids[slot][-1] if slot in live else 0 for slot in range(B)], np.int32),
            left_B=np.asarray([self._tokens_left(slot) if slot in live else 0 for slot in range(B)], np.int32),
            stop_ids=np.asarray(self.stop_ids or [-1], np.int32),
            sampling=sampling.rows([r.sampling if r else sampling.PRESETS["det"] for r in requests]),
            with_logprobs=np.asarray(any(self._requests[slot].logprobs for slot in live)),
            steps=np.int32(steps),
        )
        self._cache, self._tokens, out = _decode_some(self.config, self._weights, self._cache, self._tokens, batch)
        out = jax.tree.map(sharding.fetch, out)
        return {slot: self._piece(slot, _Out(*(x[slot] for x in out))) for slot in live}

    def _tokens_left(self, slot: int) -> int:
        request = self._requests[slot]
        return len(request.ids) + request.max_new - len(self._ids[slot])

    def _piece(self, slot: int, out: "_Out") -> Piece:
        request, count = self._requests[slot], int((out.tokens >= 0).sum())
        ids = out.tokens[:count].tolist()
        self._ids[slot] += ids
        self._read[slot] += count  # all but the newest token's latents are in the cache
        logprobs = []
        if request.logprobs:
            tops = [list(zip(i.tolist(), p.tolist())) for i, p in zip(out.top_ids[:count], out.top_logprobs[:count])]
            logprobs = [(p, top[: request.logprobs]) for p, top in zip(out.logprobs[:count].tolist(), tops)]
        finish = "stop" if ids[-1] in self.stop_ids else None if self._tokens_left(slot) else "length"
        if finish:
            del self._requests[slot]
        return Piece(ids, logprobs, finish)


def _shared(a: list[int], b: list[int]) -> int:
    """Return the number of tokens with which both lists begin, or 0 if they are too few to reuse."""
    count = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return count if count >= REUSED else 0


class _Batch(NamedTuple):
    """The arrays of one decoding loop over the first B rows; a row with `left_B` 0 stays as it is."""

    read_B: np.ndarray  # latents in the cache: those of the tokens before `last_B`
    last_B: np.ndarray  # the newest token
    left_B: np.ndarray  # most tokens to add
    stop_ids: np.ndarray
    sampling: sampling.Rows
    with_logprobs: np.ndarray
    steps: np.ndarray  # most steps of the loop


class _Out(NamedTuple):
    tokens: jax.Array  # [B, MOST_DECODED], -1 behind the last
    logprobs: jax.Array  # [B, MOST_DECODED]
    top_ids: jax.Array  # [B, MOST_DECODED, MOST_ALTERNATIVES]
    top_logprobs: jax.Array  # [B, MOST_DECODED, MOST_ALTERNATIVES]


@functools.partial(jax.jit, static_argnames="c", donate_argnames=("cache", "tokens_BS"))
def _read_chunk(c: ModelConfig, w, cache, tokens_BS, chunk_1T, start, row):
    """Return the cache and the tokens with a chunk of a prompt at `start` of `row`."""
    T = chunk_1T.shape[1]
    window = decoder.empty_window(c, 1, max(T, MOST_DECODED), cache["k"].dtype)
    _, window = cpu_decoder.read(c, w, cache, window, chunk_1T, decoder.Place(start[None], 0, row))
    tokens_BS = jax.lax.dynamic_update_slice(tokens_BS, chunk_1T, (row, start))
    return decoder.keep(cache, window, start[None], row), tokens_BS


@functools.partial(jax.jit, static_argnames="c", donate_argnames=("cache", "tokens_BS"))
def _decode_some(c: ModelConfig, w, cache, tokens_BS, batch: _Batch):
    """Add tokens to the rows of `batch` until all have ended or `steps` are done; return cache, tokens and output."""
    read_B, last_B, left_B, stop_ids, sampling_rows, with_logprobs, steps = batch
    B, alternatives = len(read_B), min(MOST_ALTERNATIVES, c.vocab)
    starts_B = jnp.where(left_B > 0, read_B, 0)  # idle rows attend to nothing in the cache
    row_B = jnp.arange(B)

    def body(state: tuple) -> tuple:
        window, tokens_BS, last_B, live_B, out, i = state
        x_B1D, window = cpu_decoder.read(c, w, cache, window, last_B[:, None], decoder.Place(starts_B, i))
        logits_BV = decoder.logits(w, x_B1D[:, 0])
        lengths_B = starts_B + i + 1
        next_B = sampling.choose(logits_BV, sampling_rows, tokens_BS[:B], lengths_B)
        column_B = jnp.where(live_B, lengths_B, tokens_BS.shape[1])  # beyond the last column nothing is written
        tokens_BS = tokens_BS.at[row_B, column_B].set(next_B, mode="drop")
        computed = lambda: sampling.logprobs(logits_BV, next_B, alternatives)
        zeros = lambda: (jnp.zeros(B), jnp.zeros((B, alternatives), jnp.int32), jnp.zeros((B, alternatives)))
        logprobs = jax.lax.cond(with_logprobs, computed, zeros)
        put = lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x[:, None], i, 1)
        out = jax.tree.map(put, out, _Out(jnp.where(live_B, next_B, -1), *logprobs))
        last_B = jnp.where(live_B, next_B, last_B)
        live_B &= ~jnp.isin(next_B, stop_ids) & (i + 1 < left_B)
        return window, tokens_BS, last_B, live_B, out, i + 1

    def goes_on(state: tuple) -> jax.Array:
        _, _, _, live_B, _, i = state
        return (i < steps) & live_B.any()

    tokens_BS = tokens_BS.at[row_B, jnp.where(left_B > 0, read_B, tokens_BS.shape[1])].set(last_B, mode="drop")
    tops = jnp.zeros((B, MOST_DECODED, alternatives))
    out = _Out(jnp.full((B, MOST_DECODED), -1), jnp.zeros((B, MOST_DECODED)), tops.astype(jnp.int32), tops)
    window = decoder.empty_window(c, B, MOST_DECODED, cache["k"].dtype)
    state = window, tokens_BS, last_B, left_B > 0, out, jnp.asarray(0)
    window, tokens_BS, _, _, out, _ = jax.lax.while_loop(goes_on, body, state)
    return decoder.keep(cache, window, read_B), tokens_BS, out
