"""Tasks of lm-evaluation-harness: the model's own log-likelihoods, offline tasks, and one line for what is missing."""

import importlib.util
import json
import types

import jax
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_tasks import CHOICE

from lowrank_jax import evaluate
from lowrank_jax.config import UsageError
from lowrank_jax.inference.session import Model
from lowrank_jax.machine import sharding
from lowrank_jax.machine.interrupt import Interrupted
from lowrank_jax.training import harness, step, tasks

LENGTH = 64


@pytest.fixture(scope="module")
def model(make, tok):
    config = make.run_config(model__vocab=tok.vocab_size, pretrain__block=LENGTH)
    params, draw = step.init_params(config, sharding.one_device()), np.random.default_rng(0)
    noise = lambda x: jax.device_put(0.3 * draw.standard_normal(x.shape, np.float32), x.sharding)
    return Model(config, tok, jax.tree.map(noise, params))


@pytest.fixture(scope="module")
def choices(make):
    return [[f" {make.prose(2, 3 * i + k)}" for k in range(3)] for i in range(5)]


@pytest.fixture(scope="module")
def task(make, choices, tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    rows = [{"question": make.prose(4, i), "choices": of, "answer": i % 3} for i, of in enumerate(choices)]
    make.write_jsonl(folder / "choice.jsonl", rows)
    (folder / "choice.yaml").write_text(CHOICE.format(data=folder / "choice.jsonl"))
    return folder / "choice.yaml"


def forward(model, ids: list[int], first: int) -> tuple[float, bool]:
    """Return (log-likelihood of ids[first:], whether each of them is the likeliest) of the model's own forward pass."""
    logits = np.asarray(jax.nn.log_softmax(model.logits([ids[:-1]])[0]), np.float64)[first - 1 :]
    own = logits[np.arange(len(logits)), ids[first:]]
    return own.sum(), bool((logits.max(1) == own).all())


def asked(kind: str, *arguments) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_log_likelihoods_are_those_of_the_forward_pass(model, tok, make):
    """Also of an empty context, of one that ends in a space, of one that is cut, and of a batch of other lengths."""
    pairs = [(make.prose(4), " ba ce"), ("", make.prose(3)), ("Di fo ", "gu"), (make.prose(90), " ha"), ("x", "")]
    said = harness.Harness(model, LENGTH).loglikelihood(asked("loglikelihood", *pairs))
    for (context, target), (nats, is_greedy) in zip(pairs, said):
        before = [tok.bos, *tok.encode(context.rstrip())] if context else [tok.bos]
        ids = [tok.bos, *tok.encode(context + target)]
        assert ids[: len(before)] == before
        count, ids = len(ids) - len(before), ids[-LENGTH - 1 :]
        expected = forward(model, ids, len(ids) - count) if count else (0.0, True)
        assert nats == pytest.approx(expected[0], abs=1e-3) and is_greedy == expected[1]
    greedy = model.generate([tok.bos, 9], 4, temperature=0)
    assert harness.Harness(model, LENGTH)._score([([tok.bos, 9], greedy)])[0][1]


def test_a_long_text_is_scored_in_windows_and_every_token_once(model, tok, make):
    texts = [make.prose(5), make.prose(200, 1), ""]
    said = harness.Harness(model, LENGTH).loglikelihood_rolling(asked("loglikelihood_rolling", *zip(texts)))
    for text, nats in zip(texts, said):
        ids, expected, done = [tok.bos, *tok.encode(text)], 0.0, 1
        while done < len(ids):
            stop = min(done + LENGTH, len(ids))
            window = ids[max(stop - LENGTH - 1, 0) : stop]
            expected += forward(model, window, len(window) - (stop - done))[0]
            done = stop
        assert nats == pytest.approx(expected, abs=1e-2)


def test_generated_answers_are_those_of_the_engine(model, tok, make):
    options = {"until": [".", ""], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    prompts = [make.prose(3, i) for i in range(3)] + [make.prose(90)]
    said = harness.Harness(model, LENGTH).generate_until(asked("generate_until", *((p, options) for p in prompts)))
    assert said[:3] == model.generate(prompts[:3], 12, stop=".", temperature=0)
    cut = model.generate([tok.bos, *tok.encode(prompts[3])][-(LENGTH - 12) :], 12, temperature=0)
    assert said[3] == tok.decode([i for i in cut if i != tok.eos]).split(".")[0]
    assert harness._settings({"do_sample": True, "temperature": 0.7, "until": "a"})[2].temperature == 0.7
    assert harness._settings({"temperature": 0.7, "do_sample": False})[2].temperature == 0


def test_a_task_of_ones_own_runs_offline(model, tok, task, choices, make):
    names = (str(task),)
    tasks.check(names, "--tasks")
    results = tasks.run(model, names, 0)
    right = 0
    for i, of in enumerate(choices):
        prompt = [tok.bos, *tok.encode(make.prose(4, i))]
        nats = [forward(model, [tok.bos, *tok.encode(make.prose(4, i) + c)], len(prompt))[0] for c in of]
        right += int(np.argmax(nats)) == i % 3
    assert results == {"choice": {"acc": pytest.approx(right / 5), "questions": 5}}
    assert tasks.run(model, names, 2)["choice"]["questions"] == 2
    assert "choice: acc" in tasks.describe(results)
    with pytest.raises(Interrupted):
        tasks.run(model, names, 0, stop=lambda: True)


def test_what_is_missing_is_one_line(task, tmp_path, monkeypatch):
    (tmp_path / "gone.yaml").write_text(CHOICE.format(data=tmp_path / "gone.jsonl"))
    (tmp_path / "bad.yaml").write_text("task: [")
    cases = {
        f"{tmp_path}/no.yaml": "task .*no.yaml: no such file",
        f"{tmp_path}/gone.yaml": "task .*gone.yaml cannot be loaded .FileNotFoundError: .*gone.jsonl",
        f"{tmp_path}/bad.yaml": "task .*bad.yaml cannot be loaded",
    }
    for name, message in cases.items():
        with pytest.raises(UsageError, match=f"^{message}") as e:
            tasks.load((name,))
        assert "\n" not in str(e.value)
    unknown = harness._refusal("hellaswagg", "hellaswagg", ["hellaswag", "arc"], KeyError("x"))
    assert unknown == "task hellaswagg is not one of lm-evaluation-harness; did you mean hellaswag?"
    refused = ConnectionError("Couldn't reach")
    assert "the data of task arc cannot be read (ConnectionError: Couldn't reach); connect" in harness._refusal(
        "arc", "arc", ["arc"], refused
    )
    with pytest.raises(UsageError, match="--tasks= names no task"):
        evaluate.command(["--workdir=x", "--tasks="])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs lm-evaluation-harness, which is not installed: pip install"):
        evaluate.command(["--workdir=x", "--tasks=hellaswag"])


def test_tasks_that_fail_in_training_are_logged_and_do_not_end_it(model, monkeypatch, tmp_path):
    from lowrank_jax.training import metrics, phase

    mesh = jax.tree.leaves(model.params)[0].sharding.mesh
    config = types.SimpleNamespace(tasks=("a",), task_limit=3, model=model.config.model, precision="fp32")
    run = types.SimpleNamespace(config=config, tokenizer=model.tokenizer, plan=types.SimpleNamespace(mesh=mesh))
    monkeypatch.setattr(phase.session, "Model", lambda *_: model)
    monkeypatch.setattr(tasks, "run", lambda *_: {}["x"])
    failed = phase.run_tasks(run, model.params)
    assert failed == "KeyError: 'x'"
    logged, meter = (
        [],
        types.SimpleNamespace(folder=str(tmp_path), trackers=[types.SimpleNamespace(log=lambda *x: logged.append(x))]),
    )
    for results in (failed, {"choice": {"acc": 0.5}}):
        metrics.Meter.log_tasks(meter, types.SimpleNamespace(phase="sft"), 8, results)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert events[0]["failed"] == failed and events[1]["results"] == {"choice": {"acc": 0.5}}
    assert logged == [(8, {}), (8, {"tasks/choice/acc": 0.5})]
