"""Continuous batching: rows are independent, no length compiles a program, and the cache is exact."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_network import full, jit, make, toy

from lowrank_jax.config import UsageError
from lowrank_jax.inference import engine, quantize
from lowrank_jax.inference.engine import CHUNKS, MOST_DECODED, REUSED, Engine, Request
from lowrank_jax.inference.sampling import PRESETS, Sampling
from lowrank_jax.machine import sharding
from lowrank_jax.model import costs

pytestmark = pytest.mark.slow

GREEDY = PRESETS["det"]
CONTEXT = 1000
SETTINGS = [
    GREEDY,
    Sampling(temperature=0.9, seed=5),
    Sampling(temperature=1.3, top_k=12, seed=6),
    Sampling(temperature=0.8, top_p=0.8, repetition_penalty=1.3, penalty_last_n=20, seed=7),
    Sampling(temperature=1.0, min_p=0.05, no_repeat_ngram=2, logit_bias=((5, 2.0), (9, -50.0)), seed=8),
    Sampling(temperature=0.0, presence_penalty=1.0, frequency_penalty=0.5),
]


@pytest.fixture(autouse=True, scope="module")
def quick_to_compile():
    """Compile without optimization, because compiling takes most of these tests' time."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_read_chunk", "_decode_some"):
            function = getattr(engine, name).__wrapped__
            patch.setattr(engine, name, jit(function, static_argnames="c", donate_argnames=("cache", "tokens_BS")))
        yield


@functools.cache
def weights(**changes):
    c = toy(**changes)
    params = jax.device_put(make(c), sharding.whole(sharding.one_device()))
    return c, params, engine.decoder.prepare(c, params, "fp32", jnp.float32)


def make_engine(slots: int, context: int = CONTEXT, stop: tuple[int, ...] = (), **changes) -> Engine:
    c, _, w = weights(**changes)
    return Engine(c, w, stop, slots, context)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed + length).integers(0, toy().vocab, length).tolist()


def answers(e: Engine, requests: list[tuple[list[int], int, Sampling]], late: int = 0) -> list[list[int]]:
    """Return each request's answer; with `late`, each joins that many steps after the one before it."""
    waiting, slots, out = list(enumerate(requests)), {}, [[] for _ in requests]
    steps = 0
    while waiting or slots:
        while waiting and e.free and steps >= late * waiting[0][0]:
            i, request = waiting.pop(0)
            slots[e.add(Request(*request))] = i
        for slot, piece in e.step().items():
            out[slots[slot]] += piece.ids
            if piece.finish:
                del slots[slot]
        steps += 1
    return out


@pytest.fixture(scope="module")
def alone() -> Engine:
    return make_engine(1)


@pytest.fixture(scope="module")
def together() -> Engine:
    return make_engine(4)


def test_a_greedy_answer_is_the_argmax_of_the_full_forward_pass(alone):
    c, params, _ = weights()
    ids = prompt(CHUNKS[0] + 40)
    (new,) = answers(alone, [(ids, 3 * MOST_DECODED, GREEDY)])
    logits = np.asarray(full(c, params, np.asarray([ids + new])))[0]
    assert new == logits[len(ids) - 1 : -1].argmax(-1).tolist()


def test_repeats_are_found_up_to_the_newest_token_and_in_a_reused_beginning(alone):
    c, params, _ = weights()
    ids = prompt(CHUNKS[0] + 40)
    answers(alone, [([*ids, *prompt(200)], 1, GREEDY)])
    (new,) = answers(alone, [(ids, 3 * MOST_DECODED, Sampling(temperature=0.0, no_repeat_ngram=2))])
    logits = np.asarray(full(c, params, np.asarray([ids + new])))[0].copy()
    expected = []
    for at in range(len(ids), len(ids + new)):
        context = (ids + new)[:at]
        logits[at - 1, [b for a, b in zip(context, context[1:]) if a == context[-1]]] = -np.inf
        expected.append(logits[at - 1].argmax())
    assert new == expected and len(new) == 3 * MOST_DECODED


@settings(max_examples=8)
@given(st.data())
def test_rows_are_independent(alone, together, data):
    """Requests of any length and settings, joining at any time, get the answers that they get alone."""
    lengths = st.sampled_from([1, 2, 31, 32, 33, 34, 64, 128, 129, 130, 200, 256, 257, 258, 400])
    request = st.tuples(lengths, st.integers(1, 40), st.sampled_from(SETTINGS), st.integers(0, 99))
    requests = data.draw(st.lists(request, min_size=1, max_size=7))
    requests = [(prompt(length, seed), most, drawn) for length, most, drawn, seed in requests]
    expected = [answers(alone, [r])[0] for r in requests]
    assert answers(together, requests, late=data.draw(st.integers(0, 2))) == expected
    assert [len(x) for x in expected] == [most for _, most, _ in requests]


def test_no_length_compiles_anything_after_the_first_two_requests():
    assert_nothing_is_compiled(make_engine(1, context=1000))


def assert_nothing_is_compiled(e: Engine) -> None:
    """Check that only the first two requests of an engine with a context of 1,000 compile programs."""
    compiled = []
    answers(e, [(prompt(2), 3, GREEDY), (prompt(300), 3, GREEDY)])
    listen = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for length in (1, 5, 31, 100, 257, 500, 900):
            answers(e, [(prompt(length), 20, SETTINGS[length % len(SETTINGS)])])
        assert not [event for event in compiled if "compile" in event]
        jax.jit(lambda x: x * 3)(jnp.ones(77))  # the listener does hear compilations
        assert compiled
    finally:
        jax.monitoring.clear_event_listeners()


def test_an_answer_ends_with_a_stop_id_or_the_context_or_the_limit(alone):
    (free,) = answers(alone, [(prompt(8), 40, SETTINGS[1])])
    stop = free[20]
    first = free.index(stop)
    stopping = make_engine(1, stop=(stop,))
    for most, length, why in ((40, first + 1, "stop"), (first + 1, first + 1, "stop"), (first, first, "length")):
        slot = stopping.add(Request(prompt(8), most, SETTINGS[1]))
        got, finish = [], None
        while not finish:
            piece = stopping.step()[slot]
            got, finish = got + piece.ids, piece.finish
        assert (got, finish) == (free[:length], why) and stopping.free == 1
    (to_the_end,) = answers(alone, [(prompt(CONTEXT - 14), 1000, GREEDY)])
    assert len(to_the_end) == 14


@pytest.mark.parametrize(
    "changes",
    [{}, {"latent_norm": False}, {"shared_kv": True}, {"rank": 0}, {"mlp_rank": 6, "embed_rank": 7, "tied": False}],
)
def test_every_kind_of_model_is_cached_exactly_at_four_times_its_length(changes):
    c, params, _ = weights(**changes)
    ids = prompt(4 * 64)
    logprobs, e = [], make_engine(1, **changes)
    slot = e.add(Request(ids[:70], 4 * 64 - 70, Sampling(temperature=5.0), logprobs=3))
    new = []
    while e.free == 0:
        piece = e.step()[slot] if e._read[slot] >= 69 else e.step().get(slot)
        if piece:
            new, logprobs = new + piece.ids, logprobs + piece.logprobs
    expected = jax.nn.log_softmax(full(c, params, np.asarray([ids[:70] + new]))[0, 69:-1])
    assert len(new) == 4 * 64 - 70
    for row, token, (logprob, top) in zip(np.asarray(expected), new, logprobs, strict=True):
        assert abs(row[token] - logprob) < 1e-5
        assert [i for i, _ in top] == np.argsort(-row, kind="stable")[:3].tolist()
        np.testing.assert_allclose([p for _, p in top], np.sort(row)[::-1][:3], atol=1e-5)


def test_a_row_gets_log_probabilities_next_to_one_without(together):
    c, params, _ = weights()
    plain, wants = (together.add(Request(prompt(8), 4, GREEDY, logprobs)) for logprobs in (0, 2))
    new, logprobs = [], []
    while together.free < 4:
        pieces = together.step()
        assert pieces[plain].logprobs == []
        new, logprobs = new + pieces[wants].ids, logprobs + pieces[wants].logprobs
    rows = np.asarray(jax.nn.log_softmax(full(c, params, np.asarray([prompt(8) + new]))[0, 7:-1]))
    np.testing.assert_allclose([p for p, _ in logprobs], rows[range(4), new], atol=1e-5)
    assert [[i for i, _ in top] for _, top in logprobs] == np.argsort(-rows, kind="stable")[:, :2].tolist()


def test_a_prompt_that_begins_like_the_last_one_is_not_read_again(alone):
    ids = prompt(300, seed=9)
    (new,) = answers(alone, [(ids, 5, GREEDY)])
    more = [*ids, *new, *prompt(20)]
    expected = answers(make_engine(1), [(more, 10, GREEDY)])
    alone.add(Request(more, 10, GREEDY))
    assert alone._read[0] == 304  # all but the last new token
    alone.drop(0)
    assert answers(alone, [(more, 10, GREEDY)]) == expected
    alone.add(Request([*ids[: REUSED - 1], 60, 60], 1, GREEDY))
    assert alone._read[0] == 0  # too little to be worth it
    alone.drop(0)
    answers(alone, [(more, 1, GREEDY)])
    other = [*more[:100], (more[100] + 1) % 61, *prompt(20, seed=4)]  # is the same up to there
    expected = answers(make_engine(1), [(other, 10, GREEDY)])
    alone.add(Request(other, 10, GREEDY))
    assert alone._read[0] == 100
    alone.drop(0)
    assert answers(alone, [(other, 10, GREEDY)]) == expected


def test_latents_are_reused_for_their_owner_alone(alone):
    ids = prompt(300, seed=11)
    answers(alone, [(ids, 1, GREEDY)])
    for owner, read in (("a", 0), ("a", 299), ("b", 0), ("", 0)):
        alone.add(Request(ids, 1, GREEDY, owner=owner))
        assert alone._read[0] == read, owner
        while alone.free == 0:
            alone.step()


def test_a_request_gets_the_slot_that_has_read_most_of_it(together):
    first, second = prompt(100), prompt(101)
    answers(together, [([i], 1, GREEDY) for i in range(4)])
    answers(together, [(first, 1, GREEDY), (second, 1, GREEDY)])
    for ids, slot in ((second, 1), (first, 0), ([*second[:60], 1], 1), (prompt(50), 0)):
        assert together.add(Request(ids, 1, GREEDY)) == slot
        together.drop(slot)


def test_a_long_prompt_is_read_in_parts_between_which_others_get_their_tokens(together):
    short = together.add(Request(prompt(3), 300, GREEDY))
    together.step()
    long = together.add(Request(prompt(3 * engine.AT_ONCE + 9), 1, GREEDY))
    pieces = [together.step()]
    while long not in pieces[-1]:
        pieces.append(together.step())
    assert len(pieces) == 4 and all(piece[short].ids for piece in pieces)
    together.drop(short)


def test_a_dropped_request_frees_its_slot_and_leaves_the_others_alone(together):
    expected = answers(together, [(prompt(90), 30, SETTINGS[2])])
    gone = together.add(Request(prompt(256), 40, GREEDY))
    slot = together.add(Request(prompt(90), 30, SETTINGS[2]))
    got = list(together.step().get(slot, engine.Piece([], [], None)).ids)
    together.drop(gone)
    assert together.free == 3
    while together.free < 4:
        got += together.step().get(slot, engine.Piece([], [], None)).ids
    assert [got] == expected


def test_wrong_requests_are_refused_and_take_no_slot(together):
    for ids, most, logprobs, words in [
        ([], 5, 0, "at least one token"),
        (prompt(CONTEXT), 5, 0, f"does not fit in a context of {CONTEXT}"),
        ([1, 61], 5, 0, "between 0 and 60"),
        ([1, -1], 5, 0, "between 0 and 60"),
        ([1], 0, 0, "max_new must be at least 1"),
        ([1], 1, 21, "between 0 and 20"),
    ]:
        with pytest.raises(UsageError, match=words):
            together.add(Request(ids, most, GREEDY, logprobs))
    assert together.free == 4
    slots = [together.add(Request([1], 1, GREEDY)) for _ in range(4)]
    with pytest.raises(UsageError, match="all slots are taken"):
        together.add(Request([1], 1, GREEDY))
    for slot in slots:
        together.drop(slot)


def test_the_cache_has_the_planned_size():
    e = make_engine(2)
    size = sum(x.nbytes for x in jax.tree.leaves(e._cache))
    room = next(iter(e._cache.values())).shape[2]
    assert room - (CONTEXT + CHUNKS[0]) < engine.decoder.BLOCK
    assert size == 2 * room * costs.kv_bytes_per_token(toy(), 4)["latent"]


@pytest.mark.parametrize("kind, most, tied", [("int8", 0.06, True), ("int8", 0.06, False), ("int4", 0.6, True)])
def test_quantized_weights_stay_close_and_are_smaller(kind, most, tied):
    c = toy(d=96, heads=6, rank=24, vocab=512, tied=tied)
    params = jax.device_put(make(c), sharding.whole(sharding.one_device()))
    exact = engine.decoder.prepare(c, params, "fp32", jnp.float32)
    packed = engine.decoder.prepare(c, params, kind, jnp.float32)
    ids = np.random.default_rng(0).integers(0, 512, (2, 40))

    def logits(w):
        window = engine.decoder.empty_window(c, 2, 40, jnp.float32)
        cache = engine.decoder.empty_cache(c, 2, 128, jnp.float32)
        return engine.decoder.logits(
            w, engine.decoder.read(c, w, cache, window, ids, engine.decoder.Place(jnp.zeros(2, int)))[0][:, -1]
        )

    close, far = np.asarray(jit(logits)(packed)), np.asarray(jit(logits)(exact))
    assert 0 < np.sqrt(np.mean((close - far) ** 2)) < most * far.std()
    assert quantize.bytes_of(packed) < quantize.bytes_of(exact) * {"int8": 0.45, "int4": 0.4}[kind]
