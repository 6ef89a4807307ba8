"""verify_resume passes a run that is killed, and names the difference where runs differ."""

import json
import math
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

import pytest
import runs

from lowrank_jax.config import RunFailure
from lowrank_jax.training import run_folder, verify_resume

slow = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
SMALL = """model.d=16 model.layers=1 model.heads=2 model.rank=2 pretrain.steps=8 pretrain.tokens_per_step=256
pretrain.block=16 pretrain.eval_tokens=256 sft.steps=0 every.log=1 every.eval=4 every.save=2 track="""


def verify(home: pathlib.Path, name: str, source: str, status: int) -> tuple[dict, str]:
    """Return the JSON and all output of a study with one arm and two kills, which must exit with `status`."""
    settings = [*SMALL.split(), f"pretrain.sources={source}", f"tokenizer.path={home}/words"]
    args = ["--config=configs/default.py", *(f"--config.{setting}" for setting in settings)]
    args += ["--precisions=fp32", "--optimizers=adamw", "--kills=2", f"--folder={home / name}", "--json"]
    command = [sys.executable, "-m", "lowrank_jax", "verify_resume", *args]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | runs.ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


@pytest.fixture(scope="module")
def study(make, tok, tmp_path_factory):
    """(folder of a study, its source, its result)."""
    home = tmp_path_factory.mktemp("verify")
    source = make.write_jsonl(home / "notes.jsonl", [{"text": make.prose(40, i)} for i in range(60)])
    tok.save(home / "words")
    return home / "study", source, verify(home, "study", source, 0)[0]


def copies(study, tmp_path) -> tuple[pathlib.Path, pathlib.Path]:
    """Return copies of the uninterrupted run and of the killed one, to be changed."""
    for name in ("alone", "killed1"):
        (tmp_path / name).mkdir()
        for file in ("metrics.jsonl", "events.jsonl"):
            shutil.copy(study[0] / "fp32-adamw" / name / file, tmp_path / name / file)
    return tmp_path / "alone", tmp_path / "killed1"


def rows_of(path: pathlib.Path) -> list[dict]:
    """Return the rows without their checksums, as a changed row has another."""
    return run_folder.read_rows(str(path.parent), path.name)


def edit(path: pathlib.Path, edits) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in edits(rows_of(path))))


def event(name: str, step: int = 3) -> str:
    """Return the shell command that adds an event to the run's ledger, in the workdir of the last argument."""
    row = json.dumps({"event": name, "step": step, "time": time.time() + 100})
    return f"home=${{@: -1}}; home=${{home#--workdir=}}; mkdir -p $home; echo '{row}' >> $home/events.jsonl; "


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Train with a shell script as the trainer, signalled after `pause` seconds; in start-up too at a `chance` of 0."""

    def train(script: str, pause: float = math.inf, fault: str = "", struck: str = "SIGKILL", chance=0.0) -> dict:
        (tmp_path / "trainer").write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "trainer").chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "trainer"))
        monkeypatch.setattr(verify_resume, "PATIENCE", 1.0)
        (tmp_path / "arm").mkdir()
        draw = random.Random(0)
        draw.random, draw.uniform = lambda: chance, lambda low, high: pause
        wanted = 2 if pause < math.inf else 1
        arm = verify_resume.Arm(tmp_path / "arm", [], wanted, draw, training=0.001, struck=[{"signal": struck}])
        arm.faults = {fault: 0} if fault else {}
        return verify_resume.train(arm, tmp_path / "arm" / "killed1")

    return train


@pytest.mark.parametrize("pause", [math.inf, 0.1], ids=["without a signal", "before its signal"])
def test_a_process_that_hangs_is_a_failure(train, pause):
    with pytest.raises(RunFailure, match="the process has not ended after 1 s\n    last words"):
        train("echo last words >&2; exec sleep 60", pause, chance=1.0)


DEATHS = {
    "SIGKILL": ("kill -9 $$", "exit status -9, expected 0"),
    "SIGTERM": ("kill -15 $$", "exit status -15, expected 0"),
    "143": ("exit 143", "exit status 143, expected 0"),
    "nothing": ("exit 0", "exit status 0, expected 0; last event: .*none"),
    "no finish": (event("save") + "exit 0", "exit status 0, expected 0; last event: .*save"),
}


@pytest.mark.parametrize(("script", "match"), DEATHS.values(), ids=DEATHS)
def test_a_process_that_dies_by_itself_is_a_failure(train, script, match):
    with pytest.raises(RunFailure, match=match):
        train(script)


def test_a_process_that_finishes_was_not_killed(train):
    assert train(event("finish") + "exit 0", pause=30) == {}


def test_sigterm_before_its_handler_is_a_kill(train):
    assert train("exec sleep 60", 0.5) == {"signal": "SIGTERM", "where": "start-up", "by": "chance", "step": 0}


def test_sigkill_while_training_is_a_kill(train):
    facts = train(event("stage") + "exec sleep 60", 0.5, struck="SIGTERM", chance=1.0)
    assert facts == {"signal": "SIGKILL", "where": "training", "by": "chance", "step": 0}


def test_sigterm_that_the_training_does_not_survive_is_a_failure(train):
    with pytest.raises(RunFailure, match=r"exit status -15, expected \[143\]"):
        train(event("start") + "exec sleep 60", 0.5)


@pytest.mark.parametrize("is_saved", [True, False])
def test_sigterm_must_leave_a_checkpoint(train, is_saved):
    save = "mkdir -p $home/checkpoints/3" if is_saved else ":"
    script = event("preempt") + f"{save}; exit 143"
    if is_saved:
        assert train(script, fault="term@step=3")["by"] == "term@step=3"
    else:
        with pytest.raises(RunFailure, match=r"exit status 143, expected \[143\]; last event: .*, saved: False"):
            train(script, fault="term@step=3")


@slow
def test_a_run_that_is_killed_passes(study):
    folder, _, result = study
    (arm,) = result["arms"]
    assert result["equal"] and result["kills"] == 2 and arm["arm"] == "fp32-adamw"
    kills = {kill["by"]: kill for kill in arm["struck"]}  # a slow start may meet chance first
    assert kills["kill@save=1"].items() >= {"signal": "SIGKILL", "where": "save", "step": 2}.items()
    assert set(kills) == {"kill@save=1", "chance"}
    if arm["struck"][0]["by"] == "kill@save=1":  # chance takes the rarer signal
        assert kills["chance"]["signal"] == "SIGTERM"
    starts = [row for row in rows_of(folder / "fp32-adamw" / "killed1" / "events.jsonl") if row["event"] == "start"]
    assert [row["step"] for row in starts[:2]] in ([0, 0], [0, 2])  # rarely, the killed save is done already


@slow
def test_an_arm_that_differs_is_named_and_not_trained_again(study):
    folder, source, result = study
    arm = result["arms"][0] | {"equal": False, "why": "row 3 of metrics.jsonl is none"}
    good = (folder / "results.jsonl").read_text()
    (folder / "results.jsonl").write_text(json.dumps(arm) + "\n")
    result, output = verify(folder.parent, "study", source, 1)
    (folder / "results.jsonl").write_text(good)
    assert not result["equal"] and result["arms"] == [arm]
    assert "error: not equal: fp32-adamw; " in output and "row 3 of metrics.jsonl" in output


@slow
def test_a_process_that_fails_is_shown_with_its_error(study):
    result, output = verify(study[0].parent, "failing", "text:/nowhere/*.txt", 1)
    assert result["arms"][0]["why"].startswith("left alone: exit status 2, expected 0")
    assert "error: not equal: fp32-adamw; " in output and "/nowhere/*.txt: no such file" in output


@slow
@pytest.mark.parametrize("key, other", [("step", 9), ("tokens", 8), ("data_sha256", "ab"), ("params_sha256", "cd")])
def test_another_finish_event_is_a_difference(study, tmp_path, key, other):
    alone, killed = copies(study, tmp_path)
    assert verify_resume.difference(alone, killed) == ""
    edit(killed / "events.jsonl", lambda rows: [*rows[:-1], rows[-1] | {key: other}])
    assert verify_resume.difference(alone, killed).startswith(f"{key} is {other}, not ")


METRICS = {
    "a loss": lambda rows: [*rows[:3], rows[3] | {"loss": 1.0}, *rows[4:]],
    "a row twice": lambda rows: [*rows[:4], rows[3], *rows[4:]],
    "a row missing": lambda rows: [*rows[:3], *rows[4:]],
    "the last row missing": lambda rows: rows[:-1],
}


@slow
@pytest.mark.parametrize("edits", METRICS.values(), ids=METRICS)
def test_another_row_is_a_difference(study, tmp_path, edits):
    alone, killed = copies(study, tmp_path)
    edit(killed / "metrics.jsonl", edits)
    assert "of metrics.jsonl is " in verify_resume.difference(alone, killed)


@slow
def test_speed_is_not_compared_and_the_finish_event_is_needed(study, tmp_path):
    alone, killed = copies(study, tmp_path)
    edit(killed / "metrics.jsonl", lambda rows: [row | {"tokens_per_s": 1.0, "mfu": 0.5} for row in rows])
    assert verify_resume.difference(alone, killed) == ""
    edit(killed / "events.jsonl", lambda rows: rows[:-1])
    assert "params_sha256 is None" in verify_resume.difference(alone, killed)
    with open(alone / "metrics.jsonl", "a") as f:
        f.write('{"step": 9')
    assert "of metrics.jsonl is None" in verify_resume.difference(alone, killed)
