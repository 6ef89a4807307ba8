"""What exports of lower precision change, measured on held-out text."""

import dataclasses

import exports
import jax
import numpy as np
import pytest

from lowrank_jax import evaluate
from lowrank_jax.config import RunFailure
from lowrank_jax.export import fidelity, verify
from lowrank_jax.machine import sharding


@pytest.fixture(scope="module")
def model(make, tok, tmp_path_factory):
    """A model whose held-out text is one document, so that nothing is packed."""
    found = exports.trained(make, tok)
    (tmp_path_factory.mktemp("texts") / "a.txt").write_text(make.prose(4000))
    folder = tmp_path_factory.getbasetemp()
    phase = dataclasses.replace(
        make.phase(f"text:{folder}/texts*/a.txt", eval_fraction=0.5), block=48, auto_grow=False, tokens_per_step=480
    )
    return found._replace(config=dataclasses.replace(found.config, pretrain=phase))


def logits(model, tokens: np.ndarray) -> np.ndarray:
    return verify.logits(model, tokens, np.arange(len(tokens)))


def test_the_same_logits_change_nothing_and_have_the_bits_of_evaluate(model):
    shifted = lambda tokens: logits(model, tokens) + np.arange(len(tokens))[:, None]
    found = fidelity.measure(model, shifted, 480)
    assert found["measured_on"] == "held-out text" and found["measured_tokens"] == 480
    assert found["max_abs_err"] < 1e-4 and abs(found["kl"]) < 1e-6 and abs(found["bits_per_byte_change"]) < 1e-6
    p = dataclasses.replace(model.config.pretrain, eval_tokens=480)
    batches = evaluate.held_out(p, model.tokenizer, model.config.seed, False, 48, lambda *_, **__: None)
    params = jax.device_put(model.params, sharding.whole(sharding.one_device()))
    expected = evaluate.evaluate(model.config, params, batches, model.tokenizer.byte_lengths())
    assert found["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], abs=1e-5)


def test_what_differs_is_measured_as_the_formulas_say(model):
    seen = []

    def other(tokens):
        seen.append(tokens)
        return 0.5 * logits(model, tokens)

    found = fidelity.measure(model, other, 96)
    tokens = np.concatenate(seen)
    p, q = (jax.nn.softmax(np.concatenate([f * logits(model, row) for row in seen]), axis=-1) for f in (1, 0.5))
    assert found["measured_tokens"] == len(tokens) == 96
    assert found["kl"] == pytest.approx(float((p * np.log(p / q)).sum(-1).mean()), rel=1e-4)
    assert found["max_abs_err"] == pytest.approx(float(np.abs(np.log(p / q)).max()), rel=1e-4)
    before = found["bits_per_byte"] - found["bits_per_byte_change"]
    assert before == pytest.approx(fidelity.measure(model, lambda row: logits(model, row), 96)["bits_per_byte"])
    assert f"({found['bits_per_byte_change']:+.4f}) on 96 tokens of held-out text" in fidelity.describe(found)


def test_data_that_went_away_are_replaced_by_what_packages_bring(model, make):
    gone = make.phase("text:/nowhere/*.txt", block=48, tokens_per_step=480)
    model = model._replace(config=dataclasses.replace(model.config, pretrain=gone))
    found = fidelity.measure(model, lambda row: logits(model, row), 96)
    assert found["measured_on"] == "builtin:quickstart" and found["measured_tokens"] == 96


def test_another_model_is_a_failure(model):
    with pytest.raises(RunFailure, match="not the model any more"):
        fidelity.measure(model, lambda row: -30 * logits(model, row), 96)


def test_what_is_no_number_is_a_failure(model):
    with pytest.raises(RunFailure, match="finite"):
        fidelity.measure(model, lambda row: np.where(np.arange(521) == 7, np.nan, logits(model, row)), 96)
