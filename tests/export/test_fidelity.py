"""Changes by exports in lower precision, measured on held-out text."""

import dataclasses

import exports
import jax
import numpy as np
import pytest

from lowrank_jax.config import RunFailure
from lowrank_jax.data import stream
from lowrank_jax.export import verify
from lowrank_jax.machine import sharding
from lowrank_jax.training import evaluation


@pytest.fixture(scope="module")
def model(make, tok, tmp_path_factory):
    """A model whose held-out text is one document, so that nothing is packed."""
    trained = exports.trained(make, tok)
    (tmp_path_factory.mktemp("texts") / "a.txt").write_text(make.prose(4000))
    folder = tmp_path_factory.getbasetemp()
    phase = dataclasses.replace(
        make.phase(f"text:{folder}/texts*/a.txt", eval_fraction=0.5), block=48, auto_grow=False, tokens_per_step=480
    )
    return trained._replace(config=dataclasses.replace(trained.config, pretrain=phase))


def logits(model, tokens: np.ndarray) -> np.ndarray:
    return verify.logits(model, tokens, np.arange(len(tokens)))


def test_the_same_logits_change_nothing_and_have_the_bits_of_evaluate(model):
    shifted = lambda tokens: logits(model, tokens) + np.arange(len(tokens))[:, None]
    measured = verify.measure(model, shifted, 480)
    assert measured["measured_on"] == "held-out text" and measured["measured_tokens"] == 480
    assert (
        measured["max_abs_err"] < 1e-4 and abs(measured["kl"]) < 1e-6 and abs(measured["bits_per_byte_change"]) < 1e-6
    )
    p = dataclasses.replace(model.config.pretrain, eval_tokens=480)
    batches = evaluation.batches_of(stream.open_held_out(p, model.tokenizer, model.config.seed, False), 48, 480)
    params = jax.device_put(model.params, sharding.whole(sharding.one_device()))
    expected = evaluation.evaluate(model.config, params, batches, model.tokenizer.byte_lengths())
    assert measured["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], abs=1e-5)


def test_measures_follow_their_formulas(model):
    seen = []

    def other(tokens):
        seen.append(tokens)
        return 0.5 * logits(model, tokens)

    measured = verify.measure(model, other, 96)
    tokens = np.concatenate(seen)
    p, q = (jax.nn.softmax(np.concatenate([f * logits(model, row) for row in seen]), axis=-1) for f in (1, 0.5))
    assert measured["measured_tokens"] == len(tokens) == 96
    assert measured["kl"] == pytest.approx(float((p * np.log(p / q)).sum(-1).mean()), rel=1e-4)
    assert measured["max_abs_err"] == pytest.approx(float(np.abs(np.log(p / q)).max()), rel=1e-4)
    before = measured["bits_per_byte"] - measured["bits_per_byte_change"]
    assert before == pytest.approx(verify.measure(model, lambda row: logits(model, row), 96)["bits_per_byte"])
    assert f"({measured['bits_per_byte_change']:+.4f}) on 96 tokens of held-out text" in verify.describe(measured)


def test_text_of_a_package_replaces_missing_data(model, make):
    gone = make.phase("text:/nowhere/*.txt", block=48, tokens_per_step=480)
    model = model._replace(config=dataclasses.replace(model.config, pretrain=gone))
    measured = verify.measure(model, lambda row: logits(model, row), 96)
    assert measured["measured_on"] == "builtin:quickstart" and measured["measured_tokens"] == 96


def test_another_model_is_a_failure(model):
    with pytest.raises(RunFailure, match="is another model"):
        verify.measure(model, lambda row: -30 * logits(model, row), 96)


def test_logits_that_are_not_finite_are_a_failure(model):
    with pytest.raises(RunFailure, match="finite"):
        verify.measure(model, lambda row: np.where(np.arange(521) == 7, np.nan, logits(model, row)), 96)
