"""A run's folder: one process at a time, files that a kill leaves readable, and no run continued as another."""

import functools
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest
from conftest import run_config
from hypothesis import given
from hypothesis import strategies as st

from lowrank_jax.config import UsageError
from lowrank_jax.machine import faults
from lowrank_jax.training import run_folder

ROOT = pathlib.Path(__file__).parents[2]
HOLD = """
import sys
from lowrank_jax.training import run_folder
with run_folder.lock(sys.argv[1]):
    print('held', flush=True)
    input()
"""


# ------------------------------------------------------------------------------------------------------------ lock


def test_a_folder_that_another_process_trains_in_is_refused_until_that_process_ends(tmp_path):
    folder = str(tmp_path / "new" / "run")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=f"^another process is training in {folder}$"), run_folder.lock(folder):
            pass
        other.kill()
    with run_folder.lock(folder):
        assert os.path.isdir(folder)


def test_a_folder_is_held_once_even_within_a_process(tmp_path):
    with run_folder.lock(str(tmp_path)):
        with pytest.raises(UsageError), run_folder.lock(str(tmp_path)):
            pass
        with run_folder.lock(str(tmp_path / "other")):
            pass
    with run_folder.lock(str(tmp_path)):
        pass


def test_a_run_that_fails_lets_its_folder_go(tmp_path):
    with pytest.raises(KeyError), run_folder.lock(str(tmp_path)):
        raise KeyError
    with run_folder.lock(str(tmp_path)):
        pass


# ------------------------------------------------------------------------------------------------------------ rows


def test_rows_come_back_as_they_were_added(tmp_path):
    rows = [{"step": 1, "loss": math.inf, "name": "\u6f22\n}", "none": None, "list": [1, {"a": 2}]}, {}]
    for row in rows:
        run_folder.append(str(tmp_path), "metrics.jsonl", row)
    rows[0]["loss"] = None  # JSON has no infinity
    assert run_folder.read_rows(str(tmp_path), "metrics.jsonl") == rows
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


def test_a_run_without_rows_has_none(tmp_path):
    assert run_folder.read_rows(str(tmp_path), "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").touch()
    assert run_folder.read_rows(str(tmp_path), "metrics.jsonl") == []


@given(st.integers(1, 200))
def test_a_kill_in_the_middle_of_a_line_costs_that_line_alone(tmp_path_factory, cut):
    folder = tmp_path_factory.getbasetemp()
    rows = [{"event": "save", "step": i, "facts": {"deep": {"deeper": i}}} for i in range(4)]
    lines = [json.dumps(row) + "\n" for row in rows]
    cut = min(cut, len(lines[2]) - 2)  # at least the closing brace is missing
    (folder / "events.jsonl").write_text(lines[0] + lines[1] + lines[2][:cut])
    assert run_folder.read_rows(str(folder), "events.jsonl") == rows[:2]
    run_folder.append(str(folder), "events.jsonl", rows[3])
    assert run_folder.read_rows(str(folder), "events.jsonl") == [*rows[:2], rows[3]]


def test_an_event_carries_its_step_time_and_facts(tmp_path):
    run_folder.log_event(str(tmp_path), "save", 7, data_sha256="ab")
    [event] = run_folder.read_rows(str(tmp_path), "events.jsonl")
    assert event.pop("time") > 1.6e9
    assert event == {"event": "save", "step": 7, "data_sha256": "ab"}


LOGGED = [(0, "pretrain", "eval"), (1, "pretrain", "loss"), (2, "pretrain", "loss"), (2, "pretrain", "eval")]
LOGGED += [(2, "sft", "eval"), (3, "sft", "loss"), (4, "sft", "loss"), (4, "sft", "eval")]  # SFT starts after step 2


CUTS = [(0, 1), (1, 2), (2, 5), (3, 6), (4, 8)]


@pytest.mark.parametrize("step, kept", CUTS)
def test_rewinding_drops_exactly_what_is_about_to_be_logged_again(tmp_path, step, kept):
    rows = [{"step": step, "phase": phase, "what": what} for step, phase, what in LOGGED]
    for row in rows:
        run_folder.append(str(tmp_path), "metrics.jsonl", row)
    run_folder.log_event(str(tmp_path), "save", 4)
    run_folder.rewind_metrics(str(tmp_path), step)
    assert run_folder.read_rows(str(tmp_path), "metrics.jsonl") == rows[:kept]
    assert len(run_folder.read_rows(str(tmp_path), "events.jsonl")) == 1


def test_rewinding_a_new_folder_leaves_an_empty_file(tmp_path):
    run_folder.rewind_metrics(str(tmp_path), 0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_cut_line_is_gone_after_rewinding(tmp_path):
    run_folder.append(str(tmp_path), "metrics.jsonl", {"step": 1})
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 2, "lo')
    run_folder.rewind_metrics(str(tmp_path), 5)
    run_folder.append(str(tmp_path), "metrics.jsonl", {"step": 2})
    assert run_folder.read_rows(str(tmp_path), "metrics.jsonl") == [{"step": 1}, {"step": 2}]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


# ---------------------------------------------------------------------------------------------------------- config


def test_a_written_config_is_read_back_equal(make, tmp_path):
    sources = [{"spec": "text:a\u6f22.txt", "weight": 2.5}, "json:b"]
    growth = {"pretrain__auto_grow": True, "pretrain__grow_plan": "1024,2048"}
    config = make.run_config(pretrain__sources=sources, seed=3, model__tied=False, **growth)
    assert not run_folder.holds_run(str(tmp_path))
    run_folder.write_config(str(tmp_path), config)
    assert run_folder.holds_run(str(tmp_path))
    assert run_folder.read_config(str(tmp_path)) == config
    assert run_folder.differences(config, run_folder.read_config(str(tmp_path))) == []


def test_a_run_from_before_a_key_was_there_opens_as_it_was(make, tmp_path):
    values = make.run_config().to_dict()
    del values["model"]["tied"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert run_folder.read_config(str(tmp_path)) == make.run_config(model__tied=True)


def test_a_folder_without_a_run_is_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match=f"--workdir={tmp_path} holds no run"):
        run_folder.read_config(str(tmp_path))


def test_text_replaces_its_file_in_one_move(tmp_path):
    path = tmp_path / "report.html"
    for text in ("old", "new \u6f22"):
        run_folder.write_text(str(path), text)
        assert path.read_text(encoding="utf-8") == text
        assert os.listdir(tmp_path) == ["report.html"]


def test_a_write_that_fails_leaves_the_old_text(tmp_path):
    path = tmp_path / "config.json"
    run_folder.write_text(str(path), "old")
    with pytest.raises(UnicodeEncodeError):
        run_folder.write_text(str(path), "half of it" * 10_000 + "\ud800")
    assert path.read_text() == "old"


# Another value of every key: of those that make a run this run, and of those that may change when it goes on.
IDENTITY = {"seed": 1, "precision": "bf16", "optim__name": "adamw", "optim__ema": 0.9}
IDENTITY |= {"tokenizer__vocab_size": 999, "tokenizer__path": "a.model"}
IDENTITY |= {"model__vocab": 65, "model__d": 32, "model__layers": 3, "model__heads": 4, "model__rank": 5}
IDENTITY |= {"model__kv_heads": 1}
IDENTITY |= {"model__rank_split": (1.0, 1.0, 1.0, 1.0), "model__shared_kv": True, "model__latent_norm": False}
IDENTITY |= {"model__mlp": 40, "model__mlp_rank": 3, "model__embed_rank": 3, "model__tied": False}
IDENTITY |= {"pretrain__eval_fraction": 0.3, "sft__eval_fraction": 0.3}
FREE = {"memory_gb": 2.0, "init_from": "runs/other", "track": "wandb", "profile": 3, "tokenizer__train_bytes": 999}
FREE |= {"tasks": ("arc_easy",), "task_limit": 7}
FREE |= {"model__attention": "reference", "model__scan": False, "model__remat": True}
FREE |= {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
FREE |= {"optim__beta1": 0.9, "optim__beta2": 0.99, "optim__weight_decay": 0.0, "optim__clip": 2.0}
FREE |= {"optim__z_loss": 1e-4, "optim__label_smoothing": 0.1, "optim__skip_sigma": 0.0}
FREE |= {f"every__{key}": 7 for key in ("log", "eval", "save", "save_minutes", "keep", "fp8_check", "tasks")}
PHASE = {"sources": "text:other.txt", "steps": 7, "tokens_per_param": 3.0, "tokens_per_step": 98_304, "block": 512}
PHASE |= {"microbatch_tokens": 2048, "auto_grow": True, "grow_plan": "1024", "grow_every_steps": 7, "lr": 0.5}
PHASE |= {"lr_core": 0.5, "lr_head": 0.5, "freeze": "embed", "schedule": "cosine", "warmup": 0.1, "cooldown": 0.1}
PHASE |= {"lr_end": 0.1, "eval_tokens": 999, "max_skipped": 1, "readers": 4, "sample": "Once"}
FREE |= {f"{phase}__{key}": value for phase in ("pretrain", "sft") for key, value in PHASE.items()}


def with_plan(**changes):
    """A config of toy size that may grow."""
    return run_config(**{"pretrain__grow_plan": "1024,2048", "sft__grow_plan": "1024,2048"} | changes)


def keys_of(values: dict) -> list[str]:
    """Return the keys of a config, with __ between the parts of their paths."""
    parts = lambda key, value: [f"{key}__{k}" for k in keys_of(value)] if isinstance(value, dict) else [key]
    return [path for key, value in values.items() for path in parts(key, value)]


def test_every_key_either_makes_the_run_or_may_change():
    """Add a new key of the config to one of the lists above; keys of IDENTITY also to run_folder.IDENTITY."""
    assert sorted([*IDENTITY, *FREE]) == sorted(keys_of(with_plan().to_dict()))
    assert sorted(run_folder.IDENTITY) == sorted(key.replace("__", ".") for key in IDENTITY)


@pytest.mark.parametrize("key", IDENTITY)
def test_another_model_or_split_is_refused_by_the_key_that_differs(tmp_path, key):
    old, new = with_plan(), with_plan(**{key: IDENTITY[key]})
    name = key.replace("__", ".")
    was = functools.reduce(getattr, name.split("."), old)
    for before, after, line in ((old, new, f"{was}, not {IDENTITY[key]}"), (new, old, f"{IDENTITY[key]}, not {was}")):
        with pytest.raises(UsageError) as e:
            run_folder.check_same_run(str(tmp_path), before, after)
        assert str(e.value).startswith(f"{tmp_path} holds a different run: its config.{name} is {line}; use another ")


@pytest.mark.parametrize("key", FREE)
def test_a_change_that_a_resume_allows_is_accepted_and_listed(tmp_path, key):
    old, new = with_plan(), with_plan(**{key: FREE[key]})
    run_folder.check_same_run(str(tmp_path), old, new)
    assert [name for name, *_ in run_folder.differences(old, new)] == [key.replace("__", ".")]


# ---------------------------------------------------------------------------------------------------------- ledger


def test_the_newest_checkpoint_is_the_one_of_the_highest_step(tmp_path):
    assert run_folder.newest_checkpoint(str(tmp_path)) is None
    for name in ("9", "100", "20", "300.orbax-checkpoint-tmp"):
        for item in ("meta", "state"):
            (tmp_path / "checkpoints" / name / item).mkdir(parents=True)
    assert run_folder.newest_checkpoint(str(tmp_path)) == 100


def test_a_run_is_finished_where_it_last_ended_or_was_imported(tmp_path):
    folder = str(tmp_path)
    assert run_folder.finished_step(folder) is None
    for event, step, finished in (("save", 9, None), ("import", 0, 0), ("finish", 12, 12), ("save", 14, 12)):
        run_folder.log_event(folder, event, step)
        assert run_folder.finished_step(folder) == finished
    run_folder.log_event(folder, "finish", 20)
    assert run_folder.finished_step(folder) == 20


def test_evaluations_and_ended_phases_are_behind_the_run(tmp_path):
    folder = str(tmp_path)
    for row in ({"step": 4, "phase": "pretrain", "loss": 3.0}, {"step": 4, "phase": "pretrain", "split": "eval"}):
        run_folder.append(folder, "metrics.jsonl", row)
    run_folder.log_event(folder, "data", 5, phase="pretrain")
    run_folder.log_event(folder, "save", 5, phase="pretrain")
    assert run_folder.milestones(folder) == {("eval", "pretrain", 4), ("end", "pretrain", 5)}


# ---------------------------------------------------------------------------------------------------------- faults


def test_only_the_listed_faults_are_due(monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "kill@step=12, nan@step=30,term@step=3,,kill@save=2")
    faults.check()
    listed = {("kill", "step", 12), ("nan", "step", 30), ("term", "step", 3), ("kill", "save", 2)}
    tried = {(fault, place, n) for fault in ("kill", "term", "nan") for place in ("step", "save") for n in range(40)}
    assert {item for item in tried if faults.due(*item)} == listed


@pytest.mark.parametrize("value", ["", ","])
def test_without_faults_nothing_is_due(monkeypatch, value):
    monkeypatch.setenv(faults.VARIABLE, value)
    faults.check()
    assert not faults.due("kill", "step", 1)
    faults.strike("step", 1)


@pytest.mark.parametrize("item", ["oops", "kill@step", "kill@step=x", "kill@step=-1", "nan@save=1", "kill@read=1", " "])
def test_an_unknown_fault_is_refused_with_the_known_ones(monkeypatch, item):
    monkeypatch.setenv(faults.VARIABLE, f"kill@step=1,{item}")
    known = "fp8@step, io@read, kill@save, kill@step, nan@step, oom@step, term@eval, term@save, term@step"
    with pytest.raises(UsageError, match=f"unknown fault '{item}'; known: {known}"):
        faults.check()


@pytest.mark.parametrize("fault, status", [("kill@step=2", -9), ("term@step=2", -15), ("kill@save=2", 0)])
def test_a_fault_strikes_at_its_count_alone(fault, status):
    code = "from lowrank_jax.machine import faults\nfor n in (1, 2, 3): faults.strike('step', n); print(n, flush=True)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {faults.VARIABLE: fault}, capture_output=True, text=True)
    assert done.returncode == status and done.stdout.split() == (["1"] if status else ["1", "2", "3"])
