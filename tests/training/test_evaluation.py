"""Evaluation: its numbers agree with NumPy, and JAX reuses a program that was compiled early."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax import monitoring

from configs import default
from lowrank_jax.config import RunConfig
from lowrank_jax.data import chat
from lowrank_jax.machine import sharding
from lowrank_jax.training import evaluation, step
from lowrank_jax.training.plan import Progress
from lowrank_jax.training.trained import Trained

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled():
    """The compilations since the test began, as JAX's events."""
    events = []
    note = lambda name, seconds, **_: events.append(name) if name == COMPILED else None
    monitoring.register_event_duration_secs_listener(note)
    yield events
    monitoring.unregister_event_duration_listener(note)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    values = default.get_config()
    values.model.update(d=32, layers=2, heads=2, rank=4, scan=False)
    return dataclasses.replace(RunConfig.from_dict(values.to_dict()).with_vocab(48), precision="fp32")


@pytest.fixture(scope="module")
def params(config) -> dict:
    """Parameters of a new model, whose blocks add nothing yet."""
    return step.init_params(config, sharding.one_device())


def random_batch(seed: int, rows: int = 2, length: int = 24) -> dict:
    """Rows of two documents, with weight on about half of the targets."""
    draw = np.random.default_rng(seed)
    tokens, targets = draw.integers(0, 48, (2, rows, length)).astype(np.int32)
    segments = np.broadcast_to(1 + (np.arange(length) >= 10), (rows, length)).astype(np.int32)
    weights = draw.integers(0, 2, (rows, length)).astype(np.float32)
    return {"tokens": tokens, "targets": targets, "segments": segments, "weights": weights}


def scores(table: np.ndarray, batches: list[dict], byte_lengths: np.ndarray) -> list[tuple[float, int]]:
    """Return (nats, bytes) of every target with weight, for `params` with this table.

    Where blocks add nothing, a token's logits are its normalised row of the table times the table.
    """
    logits = table / np.sqrt((table**2).mean(1, keepdims=True) + 1e-6) @ table.T
    surprise = np.log(np.exp(logits).sum(1, keepdims=True)) - logits  # [token, target], in nats
    return [
        (surprise[token, target], byte_lengths[target])
        for batch in batches
        for token, target, weight in zip(*(batch[key].ravel() for key in ("tokens", "targets", "weights")))
        if weight
    ]


def test_loss_perplexity_and_bits_per_byte_are_the_definitions_in_numpy(config, params):
    batches, byte_lengths = [random_batch(0), random_batch(1)], np.arange(48) % 5
    scored = scores(np.asarray(params["embed"]["table"], np.float64), batches, byte_lengths)
    nats, size = (sum(values) for values in zip(*scored))
    result = evaluation.evaluate(config, params, batches, byte_lengths)
    assert result["tokens"] == len(scored) and 30 < len(scored) < 66
    assert result["loss"] == pytest.approx(nats / len(scored), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.e ** (nats / len(scored)), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_the_change_that_int8_makes_is_its_bits_per_byte_less_those_of_the_run(config, params):
    """In int8 a row's largest number is 127.5 steps; with a table of large numbers the loss falls by it."""
    batches, byte_lengths = [random_batch(0), random_batch(1)], np.arange(48) % 5
    table = 10 * np.asarray(params["embed"]["table"])
    steps = np.abs(table.astype(np.float64)).max(1, keepdims=True) / 127.5
    rounded = np.clip(np.round(table / steps), -127, 127) * steps
    nats, size = np.transpose([np.sum(scores(x, batches, byte_lengths), axis=0) for x in (table, rounded)])
    before, after = nats / math.log(2) / size
    params = params | {"embed": {"table": jax.device_put(table, params["embed"]["table"].sharding)}}
    result = evaluation.compare_weights(config, params, batches, byte_lengths, "int8")
    assert result["bits_per_byte"] == pytest.approx(after, rel=1e-5)
    assert after - before < -0.02 and result["change"] == pytest.approx(after - before, rel=0.01)


def test_a_document_is_scored_without_the_one_before_it_in_its_row(config, params):
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jax.device_put(0.3 * draw.standard_normal(x.shape, np.float32), x.sharding), params)
    batch = random_batch(0)
    batch["weights"] = (batch["segments"] == 2).astype(np.float32)
    loss_of = lambda tokens: evaluation.evaluate(config, params, [batch | {"tokens": tokens}], np.ones(48))["loss"]
    other_before, other_within = batch["tokens"].copy(), batch["tokens"].copy()
    other_before[:, 9] = (other_before[:, 9] + 1) % 48
    other_within[:, 10] = (other_within[:, 10] + 1) % 48
    assert loss_of(other_before) == pytest.approx(loss_of(batch["tokens"]), rel=1e-6)
    assert abs(loss_of(other_within) - loss_of(batch["tokens"])) > 1e-3


def test_rows_are_shared_out_anew_and_what_fills_the_last_batch_has_no_weight():
    whole = [random_batch(seed, rows=3) for seed in range(2)]
    for rows, of, shapes in ((4, 1, [4, 4]), (5, 2, [4, 4]), (3, 4, [4, 4]), (100, 1, [6]), (2, 1, [2, 2, 2])):
        parts = evaluation.split(whole, rows, of)
        assert [len(part["tokens"]) for part in parts] == shapes
        for key in whole[0]:
            before, after = (np.concatenate([batch[key] for batch in some]) for some in (whole, parts))
            assert np.array_equal(after[:6], before) and not after[6:].any()


@pytest.mark.parametrize("tokens, batches", [(8192, 1), (16384, 2), (16385, 3)])
def test_batches_end_as_soon_as_they_have_the_tokens(tokens, batches):
    """A batch of rows of 1024 has 8 of them, 8192 tokens, and the stream has no end."""

    class Endless:
        def next(self, rows: int, length: int) -> dict:
            return random_batch(0, rows, length)

    cut = evaluation.batches_of(Endless(), 1024, tokens)
    assert [batch["tokens"].shape for batch in cut] == [(8, 1024)] * batches


def test_only_the_first_tokens_of_the_stream_keep_their_weight():
    batches = [random_batch(seed) for seed in range(2)]
    before = np.concatenate([batch["weights"].ravel() for batch in batches])
    evaluation.ignore_after(batches, 55)
    after = np.concatenate([batch["weights"].ravel() for batch in batches])
    assert np.array_equal(after[:55], before[:55]) and before[55:].any() and not after[55:].any()


def test_evaluation_reuses_the_program_that_was_compiled_for_its_shape(config, params, compiled):
    def nats(rows: int, length: int) -> float:
        tokens = np.arange(rows * length).reshape(rows, length).astype(np.int32) % 48
        batch = {"tokens": tokens, "targets": tokens, "segments": np.ones_like(tokens)}
        batch["weights"] = np.ones(tokens.shape, np.float32)
        return evaluation.evaluate(config, params, [batch], np.ones(48))["loss"]

    nats(2, 24)  # everything else that it needs is compiled now
    evaluation.compile_for(config, sharding.one_device(), 4, 24)
    compiled.clear()
    assert np.isfinite(nats(4, 24))
    assert not compiled
    nats(3, 24)
    assert compiled


def test_chats_are_scored_on_the_assistants_tokens_alone_and_texts_on_all(make, tok, tmp_path):
    chats = make.write_jsonl(tmp_path / "chats.jsonl", [{"messages": make.chat(2, i)} for i in range(8)])
    texts = make.write_jsonl(tmp_path / "texts.jsonl", [{"text": make.prose(60, i)} for i in range(8)])
    config = make.run_config(model__vocab=tok.vocab_size, pretrain__block=64)
    run = Trained(config, tok, step.init_params(config, sharding.one_device()), Progress())
    (both,) = evaluation.of_run(run, [64], f"{texts},{chats}", 64)
    (alone,) = evaluation.of_run(run, [64], chats, 64)
    said = [chat.encode(tok, make.chat(2, i))[1] for i in range(8)]
    assert both["scored"] == "text" and both["tokens"] == 64
    assert alone["scored"] == "chats" and alone == both["chats"] and 0 < alone["tokens"] <= sum(map(sum, said))
