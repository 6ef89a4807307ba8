"""The package from Python: train, load, generate, chat, stream and evaluate, and one exception for each mistake."""

import importlib.metadata
import os
import pathlib
import signal
import threading
import tomllib

import jax
import numpy as np
import pytest
import runs

import lowrank_jax
from configs import default
from lowrank_jax import evaluate, main
from lowrank_jax.config import RunConfig, RunFailure, UsageError
from lowrank_jax.data import chat
from lowrank_jax.inference.engine import Piece
from lowrank_jax.machine import faults, interrupt, startup
from lowrank_jax.training import step
from lowrank_jax.training.plan import Progress
from lowrank_jax.training.trained import Model, Trained

ROOT = pathlib.Path(__file__).parents[1]
QUESTION = [{"role": "user", "content": "Who sat?"}]


@pytest.fixture(scope="module")
def model(make, tok):
    """A model with random weights, as of a run."""
    config = make.run_config(model__vocab=tok.vocab_size, pretrain__block=64)
    return Model(Trained(config, tok, step.init_params(config), Progress(step=7)), "runs/x")


def test_every_exported_name_exists_and_the_types_travel():
    names = {}
    exec("from lowrank_jax import *", names)
    assert {*lowrank_jax.__all__} <= names.keys() and {*lowrank_jax.__all__} <= {*dir(lowrank_jax)}
    assert names["UsageError"] is UsageError and names["RunConfig"] is RunConfig and names["Model"] is Model
    assert (ROOT / "lowrank_jax" / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        lowrank_jax.trian  # noqa: B018


def test_the_version_is_the_clones_or_the_installed_packages(tmp_path, monkeypatch):
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert lowrank_jax.__version__ == stated
    monkeypatch.setattr(lowrank_jax, "__file__", str(tmp_path / "lowrank_jax" / "__init__.py"))
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\nversion = "3"\n')
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"lowrank_jax": "9.8"}[name])
    assert lowrank_jax._version() == "9.8"

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert lowrank_jax._version() == "0+unknown"


def test_a_repr_says_what_the_model_is(model):
    count = sum(x.size for x in jax.tree.leaves(model.params))
    sizes = "2 layers of width 16, rank 4, vocabulary 521, trained at lengths up to 64"
    assert repr(model) == f"Model({count:,} parameters, {sizes}, step 7 of runs/x)"


def test_texts_ids_and_messages_get_what_the_ids_get(model, tok):
    ids = model.prompt("The cat")
    both = model.generate(["a", "The cat"], 12, seed=2)  # first: later calls need no other engine
    (new,) = model.generate([ids], 12, seed=3)
    assert model.generate(ids, 12, seed=3) == model.generate(np.array(ids), 12, seed=3) == new
    text = model.generate("The cat", 12, seed=3)
    assert text == tok.decode(new) and "".join(model.stream("The cat", 12, seed=3)) == text
    assert both == [model.generate("a", 12, seed=2), text]
    pieces = list(model.stream(ids, 12, seed=3))
    assert [i for piece in pieces for i in piece.ids] == new and isinstance(pieces[0], Piece)
    question = [tok.bos, *chat.encode(tok, QUESTION, prompt=True)[0]]
    answer = tok.decode(model.generate(question, 12, preset="balanced"))
    assert (
        model.chat(QUESTION, 12, preset="balanced") == model.chat("Who sat?", 12, preset="balanced") == answer.strip()
    )
    assert "".join(model.stream(QUESTION, 12, preset="balanced")) == answer
    assert model.generate([QUESTION, QUESTION], 12, preset="balanced")[0] == answer
    assert model.chat([{"role": "human", "content": "Who sat?"}], 12, preset="balanced") == answer.strip()


def test_a_text_ends_before_a_stop_string_and_a_bias_may_be_a_dict(model, tok):
    (letter,) = tok.encode("e")[-1:]
    assert model.generate("a", 20, logit_bias={letter: 100}) == "e" * 20
    assert model.generate(["a", "a"], 20, stop=["eee", "never"], logit_bias={letter: 100}) == ["", ""]
    assert "".join(model.stream("a", 20, stop="eee", logit_bias={letter: 100})) == ""
    assert model.engine(1, 1).free == model.engine(1, 1).slots


MISTAKES = {
    "unknown setting temprature; did you mean temperature?": lambda m: m.generate("a", temprature=1),
    "unknown setting max_new_tokens; did you mean max_new?": lambda m: m.stream("a", max_new_tokens=1),
    "unknown setting qqq; use temperature, ": lambda m: m.chat("a", qqq=1),
    "preset='balancd' must be one of balanced": lambda m: m.generate("a", preset="balancd"),
    "preset=5 must be one of det, balanced, creative": lambda m: m.generate("a", preset=5),
    "temperature='hot' must be a number": lambda m: m.generate("a", temperature="hot"),
    "seed='x' must be a whole number": lambda m: m.generate("a", seed="x"),
    "seed=-1 must be a whole number from 0": lambda m: m.chat("a", seed=-1),
    "prompts mix texts and token ids": lambda m: m.generate(["a", [5]]),
    "prompts=5 must be texts or lists of token ids": lambda m: m.generate(5),
    "prompts=.*`chat` takes messages": lambda m: m.generate(QUESTION),
    r"prompts\[1\]=None must be a text": lambda m: m.generate(["a", None]),
    r"prompts\[0\]=5.5 must be a text": lambda m: m.generate([5.5, 6]),
    r"prompt=\[\] must be a text or a list of token ids": lambda m: m.stream([]),
    "token ids must be between 0 and 520": lambda m: m.generate([521]),
    "max_new must be at least 1 and a whole number, not '5'": lambda m: m.generate("a", "5"),
    "max_new must be at least 1 and a whole number, not 0": lambda m: m.stream("a", 0),
    "max_new must be at most 1,000,000": lambda m: m.generate("a", 10**9),
    "logprobs must be between 0 and 20, not 'all'": lambda m: m.stream([5], logprobs="all"),
    "logprobs come with ids": lambda m: m.stream("a", logprobs=2),
    "stop strings end texts": lambda m: m.generate([5], stop="x"),
    "stop strings end texts; a prompt of ids": lambda m: m.stream([5], stop="x"),
    "stop=5 must be a text or a list of texts": lambda m: m.generate("a", stop=5),
    r"stop=\[''\] must be": lambda m: m.chat("a", stop=[""]),
    r"messages=\[\] must be a list such as": lambda m: m.chat([]),
    "messages=5 must be a list such as": lambda m: m.chat(5),
    r"messages\[0\] has the role 'usr'; use user": lambda m: m.chat([{"role": "usr", "content": "a"}]),
    r"messages\[0\] has the role None; use": lambda m: m.chat([{"content": "a"}]),
    r"messages\[0\] has the content None, which must be text": lambda m: m.chat([{"role": "user"}]),
    "the last message is the assistant's": lambda m: m.chat([*QUESTION, {"role": "assistant", "content": "b"}]),
    "lengths and tokens must be above 0": lambda m: m.evaluate(lengths=[0]),
    "lengths and tokens must be whole numbers, not '16,64'": lambda m: m.evaluate("16,64"),
    "lengths=1000000000000 must be at most": lambda m: m.evaluate([64, 10**12]),
    "weights must be one of fp32, .*, not 'int3'": lambda m: m.evaluate(weights="int3"),
    "data=5 must be text such as": lambda m: m.evaluate(data=5),
    "no-such-folder": lambda m: m.evaluate(data="text:no-such-folder/*.txt"),
    "folder=5 must be a path": lambda m: lowrank_jax.load(5),
    "folder=no-such-folder holds no run": lambda m: lowrank_jax.load("no-such-folder"),
    "folder=ftp://host/run is no local path": lambda m: lowrank_jax.load("ftp://host/run"),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_one_line_that_names_it(model, message):
    with pytest.raises(UsageError, match=message) as e:
        MISTAKES[message](model)
    assert "\n" not in str(e.value)


CONFIG = "configs/quickstart.py"
WRONG_TRAININGS = {
    "config=5 must be a RunConfig, a ConfigDict, a dict or a file's name": (5, {}),
    "config key config.seed is missing": ({}, {}),
    "--config=configs/none.py: no such file": ("configs/none.py", {}),
    "config.pretrain.stps.*steps": (default.get_config(), {"pretrain.stps": 3}),
    "unknown config key config.seed.x: seed is no group": (default.get_config(), {"seed.x": 3}),
    "config.model.heads=7 does not divide": (CONFIG, {"model.heads": 7}),
    "changes=5 must be a dict of dotted keys": (CONFIG, 5),
    "changes=.* must be a dict of dotted keys": (CONFIG, {5: 5}),
}


@pytest.mark.parametrize("message", WRONG_TRAININGS)
def test_a_training_that_cannot_work_is_one_line_and_leaves_no_folder(tmp_path, message):
    with pytest.raises(UsageError, match=message) as e:
        lowrank_jax.train(WRONG_TRAININGS[message][0], tmp_path / "run", WRONG_TRAININGS[message][1])
    assert "\n" not in str(e.value) and not os.listdir(tmp_path)
    with pytest.raises(UsageError, match="workdir=5 must be a path"):
        lowrank_jax.train(CONFIG, 5)


def test_a_config_is_the_same_in_every_form(tmp_path):
    changes = {"pretrain.sources": [{"spec": "text:a.txt", "weight": 0.5}, "text:b.txt"], "model.tied": False}
    changes |= {"model.rank_split": (1, 1, 2, 2), "pretrain.grow_plan": [128, 256], "pretrain.lr": 1e-3}
    config = default.get_config()
    expected = main._read(config, changes)
    assert expected.pretrain.sources[0].spec == "text:a.txt" and not expected.model.tied
    forms = [config.to_dict(), main._read(config, {}), "configs/default.py", pathlib.Path("configs/default.py")]
    assert [main._read(form, changes) for form in forms] == [expected] * 4
    assert config == default.get_config()  # not changed in place


def test_compiled_programs_are_kept_during_a_training_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(startup, "cache_folder", lambda: str(tmp_path))
    usual = jax.config.jax_compilation_cache_dir
    with main._compilation_cache():  # the caller has chosen a folder
        assert jax.config.jax_compilation_cache_dir == usual
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        before = jax.config.values
        with main._compilation_cache():
            assert jax.config.jax_compilation_cache_dir.startswith(str(tmp_path))
        assert jax.config.values == before
    finally:
        jax.config.update("jax_compilation_cache_dir", usual)


def test_a_second_ctrl_c_is_an_exception_where_the_process_may_not_quit():
    with interrupt.signals(may_quit=False) as received:
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_thread_that_gets_no_signals_can_train():
    seen = []

    def enter() -> None:
        with interrupt.signals(may_quit=False) as received:
            seen.append(list(received))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [[]]


def test_training_in_a_process_stops_resumes_and_leaves_it_as_it_was(data, reference, tmp_path, monkeypatch, capsys):
    """SIGTERM goes to the caller's own handler and Ctrl-C raises, both after a save; the end is that of the command."""
    changes = runs.TINY | {"sft.sources": f"json:{data}/chats.jsonl"}
    changes |= {"pretrain.sources": f"text:{data}/*.txt,json:{data}/notes.jsonl"}
    train, seen = (lambda: lowrank_jax.train(CONFIG, tmp_path / "run", changes)), []
    monkeypatch.setattr(faults, "strike", lambda *place: place in due and signal.raise_signal(due.pop(place)))
    old = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    settings = lambda: ([signal.getsignal(n) for n in numbers], dict(os.environ), os.getcwd(), jax.config.values)
    before = settings()
    try:
        due = {("step", 3): signal.SIGTERM}
        with pytest.raises(RunFailure, match="SIGTERM: .* is saved; train it again to go on"):
            train()
        assert seen == [signal.SIGTERM] and settings() == before
        due = {("step", 7): signal.SIGINT}
        with pytest.raises(KeyboardInterrupt):
            train()
        assert settings() == before
        trained = train()
        assert settings() == before
    finally:
        signal.signal(signal.SIGTERM, old)
    assert trained.step == runs.STEPS and f"step {runs.STEPS} of {tmp_path / 'run'}" in repr(trained)
    preempted = [e["step"] for e in runs.rows(tmp_path / "run", "events.jsonl") if e["event"] == "preempt"]
    assert [preempted[0] in (2, 3), preempted[1] in (6, 7)] == [True, True]  # a batch that is ready is still trained
    finish, expected = (runs.rows(folder, "events.jsonl")[-1] for folder in (tmp_path / "run", reference))
    assert [finish[key] for key in ("data_sha256", "tokens")] == [expected[key] for key in ("data_sha256", "tokens")]
    loss = lambda folder: runs.rows(folder, "metrics.jsonl")[-1]["eval_loss"]
    assert loss(tmp_path / "run") == pytest.approx(loss(reference), rel=1e-3)
    command = evaluate.command([f"--workdir={tmp_path / 'run'}", "--lengths=16,64"])["results"]
    assert trained.evaluate([16, 64]) == command and trained.evaluate() == trained.evaluate([64])[0]
    assert "Traceback" not in capsys.readouterr().err
