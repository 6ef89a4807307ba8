"""How the next token is drawn from a row of logits, with the meaning and in the order of Hugging Face's processors.

All of it runs inside a compiled decoding loop, for rows that each have settings of their own: what no row uses is
skipped by a condition, not by another program. Nothing sorts the vocabulary; the thresholds of top-k and top-p are
found bit by bit, in 32 passes (8 rows of 16,384 logits on 2 CPU cores: see scripts/bench_decode.py).

Shapes: B rows, V vocabulary, S tokens of context.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.attention import MASKED
from lowrank_jax.config import UsageError

MOST_BIASES = 300  # as many as OpenAI's API takes


@dataclass(frozen=True)
class Sampling:
    """The settings of one request; raises UsageError for one that is out of its range.

    `temperature` 0 takes the likeliest token. `top_k` 0, `top_p` 1 and `min_p` 0 exclude nothing, as
    `no_repeat_ngram` 0 does. The three penalties look at the last `penalty_last_n` tokens of the context, prompt
    included, or with 0 at all of it: `repetition_penalty` divides the positive logits of the tokens in it and
    multiplies the negative ones (CTRL, arXiv 1909.05858), `presence_penalty` is subtracted once, `frequency_penalty` once for each time
    (OpenAI's definitions). `logit_bias` adds to the logits of token ids. A request draws the same tokens from the same
    logits with the same `seed`, whatever runs beside it.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_last_n: int = 0
    no_repeat_ngram: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0

    def __post_init__(self):
        for name, (allowed, text) in _RANGES.items():
            value = getattr(self, name)
            kind = (int,) if isinstance(getattr(type(self), name), int) else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind) or not allowed(value):
                raise UsageError(f"{name} must be {text}, not {value!r}")
        biases = self.logit_bias
        if len(biases) > MOST_BIASES or any(i < 0 or not math.isfinite(bias) for i, bias in biases):
            raise UsageError(f"logit_bias must be at most {MOST_BIASES} token ids with a finite number each")


_RANGES: dict[str, tuple[Callable, str]] = {
    "temperature": (lambda x: 0 <= x <= 1e6, "a number between 0 and 1e6"),
    "top_k": (lambda x: 0 <= x < 2**31, "an integer between 0 (off) and 2^31 - 1"),
    "top_p": (lambda x: 0 < x <= 1, "a number above 0 and at most 1 (off)"),
    "min_p": (lambda x: 0 <= x <= 1, "a number between 0 (off) and 1"),
    "repetition_penalty": (lambda x: 0 < x <= 1e6, "a number above 0 (1: off)"),
    "presence_penalty": (lambda x: abs(x) <= 100, "a number between -100 and 100"),
    "frequency_penalty": (lambda x: abs(x) <= 100, "a number between -100 and 100"),
    "penalty_last_n": (lambda x: 0 <= x < 2**31, "an integer between 0 (all) and 2^31 - 1"),
    "no_repeat_ngram": (lambda x: 0 <= x < 2**31, "an integer between 0 (off) and 2^31 - 1"),
    "seed": (lambda x: 0 <= x < 2**63, "an integer between 0 and 2^63 - 1"),
}

PRESETS = {
    "det": Sampling(temperature=0.0),  # the same answer every time
    "balanced": Sampling(temperature=0.7, top_p=0.95, repetition_penalty=1.05, penalty_last_n=256),
    "creative": Sampling(temperature=1.0, min_p=0.05, presence_penalty=0.3, penalty_last_n=256),  # arXiv 2407.01082
}


class Rows(NamedTuple):
    """The settings of B requests as arrays [B], but for `bias_ids` and `bias` [B, M] and `key` [B, 2]."""

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    repetition_penalty: np.ndarray
    presence_penalty: np.ndarray
    frequency_penalty: np.ndarray
    penalty_last_n: np.ndarray
    no_repeat_ngram: np.ndarray
    bias_ids: np.ndarray
    bias: np.ndarray
    key: np.ndarray


def rows(samplings: Sequence[Sampling]) -> Rows:
    """The settings of each row; M is 1 or, with biases, a power of two, so that few shapes are ever compiled."""
    names = [f.name for f in dataclasses.fields(Sampling) if f.name not in ("logit_bias", "seed")]
    dtype = lambda name: np.int32 if isinstance(getattr(Sampling, name), int) else np.float32
    values = {name: np.asarray([getattr(s, name) for s in samplings], dtype(name)) for name in names}
    most = max(len(s.logit_bias) for s in samplings)
    biases = np.zeros((2, len(samplings), 1 << (most - 1).bit_length() if most else 1))
    for b, s in enumerate(samplings):
        biases[:, b, : len(s.logit_bias)] = np.reshape(s.logit_bias, (-1, 2)).T
    key = np.asarray([(s.seed >> 32, s.seed & 0xFFFFFFFF) for s in samplings], np.uint32)
    return Rows(**values, bias_ids=biases[0].astype(np.int32), bias=biases[1].astype(np.float32), key=key)


def choose(logits_BV: jax.Array, r: Rows, tokens_BS: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """The next token [B] of rows whose context is the first `lengths_B` of their `tokens_BS`."""
    logits_BV = penalize(logits_BV, r, tokens_BS, lengths_B)
    likeliest_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    draw = lambda: jnp.where(r.temperature > 0, _draw(restrict(logits_BV, r), r, lengths_B), likeliest_B)
    return jax.lax.cond(jnp.any(r.temperature > 0), draw, lambda: likeliest_B)


def adjust(logits_BV: jax.Array, r: Rows, tokens_BS: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """The logits that a token is drawn from, with all that is excluded at -1e30."""
    return restrict(penalize(logits_BV, r, tokens_BS, lengths_B), r)


def logprobs(logits_BV: jax.Array, chosen_B: jax.Array, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Under the model's own distribution: the log-probability [B] of a token, and ids and those of the n likeliest."""
    total_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    top_Bn, ids_Bn = jax.lax.top_k(logits_BV, min(n, logits_BV.shape[-1]))
    missing = ((0, 0), (0, n - ids_Bn.shape[-1]))
    chosen_B1 = jnp.take_along_axis(logits_BV, chosen_B[:, None], axis=-1)
    return (chosen_B1 - total_B1)[:, 0], jnp.pad(ids_Bn, missing), jnp.pad(top_Bn - total_B1, missing)


def penalize(logits_BV: jax.Array, r: Rows, tokens_BS: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """What depends on the context: biases, the three penalties, then repeated n-grams, which go to -1e30."""
    B, V = logits_BV.shape
    at_B1, at_S = jnp.arange(B)[:, None], jnp.arange(tokens_BS.shape[1])

    def penalized(x_BV):
        inside_BS = at_S < lengths_B[:, None]
        inside_BS &= (r.penalty_last_n == 0)[:, None] | (at_S >= (lengths_B - r.penalty_last_n)[:, None])
        count_BV = jnp.zeros((B, V)).at[at_B1, tokens_BS].add(inside_BS.astype(jnp.float32))
        factor_B1 = r.repetition_penalty[:, None]
        repeated_BV = jnp.where(x_BV > 0, x_BV / factor_B1, x_BV * factor_B1)
        x_BV = jnp.where(count_BV > 0, repeated_BV, x_BV)
        return x_BV - r.presence_penalty[:, None] * (count_BV > 0) - r.frequency_penalty[:, None] * count_BV

    def without_ngrams(x_BV):
        n_B = r.no_repeat_ngram
        tail_B = lengths_B - (n_B - 1)  # where the last n - 1 tokens begin

        def matches(k, same_BS):
            wanted_B = jnp.take_along_axis(tokens_BS, jnp.maximum(tail_B + k, 0)[:, None], axis=1)
            return same_BS & ((jnp.roll(tokens_BS, -k, axis=1) == wanted_B) | (k >= n_B - 1)[:, None])

        begins_BS = (at_S + (n_B - 1)[:, None] < lengths_B[:, None]) & (n_B > 0)[:, None]
        begins_BS = jax.lax.fori_loop(0, jnp.max(n_B) - 1, matches, begins_BS)
        ends_BS = jnp.minimum(at_S + jnp.maximum(n_B - 1, 0)[:, None], len(at_S) - 1)
        last_BS = jnp.take_along_axis(tokens_BS, ends_BS, axis=1)
        return x_BV.at[at_B1, jnp.where(begins_BS, last_BS, V)].set(MASKED, mode="drop")

    keep = lambda x_BV: x_BV
    biased = lambda x_BV: x_BV.at[at_B1, r.bias_ids].add(r.bias, mode="drop")
    penalties = (r.repetition_penalty != 1) | (r.presence_penalty != 0) | (r.frequency_penalty != 0)
    logits_BV = jax.lax.cond(jnp.any(r.bias != 0), biased, keep, logits_BV)
    logits_BV = jax.lax.cond(jnp.any(penalties), penalized, keep, logits_BV)
    return jax.lax.cond(jnp.any(r.no_repeat_ngram > 0), without_ngrams, keep, logits_BV)


def restrict(logits_BV: jax.Array, r: Rows) -> jax.Array:
    """Divided by the temperature, with what top-k, then top-p, then min-p exclude at -1e30.

    Equal logits are kept or excluded together; Hugging Face's top-p goes by their index.
    """
    x_BV = logits_BV / jnp.where(r.temperature > 0, r.temperature, 1)[:, None]
    largest_B1 = jnp.max(x_BV, axis=-1, keepdims=True)

    def top_k(x_BV):
        k_B = jnp.where(r.top_k > 0, r.top_k, x_BV.shape[-1])
        enough = lambda kept_BV: kept_BV.sum(-1) >= k_B
        return _above(x_BV, enough)

    def top_p(x_BV):
        mass_BV = jnp.exp(x_BV - largest_B1)
        wanted_B = jnp.where(r.top_p < 1, r.top_p * mass_BV.sum(-1), jnp.inf)  # which no mass reaches: all are kept
        enough = lambda kept_BV: jnp.where(kept_BV, mass_BV, 0).sum(-1) >= wanted_B
        return _above(x_BV, enough)

    def min_p(x_BV):
        return jnp.where(x_BV >= largest_B1 + jnp.log(r.min_p)[:, None], x_BV, MASKED)

    for active_B, narrow in ((r.top_k > 0, top_k), (r.top_p < 1, top_p), (r.min_p > 0, min_p)):
        x_BV = jax.lax.cond(jnp.any(active_B & (r.temperature > 0)), narrow, lambda x_BV: x_BV, x_BV)
    return x_BV


def _above(x_BV, enough) -> jax.Array:
    """x where it is at least the highest threshold at which what is kept is `enough` [B], else -1e30.

    The threshold is built from its highest bit down, over integers in the order of the floats.
    """
    bits_BV = jax.lax.bitcast_convert_type(x_BV, jnp.uint32)
    order_BV = jnp.where(bits_BV >> 31 == 1, ~bits_BV, bits_BV | jnp.uint32(1 << 31))

    def add_bit(i, threshold_B):
        higher_B = threshold_B | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(order_BV >= higher_B[:, None]), higher_B, threshold_B)

    threshold_B = jax.lax.fori_loop(0, 32, add_bit, jnp.zeros(len(x_BV), jnp.uint32))
    return jnp.where(order_BV >= threshold_B[:, None], x_BV, MASKED)


def _draw(x_BV, r: Rows, lengths_B) -> jax.Array:
    """A draw from the softmax: where a uniform number falls in the cumulated probabilities, summed in two levels."""
    B, V = x_BV.shape
    width = math.isqrt(V - 1) + 1
    mass_BV = jnp.exp(x_BV - jnp.max(x_BV, axis=-1, keepdims=True))
    mass_BGW = jnp.pad(mass_BV, ((0, 0), (0, width * width - V))).reshape(B, width, width)
    keys_B = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(r.key, impl="threefry2x32"), lengths_B)
    upto_BG = jnp.cumsum(mass_BGW.sum(-1), axis=-1)
    point_B1 = jax.vmap(jax.random.uniform)(keys_B)[:, None] * upto_BG[:, -1:]
    # Never a mass of nothing: rounding may put the point behind all, where the last that has any is meant.
    pick = lambda upto, mass: jnp.where(
        (hit := (upto > point_B1) & (mass > 0)).any(-1),
        jnp.argmax(hit, -1),
        mass.shape[-1] - 1 - jnp.argmax(mass[:, ::-1] > 0, -1),
    )
    group_B = pick(upto_BG, mass_BGW.sum(-1))
    of_group = lambda x: jnp.take_along_axis(x, group_B[:, None], axis=1)[:, 0]
    mass_BW = jnp.take_along_axis(mass_BGW, group_B[:, None, None], axis=1)[:, 0]
    before_B1 = (of_group(upto_BG) - mass_BW.sum(-1))[:, None]
    return (group_B * width + pick(before_B1 + jnp.cumsum(mass_BW, axis=-1), mass_BW)).astype(jnp.int32)
