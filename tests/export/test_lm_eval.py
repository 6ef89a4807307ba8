"""lm-evaluation-harness on the Hugging Face export: tasks of local text, and our log-likelihoods."""

import json

import exports
import jax
import numpy as np
import pytest
from jax.nn import log_softmax
from lm_tasks import CHOICE

from lowrank_jax.export import hf, verify
from lowrank_jax.machine import sharding
from lowrank_jax.training import evaluation

pytestmark = pytest.mark.slow

ROLLING = """task: heldout
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""


def ours(model, ids: list[int], first: int) -> float:
    """Return the log-likelihood of ids[first:] after the ids before them."""
    logits = verify.logits(model, np.array(ids[:-1]), np.arange(len(ids) - 1))
    log_likelihoods = np.asarray(log_softmax(logits, axis=-1), np.float64)[np.arange(len(ids) - 1), ids[1:]]
    return float(log_likelihoods[first - 1 :].sum())


@pytest.fixture(scope="module")
def model(make, tok):
    trained = exports.trained(make, tok)
    return trained._replace(params=jax.device_put(trained.params, sharding.whole(sharding.one_device())))


@pytest.fixture(scope="module")
def judged(model, make, tmp_path_factory):
    """(texts, questions, answers of the harness by task)."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("lm_eval")
    texts = [{"text": make.prose(5 + i, i)} for i in range(6)]
    texts += [{"text": "\n na\u00efve \U0001f600  <|im_end|x\n"}]
    choices = [f" {make.prose(2, i)}" for i in range(9)]
    questions = [{"question": make.prose(4, i), "choices": choices[i : i + 3], "answer": i % 3} for i in range(5)]
    for name, template, rows in (("heldout", ROLLING, texts), ("choice", CHOICE, questions)):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(template.format(data=data))
    path = hf.write(model, str(folder / "hf"))
    answers = {}
    for name, bos in (("heldout", False), ("choice", True)):
        net = HFLM(pretrained=path, trust_remote_code=True, add_bos_token=bos, device="cpu", batch_size=3)
        tasks = TaskManager(include_path=str(folder), include_defaults=False)
        answers[name] = lm_eval.simple_evaluate(
            net, tasks=[name], task_manager=tasks, log_samples=True, bootstrap_iters=0
        )
    return texts, questions, answers


def test_texts_have_our_log_likelihoods_and_bits_per_byte(model, judged):
    texts, _, answers = judged
    tok, samples = model.tokenizer, answers["heldout"]["samples"]["heldout"]
    said = {sample["doc"]["text"]: float(np.ravel(sample["filtered_resps"])[0]) for sample in samples}
    rows = [[tok.bos, *tok.encode(text["text"])] for text in texts]
    for text, row in zip(texts, rows):
        assert said[text["text"]] == pytest.approx(ours(model, row, 1), abs=1e-3)
    length = max(map(len, rows)) - 1
    filled = lambda of: np.array([[*of(row), *[0] * (length - len(row) + 1)] for row in rows])
    batch = {
        "tokens": filled(lambda row: row[:-1]),
        "targets": filled(lambda row: row[1:]),
        "segments": filled(lambda row: [1] * (len(row) - 1)),
        "weights": filled(lambda row: [1.0] * (len(row) - 1)),
    }
    measured = evaluation.evaluate(model.config, model.params, [batch], tok.byte_lengths())
    reported = answers["heldout"]["results"]["heldout"]["bits_per_byte,none"]
    assert reported == pytest.approx(measured["bits_per_byte"], abs=1e-4)


def test_answers_have_our_log_likelihoods(model, judged):
    _, questions, answers = judged
    tok, samples = model.tokenizer, answers["choice"]["samples"]["choice"]
    right = 0
    for row in questions:
        sample = next(s for s in samples if s["doc"]["question"] == row["question"])
        prompt = [tok.bos, *tok.encode(row["question"])]
        expected = []
        for choice in row["choices"]:
            whole = [tok.bos, *tok.encode(row["question"] + choice)]
            assert whole[: len(prompt)] == prompt
            expected.append(ours(model, whole, len(prompt)))
        said = [float(np.ravel(response)[0]) for response in sample["filtered_resps"]]
        assert said == pytest.approx(expected, abs=1e-3)
        right += int(np.argmax(expected)) == row["answer"]
    assert answers["choice"]["results"]["choice"]["acc,none"] == pytest.approx(right / len(questions))
