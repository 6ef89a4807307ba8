"""filter_logits against numpy transcriptions of Hugging Face's logits processors, and the draws made with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from lowrank_jax.generate import Sampling, _sample, filter_logits

VOCAB = 12
OFF = Sampling(temperature=1.0)
filtered = jax.jit(filter_logits)
drawn = jax.jit(jax.vmap(_sample, (None, None, None, 0)))
rows = st.permutations(range(-30, 31)).map(lambda values: [v / 8 for v in values[:VOCAB]])  # no ties
batches = st.lists(rows, min_size=2, max_size=2).map(lambda x: np.asarray(x, np.float32))
many = settings(max_examples=300, deadline=None)


def softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max())
    return e / e.sum()


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    return np.where(scores < np.sort(scores)[-min(k, len(scores))], -np.inf, scores) if k else scores


def top_p(scores: np.ndarray, p: float) -> np.ndarray:
    """Keeps the smallest set of the likeliest tokens whose mass reaches p."""
    kept, mass, probs = np.full_like(scores, -np.inf), 0.0, softmax(scores)
    for token in np.argsort(-scores):
        if mass < p or p >= 1:
            kept[token] = scores[token]
        mass += probs[token]
    return kept


def min_p(scores: np.ndarray, p: float) -> np.ndarray:
    probs = softmax(scores)
    return np.where(probs < p * probs.max(), -np.inf, scores)


def expected(logits: np.ndarray, s: Sampling) -> np.ndarray:
    return min_p(top_p(top_k(logits.astype(np.float64) / s.temperature, s.top_k), s.top_p), s.min_p)


def on_an_edge(logits: np.ndarray, s: Sampling) -> bool:
    """Whether a token stands so near top_p or min_p that rounding decides about it."""
    nudged = lambda p, by: p if p in (0, 1) else min(max(p + by, 0), 1)
    kept = lambda by: np.isfinite(expected(logits, s._replace(top_p=nudged(s.top_p, by), min_p=nudged(s.min_p, -by))))
    return (kept(1e-5) != kept(-1e-5)).any()


def check(logits_BV: np.ndarray, s: Sampling) -> None:
    assume(not any(on_an_edge(row, s) for row in logits_BV))
    wanted = np.stack([expected(row, s) for row in logits_BV])
    got = np.asarray(filtered(logits_BV, s))
    kept = np.isfinite(wanted)
    np.testing.assert_array_equal(got > -1e29, kept)
    np.testing.assert_allclose(got[kept], wanted[kept], rtol=1e-5)


temperatures = st.floats(0.1, 3)
ks = st.integers(0, VOCAB + 3)
ps = st.one_of(st.just(1.0), st.floats(0.01, 1))
min_ps = st.one_of(st.just(0.0), st.floats(0, 1))


@many
@given(batches, temperatures)
def test_temperature_alone_divides_and_excludes_nothing(logits, temperature):
    check(logits, OFF._replace(temperature=temperature))


@many
@given(batches, ks)
def test_top_k_keeps_the_k_likeliest(logits, k):
    check(logits, OFF._replace(top_k=k))
    counts = (np.asarray(filtered(logits, OFF._replace(top_k=k))) > -1e29).sum(axis=1)
    assert (counts == (min(k, VOCAB) or VOCAB)).all()


@many
@given(batches, ps)
def test_top_p_keeps_the_smallest_set_whose_mass_reaches_p(logits, p):
    check(logits, OFF._replace(top_p=p))


@many
@given(batches, min_ps)
def test_min_p_keeps_what_is_likely_relative_to_the_likeliest(logits, p):
    check(logits, OFF._replace(min_p=p))


@many
@given(batches, temperatures, ks, ps, min_ps)
def test_together_they_act_in_the_order_temperature_top_k_top_p_min_p(logits, temperature, k, p, low):
    check(logits, Sampling(temperature, k, p, low))


def test_order_decides_which_tokens_remain():
    logits = np.log([[0.4, 0.3, 0.2, 0.1]]).astype(np.float32)
    remaining = lambda s: (np.asarray(filter_logits(logits, s))[0] > -1e29).sum()
    assert remaining(OFF._replace(top_p=0.55)) == 2
    assert remaining(OFF._replace(top_k=2, top_p=0.55)) == 1  # of the two, 4/7 of the mass is the first's
    assert remaining(OFF._replace(temperature=0.5, top_p=0.55)) == 2
    assert remaining(OFF._replace(temperature=0.5, top_p=0.5)) == 1


@many
@given(batches, st.sampled_from([0.0, 1e-9, 1e-3, 1.0, 1e6]), ks, st.floats(1e-12, 1), st.floats(0, 1))
@example(np.zeros((2, VOCAB), np.float32), 1.0, 1, 1e-12, 1.0)
@example(np.eye(2, VOCAB, dtype=np.float32) * 1e4, 1.0, 0, 1e-12, 1.0)
def test_the_likeliest_token_is_never_excluded(logits, temperature, k, p, low):
    got = np.asarray(filtered(logits, Sampling(temperature, k, p, low)))
    best = logits.argmax(axis=1)
    assert (np.take_along_axis(got, best[:, None], 1) > -1e29).all()
    assert np.isfinite(got).all()


@many
@given(batches, st.integers(0, 2**31 - 1))
def test_temperature_zero_picks_the_argmax_whatever_the_key(logits, seed):
    picked = drawn(logits, Sampling(temperature=0.0), jax.random.key(seed), jnp.arange(4))
    np.testing.assert_array_equal(picked, np.tile(logits.argmax(axis=1), (4, 1)))


@pytest.mark.parametrize("s", [OFF, Sampling(0.7, 3), Sampling(1.5, 0, 0.8), Sampling(1.0, 0, 1.0, 0.3)], ids=str)
def test_draws_follow_the_filtered_distribution(s):
    logits = np.random.default_rng(0).standard_normal((2, VOCAB)).astype(np.float32)
    draws = np.asarray(drawn(logits, s, jax.random.key(0), jnp.arange(20_000)))
    for row in range(2):
        shares = np.bincount(draws[:, row], minlength=VOCAB) / len(draws)
        wanted = softmax(expected(logits[row], s))
        np.testing.assert_allclose(shares, wanted, atol=0.015)
        assert (shares[wanted == 0] == 0).all()
    assert abs(np.corrcoef(draws[:, 0] == draws[:, 0].max(), draws[:, 1] == draws[:, 1].max())[0, 1]) < 0.05


def test_draws_repeat_with_the_same_key_and_differ_with_another():
    logits = np.zeros((2, VOCAB), np.float32)
    first, again, other = (drawn(logits, OFF, jax.random.key(k), jnp.arange(50)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).mean() > 0.5
