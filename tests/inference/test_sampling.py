"""Sampling compared with transformers' logits processors on the same logits and contexts, and its draws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lowrank_jax.config import UsageError
from lowrank_jax.inference import sampling
from lowrank_jax.inference.sampling import PRESETS, Sampling, rows
from lowrank_jax.model.attention import MASKED

V, S, B = 12, 16, 3  # a vocabulary so small that contexts repeat themselves
OFF = Sampling(temperature=1.0)
choose = jax.jit(sampling.choose)


@jax.jit
def adjust(logits_BV, rows: sampling.Rows, tokens_BS, lengths_B) -> jax.Array:
    """Return the logits of the distribution that `choose` draws from."""
    return sampling.filtered(sampling.edited(logits_BV, rows, tokens_BS, lengths_B), rows)


many = settings(max_examples=100, deadline=None)


@dataclasses.dataclass(frozen=True)
class Case:
    logits: np.ndarray  # [B, V]
    tokens: np.ndarray  # [B, S]
    lengths: np.ndarray  # [B]

    def context(self, row: int) -> list[int]:
        return self.tokens[row, : self.lengths[row]].tolist()


def case(seed: int, has_ties: bool = False, vocab: int = V, batch: int = B) -> Case:
    """Return logits, with ties if `has_ties`, and contexts of different lengths followed by random tokens."""
    r = np.random.default_rng(seed)
    spread = r.choice([0.1, 1, 8])
    logits = r.standard_normal((batch, vocab)) * spread
    logits = np.round(logits / spread * 2) * spread / 2 if has_ties else logits
    used = r.integers(2, vocab + 1)
    tokens = r.integers(0, used, (batch, S))
    return Case(logits.astype(np.float32), tokens.astype(np.int32), r.integers(1, S + 1, batch).astype(np.int32))


def ours(c: Case, per_row: list[Sampling]) -> np.ndarray:
    return np.asarray(adjust(c.logits, rows(per_row), c.tokens, c.lengths), np.float64)


def theirs(logits_V, context: list[int], s: Sampling) -> np.ndarray:
    """Apply transformers' processors in the order of its `generate`, in fp64; our two penalties are plain Python."""
    processors = []
    if s.logit_bias:
        bias = {(token,): float(value) for token, value in s.logit_bias}
        processors.append(transformers.SequenceBiasLogitsProcessor(bias))
    if s.repetition_penalty != 1:
        at_most = lambda ids, scores: processor(ids[:, -s.penalty_last_n :], scores)
        processor = transformers.RepetitionPenaltyLogitsProcessor(float(s.repetition_penalty))
        processors.append(at_most)
    processors.append(lambda ids, scores: occurrences(ids, scores, s))
    if s.no_repeat_ngram:
        processors.append(transformers.NoRepeatNGramLogitsProcessor(s.no_repeat_ngram))
    if s.temperature:
        processors.append(transformers.TemperatureLogitsWarper(float(s.temperature)))
    if s.top_k and s.temperature:
        processors.append(transformers.TopKLogitsWarper(s.top_k))
    if s.top_p < 1 and s.temperature:
        processors.append(transformers.TopPLogitsWarper(s.top_p))
    if s.min_p and s.temperature:
        processors.append(transformers.MinPLogitsWarper(s.min_p))
    ids, scores = torch.tensor([context]), torch.tensor(logits_V, dtype=torch.float64)[None]
    for processor_ in processors:
        scores = processor_(ids, scores)
    return scores[0].numpy()


def occurrences(ids, scores, s: Sampling):
    """OpenAI: mu[j] -> mu[j] - c[j] * frequency - float(c[j] > 0) * presence."""
    seen = ids[0].tolist()[-s.penalty_last_n :]
    penalties = [seen.count(j) * s.frequency_penalty + (j in seen) * s.presence_penalty for j in range(scores.shape[1])]
    return scores - torch.tensor(penalties, dtype=scores.dtype)[None]


def check(c: Case, per_row: list[Sampling]) -> None:
    """Compare with transformers, except for tokens at the edge of top-p or min-p, where rounding decides."""
    got_BV = ours(c, per_row)
    for got, logits, context, s in zip(got_BV, c.logits, map(c.context, range(len(got_BV))), per_row):
        nudged = lambda by, s=s: dataclasses.replace(
            s,
            top_p=np.clip(s.top_p - by, 1e-9, 1) if s.top_p < 1 else s.top_p,
            min_p=np.clip(s.min_p * (1 + by), 0, 1),
        )
        least, most = (theirs(logits, context, nudged(by)) for by in (1e-5, -1e-5))
        assert not (np.isfinite(least) & (got <= MASKED)).any(), (s, got, least)
        assert not (np.isneginf(most) & (got > MASKED)).any(), (s, got, most)
        is_kept = np.isfinite(least)
        np.testing.assert_allclose(got[is_kept], least[is_kept], rtol=1e-5, atol=1e-5)
        assert (got[got < -1e6] == np.float32(MASKED)).all()


seeds = st.integers(0, 2**32 - 1)
temperatures = st.floats(0.1, 3)
ks = st.integers(0, V + 3)
ps = st.one_of(st.just(1.0), st.floats(0.01, 1))
min_ps = st.one_of(st.just(0.0), st.floats(0.001, 1))
biases = st.dictionaries(st.integers(0, V - 1), st.floats(-100, 100, width=32), max_size=5).map(
    lambda d: tuple(d.items())
)
settings_of_a_row = st.builds(
    Sampling,
    temperature=st.one_of(st.just(0.0), temperatures),
    top_k=ks,
    top_p=ps,
    min_p=min_ps,
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.5, 3)),
    presence_penalty=st.one_of(st.just(0.0), st.floats(-2, 2)),
    frequency_penalty=st.one_of(st.just(0.0), st.floats(-2, 2)),
    penalty_last_n=st.integers(0, S + 2),
    no_repeat_ngram=st.sampled_from([0, 0, 2, 3, 4, S, 64]),
    logit_bias=biases,
    seed=st.integers(0, 2**63 - 1),
)


def three(values):
    return st.lists(values, min_size=B, max_size=B)


@many
@given(seeds, three(biases))
def test_logit_bias_is_that_of_hugging_face(seed, of_rows):
    check(case(seed), [dataclasses.replace(OFF, logit_bias=bias) for bias in of_rows])


@many
@given(seeds, three(st.tuples(st.floats(0.1, 5), st.integers(0, S + 2))))
def test_repetition_penalty_is_that_of_hugging_face_on_the_last_n(seed, of_rows):
    check(case(seed), [dataclasses.replace(OFF, repetition_penalty=p, penalty_last_n=n) for p, n in of_rows])


@many
@given(seeds, three(st.tuples(st.floats(-2, 2), st.floats(-2, 2), st.integers(0, S + 2))))
def test_presence_and_frequency_penalties_are_those_of_openai(seed, of_rows):
    fields = ("presence_penalty", "frequency_penalty", "penalty_last_n")
    check(case(seed), [dataclasses.replace(OFF, **dict(zip(fields, row))) for row in of_rows])


@many
@given(seeds, three(st.sampled_from([0, 1, 2, 3, 4, 7, S - 1, S, S + 1, 64])))
def test_no_repeat_ngram_is_that_of_hugging_face(seed, of_rows):
    c = case(seed)
    c.tokens[c.tokens == V - 1] = 0  # so that something is left to compare
    check(c, [dataclasses.replace(OFF, no_repeat_ngram=n) for n in of_rows])


def test_no_repeat_ngram_bans_what_would_complete_one():
    c = Case(np.zeros((1, V), np.float32), np.asarray([[5, 6, 7, 5, 6, 8, 5, 6, 9, 9]], np.int32), np.asarray([8]))
    banned = lambda n: np.flatnonzero(ours(c, [dataclasses.replace(OFF, no_repeat_ngram=n)])[0] <= MASKED).tolist()
    assert [banned(n) for n in (1, 2, 3, 4)] == [[5, 6, 7, 8], [7, 8], [7, 8], []]


@many
@given(seeds, three(st.tuples(temperatures, ks)), st.booleans())
def test_temperature_and_top_k_are_those_of_hugging_face_ties_too(seed, of_rows, has_ties):
    check(case(seed, has_ties), [Sampling(temperature, k) for temperature, k in of_rows])


@many
@given(seeds, three(st.tuples(temperatures, ps)))
def test_top_p_is_that_of_hugging_face(seed, of_rows):
    check(case(seed), [Sampling(temperature, top_p=p) for temperature, p in of_rows])


@many
@given(seeds, three(st.tuples(temperatures, min_ps)), st.booleans())
def test_min_p_is_that_of_hugging_face_ties_too(seed, of_rows, has_ties):
    check(case(seed, has_ties), [Sampling(temperature, min_p=p) for temperature, p in of_rows])


@many
@given(seeds, three(settings_of_a_row))
def test_all_together_in_one_batch_in_the_order_of_hugging_face(seed, of_rows):
    check(case(seed), of_rows)


@pytest.mark.parametrize("s", [Sampling(0.7, 50), Sampling(1.3, top_p=0.95), Sampling(1.0, 200, 0.999, 0.01)], ids=str)
def test_filters_are_exact_in_a_vocabulary_of_16384(s):
    check(case(1, vocab=16_384), [s] * B)


def test_top_p_keeps_all_tied_tokens_or_none():
    c = Case(np.log([[0.4, 0.2, 0.2, 0.1, 0.1]]).astype(np.float32), np.zeros((1, 1), np.int32), np.asarray([1]))
    kept = lambda p: (ours(c, [Sampling(1.0, top_p=p)]) > MASKED).sum()
    assert [kept(p) for p in (0, 0.39, 0.41, 0.59, 0.79, 0.81, 0.99)] == [1, 1, 3, 3, 3, 5, 5]
    assert np.isfinite(theirs(c.logits[0], [0], Sampling(1.0, top_p=0.41))).sum() == 2  # one of the two by its index


def test_negative_zero_ties_with_zero():
    c = Case(np.asarray([[-0.0, 0.0, -1.0, -0.0]], np.float32), np.zeros((1, 1), np.int32), np.asarray([1]))
    for s in (Sampling(1.0, 1), Sampling(1.0, 2), Sampling(1.0, top_p=0.1), Sampling(1.0, min_p=1.0)):
        np.testing.assert_array_equal(ours(c, [s])[0] > MASKED, [True, True, False, True])


def test_order_decides_which_tokens_remain():
    c = Case(np.log([[0.4, 0.3, 0.2, 0.1]]).astype(np.float32), np.zeros((1, 1), np.int32), np.asarray([1]))
    remaining = lambda **changes: (ours(c, [dataclasses.replace(OFF, **changes)]) > MASKED).sum()
    assert remaining(top_p=0.55) == 2
    assert remaining(top_k=2, top_p=0.55) == 1  # of the two, 4/7 of the mass is the first's
    assert remaining(temperature=0.5, top_p=0.55) == 2
    assert remaining(temperature=0.5, top_p=0.5) == 1


@many
@given(
    seeds,
    three(settings_of_a_row),
    three(st.sampled_from([0, 1e-30, 1e-9, 1e-3, 1.0, 100.0])),
    three(st.sampled_from([0, 1, 2, 64])),
    st.sampled_from([0.0, 1e-30, 1.0, 1e4]),
    st.booleans(),
)
def test_something_always_remains_and_is_what_is_chosen(seed, of_rows, temperatures, ngrams, scale, is_full):
    of_rows = [
        dataclasses.replace(s, temperature=t, no_repeat_ngram=n) for s, t, n in zip(of_rows, temperatures, ngrams)
    ]
    c = case(seed)
    c = dataclasses.replace(c, logits=c.logits * np.float32(scale))
    if is_full:  # a context that has every token, so that n-grams of 1 would ban them all
        c = Case(c.logits, np.tile(np.arange(S, dtype=np.int32) % V, (B, 1)), np.full(B, S, np.int32))
    got = ours(c, of_rows)
    assert np.isfinite(got).all() and (got.max(axis=1) > MASKED).all()
    chosen = np.asarray(choose(c.logits, rows(of_rows), c.tokens, c.lengths))
    assert chosen.dtype == np.int32
    assert (np.take_along_axis(got, chosen[:, None], 1) > MASKED).all()


@many
@given(seeds, three(settings_of_a_row), st.booleans())
def test_greedy_ignores_the_filters_but_not_bias_penalties_and_n_grams(seed, of_rows, has_ties):
    c, of_rows = case(seed, has_ties), [dataclasses.replace(s, temperature=0.0) for s in of_rows]
    got = np.asarray(choose(c.logits, rows(of_rows), c.tokens, c.lengths))
    edited = np.stack([theirs(c.logits[i], c.context(i), s) for i, s in enumerate(of_rows)])
    assert (np.take_along_axis(edited, got[:, None], 1)[:, 0] >= edited.max(axis=1) - 1e-4).all()
    np.testing.assert_array_equal(got, ours(c, of_rows).argmax(axis=1))  # of tied ones the first


def draws(logits_V, of_rows: list[Sampling], context=(0,), lengths=None) -> np.ndarray:
    """The token chosen for each row; all have the same logits and context."""
    n = len(of_rows)
    lengths = np.full(n, len(context), np.int32) if lengths is None else lengths
    tile = lambda x, dtype: np.tile(np.asarray(x, dtype), (n, 1))
    return np.asarray(choose(tile(logits_V, np.float32), rows(of_rows), tile(context, np.int32), lengths))


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [5, 128, 300])  # one block, a whole one, and three of which the last is padded
@pytest.mark.parametrize(
    "s",
    [OFF, Sampling(0.7, 4), Sampling(1.5, 0, 0.8), Sampling(1.0, 0, 1.0, 0.3), Sampling(0.8, 3, 0.95, 0.05, 1.5)],
    ids=str,
)
def test_draws_follow_the_adjusted_distribution_over_seeds_and_over_positions(s, vocab):
    logits = np.random.default_rng(vocab).standard_normal(vocab).astype(np.float32)
    adjusted = np.asarray(adjust(logits[None], rows([s]), np.zeros((1, 1), np.int32), np.ones(1, np.int32)))[0]
    wanted = np.exp(adjusted - adjusted.max(), dtype=np.float64) * (adjusted > MASKED)
    n = 20_000
    over_seeds = draws(logits, [dataclasses.replace(s, seed=seed) for seed in range(n)])
    # Lengths past the buffer: without penalty_last_n and n-grams nothing but the key depends on them.
    over_positions = draws(logits, [s] * n, (0,), np.arange(1, n + 1, dtype=np.int32))
    for drawn in (over_seeds, over_positions):
        counts, expected = np.bincount(drawn, minlength=vocab), wanted / wanted.sum() * n
        assert (counts[wanted == 0] == 0).all()
        is_rare = expected < 10  # the rare ones are one bin, with the least of the others so that it is never empty
        is_rare[np.argmin(np.where(is_rare, np.inf, expected))] = True
        observed, theory = (np.append(x[~is_rare], x[is_rare].sum()) for x in (counts, expected))
        assert stats.chisquare(observed, theory).pvalue > 1e-3


def test_rows_with_different_seeds_or_positions_are_independent():
    logits, n = np.zeros(4, np.float32), 20_000
    first, second = draws(logits, [OFF] * n, (0,), np.arange(n)), draws(logits, [OFF] * n, (0,), np.arange(n) + 1)
    other = draws(logits, [dataclasses.replace(OFF, seed=1)] * n, (0,), np.arange(n))
    for pair in ((first, second), (first, other)):
        table = np.zeros((4, 4))
        np.add.at(table, pair, 1)
        assert stats.chi2_contingency(table).pvalue > 1e-3


@settings(max_examples=30, deadline=None)
@given(seeds, three(settings_of_a_row), st.permutations(range(B)))
def test_a_row_is_independent_of_its_batch_and_of_its_slot(seed, of_rows, order):
    c, order = case(seed, vocab=300), np.asarray(order)
    together = np.asarray(choose(c.logits, rows(of_rows), c.tokens, c.lengths))
    moved = choose(c.logits[order], rows([of_rows[i] for i in order]), c.tokens[order], c.lengths[order])
    np.testing.assert_array_equal(np.asarray(moved), together[order])
    for i, s in enumerate(of_rows):
        room = np.zeros((1, 5), np.int32)  # a longer buffer, with nothing in the rest of it
        alone = choose(c.logits[i : i + 1], rows([s]), np.append(c.tokens[i : i + 1], room, 1), c.lengths[i : i + 1])
        assert alone[0] == together[i]


def test_the_key_is_that_of_jax_for_short_seeds_and_keeps_the_upper_bits_of_long_ones():
    of = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
    want = [jax.random.key_data(jax.random.key(seed, impl="threefry2x32")) for seed in of]
    np.testing.assert_array_equal(rows([Sampling(seed=seed) for seed in of]).key, np.stack(want))
    assert rows([Sampling(seed=2**63 - 1)]).key.tolist() == [[2**31 - 1, 2**32 - 1]]
    same = [draws(np.zeros(100, np.float32), [dataclasses.replace(OFF, seed=s)])[0] for s in (7, 7, 7 + 2**32)]
    assert same[0] == same[1] != same[2]


@many
@given(seeds, st.integers(0, V))
def test_logprobs_are_of_the_models_own_distribution(seed, n):
    c = case(seed)
    chosen = c.tokens[:, 0]
    logprob, ids, top = map(np.asarray, jitted_logprobs(n)(c.logits, chosen))
    wanted = torch.tensor(c.logits, dtype=torch.float64).log_softmax(-1).numpy()
    np.testing.assert_allclose(logprob, np.take_along_axis(wanted, chosen[:, None], 1)[:, 0], atol=2e-6, rtol=1e-6)
    np.testing.assert_array_equal(ids, np.argsort(-c.logits, axis=1, kind="stable")[:, :n])
    np.testing.assert_allclose(top, np.take_along_axis(wanted, ids, 1), atol=2e-6, rtol=1e-6)


@functools.cache
def jitted_logprobs(n):
    return jax.jit(functools.partial(sampling.logprobs, n=n))


def test_one_program_serves_all_settings_and_any_number_of_biases():
    shape = lambda n: rows([OFF, Sampling(logit_bias=tuple((i, 1.0) for i in range(n)))]).bias_ids.shape[1]
    assert {shape(n) for n in (0, 1, 2, 3, 17, 256, 257, 300)} == {300}
    c, counted = case(0), jax.jit(lambda *x: sampling.choose(*x))
    for s in (OFF, *PRESETS.values(), Sampling(0.5, 3, 0.5, 0.1, 1.2, 1.0, 1.0, 5, 2, ((3, -100.0),), 2**40)):
        counted(c.logits, rows([s] * B), c.tokens, c.lengths)
    assert counted._cache_size() == 1


def test_bfloat16_logits_are_adjusted_in_fp32():
    c = case(0)
    low = jnp.asarray(c.logits, jnp.bfloat16)
    got = adjust(low, rows([Sampling(0.7, 3)] * B), c.tokens, c.lengths)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(
        got, adjust(low.astype(jnp.float32), rows([Sampling(0.7, 3)] * B), c.tokens, c.lengths)
    )
    assert sampling.logprobs(low, c.tokens[:, 0], 2)[0].dtype == jnp.float32


def test_presets_are_valid_and_differ():
    assert set(PRESETS) == {"det", "balanced", "creative"}
    assert PRESETS["det"].temperature == 0 < PRESETS["balanced"].temperature < PRESETS["creative"].temperature
    check(case(0), list(PRESETS.values()))


@pytest.mark.parametrize(
    ("field", "bad", "good"),
    [
        ("temperature", [-0.1, 101, float("nan"), float("inf"), "1", None, True], [0, 1e-9, 100, np.float32(1)]),
        ("top_k", [-1, 2**31, 1.0, 1.5, "3", None, True], [0, 1, 2**31 - 1, np.int64(3)]),
        ("top_p", [-0.1, 1.1, float("nan"), "x", None], [0, 1, 0.5]),
        ("min_p", [-0.1, 1.1, float("nan"), "x", None], [0, 1, 0.5]),
        ("repetition_penalty", [0, -1, 101, float("nan"), "x", None], [0.01, 1, 100]),
        ("presence_penalty", [-2.1, 2.1, float("nan"), "x", None], [-2, 2]),
        ("frequency_penalty", [-2.1, 2.1, float("nan"), "x", None], [-2, 2]),
        ("penalty_last_n", [-1, 2**31, 1.5, None], [0, 2**31 - 1]),
        ("no_repeat_ngram", [-1, 65, 1.5, None], [0, 1, 64]),
        ("seed", [-1, 2**63, 1.5, None, True, "a\nb", np.zeros((9, 9))], [0, 2**63 - 1]),
        (
            "logit_bias",
            [
                None,
                {1: 2.0},
                [(1, 2.0)],
                ((1,),),
                (1, 2.0),
                ((-1, 1.0),),
                ((2**31, 1.0),),
                ((1.0, 1.0),),
                ((1, 101),),
                ((1, float("nan")),),
                ((1, "x"),),
                ((1, 1.0), (1, 2.0)),
                tuple((i, 1.0) for i in range(301)),
            ],
            [(), ((0, -100),), tuple((i, 1.0) for i in range(300))],
        ),
    ],
)
def test_bad_values_are_refused_in_one_line_that_names_the_field(field, bad, good):
    for value in bad:
        with pytest.raises(UsageError, match=f"^{field}") as e:
            Sampling(**{field: value})
        assert "\n" not in str(e.value) and len(str(e.value)) < 160
    for value in good:
        rows([Sampling(**{field: value})])
