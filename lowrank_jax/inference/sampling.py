"""Choice of the next token: bias, penalties, n-grams, temperature, top-k, top-p and min-p, for rows that differ.

Meaning and order are those of Hugging Face's logits processors (transformers 5.23, `_get_logits_processor`); presence
and frequency penalties are OpenAI's, right after the repetition penalty as in vLLM and llama.cpp. All of it runs in the
compiled decoding loop. One program serves all settings, and a batch pays only for what its rows use: each feature is
behind a `lax.cond`, and these are nested, because a GPU's host reads each condition.

Shapes: B rows, V vocabulary, S context, M biased tokens, N blocks of the vocabulary, K tokens of a block.
"""

import collections
import dataclasses
import difflib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowrank_jax.config import UsageError, shown
from lowrank_jax.model.attention import MASKED

MOST = 2**31 - 1
MOST_BIASED = 300  # OpenAI's limit
UNFILTERED = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
COLDEST = 1e-6  # lower temperatures count as this one: logits divided by it stay finite in fp32
BLOCK = 128  # tokens per block of the two-stage draw: 2 x 128 random numbers instead of 16,384 at V = 16,384
UNITS = 2**30  # integer units of probability, whose sum does not depend on the order of summation


def _number(low, high, default, text: str):
    return dataclasses.field(default=default, metadata={"range": (low, high), "help": text})


@dataclass(frozen=True)
class Sampling:
    """The settings with which one request's tokens are drawn; a value out of range raises UsageError.

    Penalties look at the last `penalty_last_n` tokens of the context, prompt included, or at all of it. Repetition
    (CTRL, arXiv 1909.05858) divides positive and multiplies negative logits of tokens that occur; presence is
    subtracted from them once, frequency once per occurrence. `no_repeat_ngram` n bans what would repeat n tokens of
    the context; each n costs a pass over it. `logit_bias` has pairs (token id, bias); unknown ids do nothing.
    """

    temperature: float = _number(0, 100, 0.8, "0 is greedy")
    top_k: int = _number(0, MOST, 0, "keep the k most likely tokens (0: off)")
    top_p: float = _number(0, 1, 1.0, "keep the most likely tokens of this total probability, at least one (1: off)")
    min_p: float = _number(0, 1, 0.0, "keep tokens this likely relative to the most likely one (0: off)")
    repetition_penalty: float = _number(0.01, 100, 1.0, "divides the logits of tokens that occurred (1: off)")
    presence_penalty: float = _number(-2, 2, 0.0, "is subtracted from the logits of tokens that occurred")
    frequency_penalty: float = _number(-2, 2, 0.0, "is subtracted from them once per occurrence")
    penalty_last_n: int = _number(0, MOST, 0, "tokens that the penalties look back (0: all)")
    no_repeat_ngram: int = _number(0, 64, 0, "never generates the same n tokens twice (0: off)")
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = _number(0, 2**63 - 1, 0, "the same seed draws the same text")

    def __post_init__(self):
        for name, field in NUMBERS.items():
            value, (low, high) = getattr(self, name), field.metadata["range"]
            if not _is_number(value, field.type, low, high):
                kind = "a whole number" if field.type is int else "a number"
                raise UsageError(f"{name}={_short(value)} must be {kind} from {low} to {high}")
        pairs = self.logit_bias
        if not isinstance(pairs, tuple) or len(pairs) > MOST_BIASED:
            raise UsageError(f"logit_bias must be a tuple of at most {MOST_BIASED} pairs of a token id and a bias")
        for pair in pairs:
            is_pair = isinstance(pair, tuple) and len(pair) == 2
            if not is_pair or not _is_number(pair[0], int, 0, MOST) or not _is_number(pair[1], float, -100, 100):
                raise UsageError(f"logit_bias has {_short(pair)}, which must be (token id, number from -100 to 100)")
        if len({token for token, _ in pairs}) < len(pairs):
            raise UsageError("logit_bias must name each token id once")


NUMBERS = {field.name: field for field in dataclasses.fields(Sampling) if field.metadata}  # all but `logit_bias`


def _is_number(value, kind: type, low, high) -> bool:
    is_kind = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return is_kind and bool(low <= value <= high)


def _short(value) -> str:
    return " ".join(f"{shown(value):.60}".split())


PRESETS = {
    # The model's first choice: the same text every time.
    "det": Sampling(temperature=0.0),
    # llama.cpp's default temperature, top-p, min-p and window, with ollama's 1.1 because small models loop. Without
    # their top-k of 40, which excludes little beyond these two and costs as much as top-p.
    "balanced": Sampling(temperature=0.8, top_p=0.95, min_p=0.05, repetition_penalty=1.1, penalty_last_n=64),
    # High temperature with min-p alone to keep it coherent (arXiv 2407.01082 advises 0.05 to 0.1).
    "creative": Sampling(temperature=1.2, min_p=0.05, repetition_penalty=1.1, penalty_last_n=64),
}


def read(values: dict) -> Sampling:
    """Return the Sampling of named values, over those of `preset` if it is among them; `logit_bias` may be a dict.

    Raises UsageError for a name or a preset that does not exist.
    """
    known, values = [field.name for field in dataclasses.fields(Sampling)], dict(values)
    if unknown := [name for name in values if name not in (*known, "preset")]:
        near = difflib.get_close_matches(unknown[0], [*known, "preset", "max_new", "stop"], 1, 0.5)
        advice = f"did you mean {near[0]}?" if near else f"use {', '.join(known)} or preset"
        raise UsageError(f"unknown setting {unknown[0]}; {advice}")
    preset, bias = values.pop("preset", None), values.get("logit_bias")
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        near = difflib.get_close_matches(str(preset), PRESETS, 1)
        raise UsageError(f"preset={_short(preset)} must be one of {', '.join(near or PRESETS)}")
    values |= {"logit_bias": tuple(bias.items())} if isinstance(bias, dict) else {}
    return Sampling(**(vars(PRESETS[preset]) if preset else {}) | values)


# The Sampling of B rows as arrays for a compiled function: its numbers [B]; `bias_ids` and `bias_values` [B, M], padded
# with 0 to M = MOST_BIASED, so that one shape is compiled; `key` [B, 2], the threefry key of
# jax.random.key(seed), with all 63 bits of the seed.
Rows = collections.namedtuple("Rows", [*(n for n in NUMBERS if n != "seed"), "bias_ids", "bias_values", "key"])


def rows(samplings: Sequence[Sampling]) -> Rows:
    """Return NumPy arrays. Greedy rows have their filters off, so that no batch pays for them."""
    changes = lambda s: {"temperature": max(s.temperature, COLDEST)} if s.temperature > 0 else UNFILTERED
    values = [vars(s) | changes(s) for s in samplings]
    dtypes = {n: np.int32 if field.type is int else np.float32 for n, field in NUMBERS.items() if n in Rows._fields}
    bias = np.zeros((2, len(samplings), MOST_BIASED), np.float64)
    for row, s in enumerate(samplings):
        bias[:, row, : len(s.logit_bias)] = np.asarray(s.logit_bias, np.float64).reshape(-1, 2).T
    return Rows(
        **{name: np.asarray([v[name] for v in values], dtype) for name, dtype in dtypes.items()},
        bias_ids=bias[0].astype(np.int32),
        bias_values=bias[1].astype(np.float32),
        key=np.asarray([[int(s.seed) >> 32, int(s.seed) & 0xFFFFFFFF] for s in samplings], np.uint32),
    )


def choose(logits_BV, rows: Rows, tokens_BS, lengths_B) -> jax.Array:
    """Return [B] int32 next tokens: the argmax of `edited` for greedy rows, else a draw from the softmax of `filtered`.

    The draw depends only on the row's seed and length.
    """
    edited_BV = edited(logits_BV, rows, tokens_BS, lengths_B)
    best_B = _argmax(edited_BV)
    is_drawn_B = rows.temperature > 0
    draw = lambda: jnp.where(is_drawn_B, _draw(filtered(edited_BV, rows), rows.key, lengths_B), best_B)
    return lax.cond(jnp.any(is_drawn_B), draw, lambda: best_B)


def logprobs(logits_BV, chosen_B, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return log-probabilities [B] of the chosen tokens, and ids and log-probabilities [B, n] of the n most likely.

    They are the model's own, before any setting changes the logits.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    total_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    top_Bn, ids_Bn = lax.top_k(logits_BV, n)
    return (jnp.take_along_axis(logits_BV, chosen_B[:, None], 1) - total_B1)[:, 0], ids_Bn, top_Bn - total_B1


def _apply(changes: list[tuple], x_BV):
    """Apply each change (is on [B], function of the logits) that a row uses."""
    if_any = lambda on_B, change, x_BV: lax.cond(jnp.any(on_B), change, lambda x_BV: x_BV, x_BV)
    each = lambda x_BV: functools.reduce(lambda x_BV, change: if_any(*change, x_BV), changes, x_BV)
    return if_any(functools.reduce(jnp.logical_or, [on_B for on_B, _ in changes]), each, x_BV)


def edited(logits_BV, rows: Rows, tokens_BS, lengths_B) -> jax.Array:
    """Return the logits in fp32 with bias, penalties and n-gram bans; banned tokens are at MASKED.

    A row's context is the first `lengths_B` of its `tokens_BS`. N-grams that would ban all tokens ban none.
    """
    is_biased_B = jnp.any(rows.bias_values != 0, axis=-1)
    is_penalised_B = (rows.repetition_penalty != 1) | (rows.presence_penalty != 0) | (rows.frequency_penalty != 0)
    ngram_B = jnp.where(rows.no_repeat_ngram <= lengths_B, rows.no_repeat_ngram, 0)
    row_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    changes = [
        (is_biased_B, lambda x_BV: x_BV.at[row_B1, rows.bias_ids].add(rows.bias_values, mode="drop")),
        (is_penalised_B, lambda x_BV: _penalised(x_BV, rows, tokens_BS, lengths_B)),
        (ngram_B > 0, lambda x_BV: _unrepeated(x_BV, ngram_B, tokens_BS, lengths_B)),
    ]
    return _apply(changes, logits_BV.astype(jnp.float32))


def _penalised(x_BV, rows: Rows, tokens_BS, lengths_B):
    at_S, V = jnp.arange(tokens_BS.shape[1]), x_BV.shape[1]
    first_B = jnp.where(rows.penalty_last_n > 0, lengths_B - rows.penalty_last_n, 0)
    is_seen_BS = (at_S >= first_B[:, None]) & (at_S < lengths_B[:, None])
    row_B1 = jnp.arange(x_BV.shape[0])[:, None]
    count_BV = jnp.zeros(x_BV.shape, jnp.int32).at[row_B1, jnp.where(is_seen_BS, tokens_BS, V)].add(1, mode="drop")
    factor_BV = jnp.where(count_BV > 0, rows.repetition_penalty[:, None], 1)
    x_BV = jnp.where(x_BV < 0, x_BV * factor_BV, x_BV / factor_BV)
    return x_BV - rows.frequency_penalty[:, None] * count_BV - rows.presence_penalty[:, None] * (count_BV > 0)


def _unrepeated(x_BV, ngram_B, tokens_BS, lengths_B):
    """Ban each token of the context that follows the n - 1 tokens with which the context ends; n = 0 bans nothing."""
    at_S, V, n_B1 = jnp.arange(tokens_BS.shape[1]), x_BV.shape[1], ngram_B[:, None]

    def follows(back, so_far_BS):
        last_B1 = jnp.take_along_axis(tokens_BS, jnp.maximum(lengths_B - back, 0)[:, None], axis=1)
        return so_far_BS & ((jnp.roll(tokens_BS, back, axis=1) == last_B1) | (back >= n_B1))

    # Tokens that the roll wraps around are before n - 1.
    whole_BS = (n_B1 > 0) & (at_S >= n_B1 - 1) & (at_S < lengths_B[:, None])
    repeats_BS = lax.fori_loop(1, jnp.max(ngram_B), follows, whole_BS)
    row_B1 = jnp.arange(x_BV.shape[0])[:, None]
    is_banned_BV = jnp.zeros(x_BV.shape, bool).at[row_B1, jnp.where(repeats_BS, tokens_BS, V)].set(True, mode="drop")
    remains_B1 = jnp.any(~is_banned_BV & (x_BV > MASKED), axis=-1, keepdims=True)
    return jnp.where(is_banned_BV & remains_B1, MASKED, x_BV)


def filtered(x_BV, rows: Rows) -> jax.Array:
    """Apply temperature, top-k, top-p and min-p; each filter masks the logits below a floor, never the largest.

    Top-k and top-p keep all of several tied logits or none, while Hugging Face's top-p breaks ties by index.
    """
    top_k_B, top_p_B = jnp.minimum(rows.top_k, x_BV.shape[1]), rows.top_p
    above = lambda x_BV, floor_B: jnp.where(x_BV >= floor_B[:, None], x_BV, MASKED)
    temperature_B1 = jnp.where(rows.temperature > 0, rows.temperature, 1)[:, None]
    x_BV = jnp.where(x_BV > MASKED, x_BV / temperature_B1, MASKED)

    top_k = lambda x_BV: above(x_BV, jnp.where(top_k_B > 0, _floor(x_BV, 1, top_k_B), -jnp.inf))
    min_p = lambda x_BV: above(x_BV, jnp.max(x_BV, axis=-1) + jnp.log(rows.min_p))  # p >= min_p x the likeliest's

    def top_p(x_BV):
        # In fp32 a sum of 16,384 probabilities depends on its order; in int32 only each rounding by 2^-31 remains.
        units_BV = jnp.round(jax.nn.softmax(x_BV, axis=-1) * UNITS).astype(jnp.int32)
        total_B = jnp.sum(units_BV, axis=-1)
        mass_B = jnp.clip(jnp.ceil(top_p_B * total_B).astype(jnp.int32), 1, total_B)
        return above(x_BV, jnp.where(top_p_B < 1, _floor(x_BV, units_BV, mass_B), -jnp.inf))

    return _apply([(top_k_B > 0, top_k), (top_p_B < 1, top_p), (rows.min_p > 0, min_p)], x_BV)


def _floor(x_BV, weight_BV, least_B):
    """Return the largest value [B] such that the weights of all logits from it upwards sum to `least_B` or more.

    It bisects the 32 bits of a float, which sort like an int32 once negative ones have their other bits flipped, and is
    exact. Compared with a sort on 2 CPU cores, V = 16,384: 0.2 ms instead of 3.6 at B = 1, 1.6 instead of 28 at B = 8.
    Bisecting two or four bits per pass took 1.3 and 2.4 times as long.
    """
    order = lambda bits: jnp.where(bits < 0, bits ^ MOST, bits)  # its own inverse
    order_BV = order(lax.bitcast_convert_type(x_BV, jnp.int32))

    def bit(i, floor_B):
        higher_B = floor_B ^ (1 << (31 - i))
        sum_B = jnp.sum(jnp.where(order_BV >= higher_B[:, None], weight_BV, 0), axis=-1)
        return jnp.where(sum_B >= least_B, higher_B, floor_B)

    floor_B = lax.fori_loop(0, 32, bit, jnp.full(x_BV.shape[0], -MOST - 1, jnp.int32))
    return lax.bitcast_convert_type(order(floor_B), jnp.float32)


def _argmax(x_BV):
    """Return the first maximum [B]; jnp.argmax, a variadic reduction, takes 1.7 times as long on CPU."""
    V = x_BV.shape[1]
    is_best_BV = x_BV == jnp.max(x_BV, axis=-1, keepdims=True)
    first_B = jnp.min(jnp.where(is_best_BV, jnp.arange(V, dtype=jnp.int32), V), axis=-1)
    return jnp.minimum(first_B, V - 1)  # a valid id even for a row of NaN


def _draw(x_BV, key_B2, lengths_B):
    """Draw from softmax(x): first a block by its probability, then a token of the block, both by Gumbel-max.

    It is exact: P(token) = P(block) P(token | block). On 2 CPU cores with V = 16,384 it takes 0.17 ms at B = 1 and 0.29
    at B = 8; noise for every token takes 0.80 and 2.5. Inverse cumulative sums take 0.10 and 0.25, but their rounding
    can pick a masked token.
    """
    x_BV = jnp.pad(x_BV, ((0, 0), (0, -x_BV.shape[1] % BLOCK)), constant_values=MASKED)

    def one(x_V, key_2, length):
        key = jax.random.fold_in(jax.random.wrap_key_data(key_2, impl="threefry2x32"), length)
        of_block, of_token = jax.random.split(key)
        x_NK = x_V.reshape(-1, BLOCK)
        block = jax.random.categorical(of_block, jax.nn.logsumexp(x_NK, axis=-1))
        return block * BLOCK + jax.random.categorical(of_token, x_NK[block])

    return jax.vmap(one)(x_BV, key_B2, lengths_B).astype(jnp.int32)
