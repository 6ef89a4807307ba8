"""Continuous batching: requests join and leave a compiled decode loop between two looks at the host.

An Engine has a fixed number of slots, each with room for `context` tokens in one cache of latents. A request takes a
slot, its prompt is read in chunks, and then one loop on the device adds a token at a time to all rows at once, until a
few tokens are out or all have ended. What is compiled depends on the slots and the context alone, never on a length: a
prompt is chunks of two sizes, and a row is read as far as it is filled. A row's tokens do not depend on its company.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.config import ModelConfig, RunConfig, UsageError
from lowrank_jax.inference import cpu_decoder, decoder, panels, quantize, sampling
from lowrank_jax.inference.sampling import Sampling
from lowrank_jax.machine import sharding
from lowrank_jax.model import precision

CHUNKS = (256, 32, 8)  # tokens of a prompt that are read at once; the last only natively, where few are quick
AT_ONCE = 256  # tokens of prompts that are read before others get their next ones
WINDOW = 16  # most tokens decoded between two looks at the host
TOP = 20  # alternatives to each token whose log-probabilities can be had, as many as OpenAI's API allows
REUSED = 32  # tokens that a new prompt must share with an old one for its latents to be worth keeping


class Piece(NamedTuple):
    """What a request got in one step: token ids, for each its log-probability and those of the likeliest, if asked for,
    and why it ended: "stop" (the last id is a stop id), "length" or, while it goes on, None."""

    ids: list[int]
    logprobs: list[tuple[float, list[tuple[int, float]]]]
    finish: str | None


def prepare(config: RunConfig, params: dict, kind: str) -> decoder.Weights:
    """The parameters as an Engine wants them, kept as `kind`: one of quantize.KINDS, or `auto` as the run computed.

    Raises UsageError for a kind that there is not.
    """
    if kind not in ("auto", *quantize.KINDS):
        raise UsageError(f"weights must be one of auto, {', '.join(quantize.KINDS)}, not {kind!r}")
    computed = kind if kind in ("fp32", "bf16", "fp16") else config.precision
    weights = decoder.prepare(config.model, params, kind, precision.policy(computed).dtype)
    return cpu_decoder.pack(config.model, weights) or weights


class _Request(NamedTuple):
    ids: list[int]  # the prompt
    limit: int  # most new tokens
    sampling: Sampling
    logprobs: int


class Engine:
    """The requests of one model. Not for several threads at a time."""

    def __init__(
        self, config: ModelConfig, weights: decoder.Weights, stop_ids: Sequence[int], slots: int, context: int
    ):
        self.config, self.slots, self.context = config, slots, context
        self.stop_ids = tuple(stop_ids)
        self.fresh = True  # nothing has been compiled for it
        self._weights = weights
        size = -(-(context + CHUNKS[0]) // decoder.BLOCK) * decoder.BLOCK  # a chunk is written whole
        self._cache, self._tokens = _empty(config, weights, slots, size)
        self._requests: dict[int, _Request] = {}  # by slot, in the order in which they came
        self._held: list[list[int]] = [[] for _ in range(slots)]  # the tokens whose latents each slot has
        self._new: list[list[int]] = [[] for _ in range(slots)]  # the tokens that each request got

    @property
    def free(self) -> int:
        """How many slots are free."""
        return self.slots - len(self._requests)

    def add(self, ids: list[int], max_new: int, drawn: Sampling, logprobs: int = 0) -> int:
        """Gives a request the slot that it returns. Its answer has at most `max_new` tokens, and ends with the context.

        Of slots that are free it takes one that has read the beginning of the same prompt before, else the first.
        Raises UsageError for a prompt that is empty, not of this vocabulary or too long, and where no slot is free.
        """
        if not ids:
            raise UsageError("every prompt needs at least one token")
        if max_new < 1:
            raise UsageError("max_new must be at least 1")
        if len(ids) >= self.context:
            raise UsageError(f"a prompt of {len(ids)} tokens does not fit in a context of {self.context}")
        if not all(0 <= i < self.config.vocab for i in ids):
            raise UsageError(f"token ids must be between 0 and {self.config.vocab - 1}")
        if not 0 <= logprobs <= TOP:
            raise UsageError(f"logprobs must be between 0 and {TOP}, not {logprobs}")
        free = [slot for slot in range(self.slots) if slot not in self._requests]
        if not free:
            raise UsageError("all slots are taken")
        shared = {slot: _common(self._held[slot], ids) for slot in free}
        slot = max(free, key=lambda slot: (shared[slot], -slot))
        if shared[slot] < REUSED:
            slot = free[0]
        # The last token of the prompt is read by the first decoding step, which needs the logits after it.
        self._held[slot] = ids[: min(shared[slot], len(ids) - 1)] if shared[slot] >= REUSED else []
        self._new[slot] = []
        self._requests[slot] = _Request(list(ids), min(max_new, self.context - len(ids)), drawn, logprobs)
        return slot

    def forget(self) -> None:
        """Lets go of what free slots have read."""
        self._held = [held if slot in self._requests else [] for slot, held in enumerate(self._held)]

    def drop(self, slot: int) -> None:
        """Ends the request in `slot`, if there is one."""
        self._requests.pop(slot, None)

    def step(self, most: int = WINDOW) -> dict[int, Piece]:
        """Up to AT_ONCE tokens of prompts, then up to `most` for every row that has its prompt behind it, by slot.

        A row that waits for its first token gets it alone. A slot whose piece has a finish is free again.
        """
        self.fresh = False
        budget = AT_ONCE
        for slot, r in self._requests.items():
            while budget > 0 and len(self._held[slot]) < len(r.ids) - 1:
                budget -= self._prefill(slot)
        live = [slot for slot, r in self._requests.items() if len(self._held[slot]) >= len(r.ids) - 1]
        if not live:
            return {}
        first = any(not self._new[slot] for slot in live)
        return self._decode(live, 1 if first else max(1, min(most, WINDOW)))

    def _prefill(self, slot: int) -> int:
        """Reads a chunk of a prompt; how many tokens that took."""
        ids, start = self._requests[slot].ids, len(self._held[slot])
        left = len(ids) - 1 - start
        sizes = CHUNKS if isinstance(self._weights.table, panels.Matrix) else CHUNKS[:2]
        T = next((size for size in sizes if left > size // 2), sizes[-1])
        chunk = np.zeros((1, T), np.int32)
        chunk[0, : len(ids[start : start + T])] = ids[start : start + T]
        self._cache, self._tokens = _read_chunk(
            self.config, self._weights, self._cache, self._tokens, chunk, np.int32(start), np.int32(slot)
        )
        self._held[slot] = ids[: start + min(left, T)]
        return T

    def _decode(self, live: list[int], steps: int) -> dict[int, Piece]:
        rows = min(self.slots, _power_of_two(max(live) + 1))
        requests = [self._requests.get(slot) if slot in live else None for slot in range(rows)]
        held_B = np.asarray([len(self._held[slot]) for slot in range(rows)], np.int32)
        last_B = np.asarray([self._last(slot) if r else 0 for slot, r in enumerate(requests)], np.int32)
        left_B = np.asarray([r.limit - len(self._new[s]) if r else 0 for s, r in enumerate(requests)], np.int32)
        drawn = sampling.rows([r.sampling if r else sampling.PRESETS["det"] for r in requests])
        with_logprobs = np.asarray(any(r and r.logprobs for r in requests))
        stop_ids = np.asarray(self.stop_ids or [-1], np.int32)
        self._cache, self._tokens, out = _decode_some(
            self.config, self._weights, self._cache, self._tokens, held_B, last_B, left_B, stop_ids, drawn,
            with_logprobs, np.int32(steps),
        )  # fmt: skip
        out = jax.tree.map(sharding.fetch, out)
        return {slot: self._piece(slot, _Out(*(x[slot] for x in out))) for slot in live}

    def _last(self, slot: int) -> int:
        """The newest token of a request: the one whose latents are not in the cache yet."""
        return (self._new[slot] or self._requests[slot].ids)[-1]

    def _piece(self, slot: int, out: "_Out") -> Piece:
        request, count = self._requests[slot], int((out.tokens >= 0).sum())
        ids = out.tokens[:count].tolist()
        self._held[slot] += [self._last(slot), *ids[:-1]]
        self._new[slot] += ids
        logprobs = []
        if request.logprobs:
            tops = [list(zip(i.tolist(), p.tolist())) for i, p in zip(out.top_ids[:count], out.top[:count])]
            logprobs = [(p, top[: request.logprobs]) for p, top in zip(out.logprobs[:count].tolist(), tops)]
        finish = "stop" if ids[-1] in self.stop_ids else "length" if len(self._new[slot]) == request.limit else None
        if finish:
            del self._requests[slot]
        return Piece(ids, logprobs, finish)


def _empty(c: ModelConfig, w: decoder.Weights, slots: int, size: int) -> tuple[dict, jax.Array]:
    """The cache and the tokens, on all of the weights' devices."""
    make = lambda: (decoder.empty_cache(c, slots, size, decoder.dtype(w)), jnp.zeros((slots, size), jnp.int32))
    return jax.jit(make, out_shardings=sharding.whole(w.norm.sharding.mesh))()


def _common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


class _Out(NamedTuple):
    tokens: jax.Array  # [B, WINDOW], -1 where there is none
    logprobs: jax.Array  # [B, WINDOW]
    top_ids: jax.Array  # [B, WINDOW, TOP]
    top: jax.Array  # [B, WINDOW, TOP]


class _Loop(NamedTuple):
    window: tuple
    tokens_BS: jax.Array
    last_B: jax.Array
    live_B: jax.Array
    out: _Out
    i: jax.Array


@functools.partial(jax.jit, static_argnames="c", donate_argnames=("cache", "tokens_BS"))
def _read_chunk(c: ModelConfig, w, cache, tokens_BS, chunk_1T, start, row):
    """The cache and the tokens with a chunk of a prompt at `start` of `row`."""
    T = chunk_1T.shape[1]
    window = decoder.empty_window(c, 1, max(T, WINDOW), cache["k"].dtype)
    _, window = cpu_decoder.read(c, w, cache, window, chunk_1T, start[None], 0, row)
    tokens_BS = jax.lax.dynamic_update_slice(tokens_BS, chunk_1T, (row, start))
    return decoder.keep(cache, window, start[None], row), tokens_BS


@functools.partial(jax.jit, static_argnames="c", donate_argnames=("cache", "tokens_BS"))
def _decode_some(
    c: ModelConfig, w, cache, tokens_BS, held_B, last_B, left_B, stop_ids, drawn: sampling.Rows, with_logprobs, steps
):
    """Adds up to `steps` tokens to each of the first B rows that has `left_B` > 0, in one loop that ends when all have.

    A row holds `held_B` latents, of the tokens before `last_B`. A row without anything left is only kept as it is.
    """
    B, most = len(held_B), min(TOP, c.vocab)
    starts_B = jnp.where(left_B > 0, held_B, 0)  # others need not be read
    at_B = jnp.arange(B)

    def body(loop: _Loop) -> _Loop:
        x_B1D, window = cpu_decoder.read(c, w, cache, loop.window, loop.last_B[:, None], starts_B, loop.i)
        logits_BV = decoder.logits(w, x_B1D[:, 0])
        lengths_B = starts_B + loop.i + 1
        next_B = sampling.choose(logits_BV, drawn, loop.tokens_BS[:B], lengths_B)
        place_B = jnp.where(loop.live_B, lengths_B, tokens_BS.shape[1])  # outside is nowhere
        told = jax.lax.cond(
            with_logprobs,
            lambda: sampling.logprobs(logits_BV, next_B, most),
            lambda: (jnp.zeros(B), jnp.zeros((B, most), jnp.int32), jnp.zeros((B, most))),
        )
        new = _Out(jnp.where(loop.live_B, next_B, -1), *told)
        put = lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x[:, None], loop.i, 1)
        return _Loop(
            window,
            loop.tokens_BS.at[at_B, place_B].set(next_B, mode="drop"),
            jnp.where(loop.live_B, next_B, loop.last_B),
            loop.live_B & ~jnp.isin(next_B, stop_ids) & (loop.i + 1 < left_B),
            jax.tree.map(put, loop.out, new),
            loop.i + 1,
        )

    tokens_BS = tokens_BS.at[at_B, jnp.where(left_B > 0, held_B, tokens_BS.shape[1])].set(last_B, mode="drop")
    tops = jnp.zeros((B, WINDOW, most))
    out = _Out(jnp.full((B, WINDOW), -1), jnp.zeros((B, WINDOW)), tops.astype(jnp.int32), tops)
    window = decoder.empty_window(c, B, WINDOW, cache["k"].dtype)
    loop = _Loop(window, tokens_BS, last_B, left_B > 0, out, jnp.asarray(0))
    loop = jax.lax.while_loop(lambda loop: (loop.i < steps) & loop.live_B.any(), body, loop)
    return decoder.keep(cache, loop.window, held_B), loop.tokens_BS, loop.out
