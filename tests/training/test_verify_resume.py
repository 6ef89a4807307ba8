"""verify_resume passes a run that is killed, and names the difference where runs differ."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import runs

from lowrank_jax.training import verify_resume

pytestmark = pytest.mark.slow

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


def edit(path: pathlib.Path, edits) -> None:
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in edits(rows)))


def test_a_run_that_is_killed_passes(study):
    folder, _, result = study
    (arm,) = result["arms"]
    assert result["equal"] and result["kills"] == 2 and arm["arm"] == "fp32-adamw"
    assert arm["struck"][0].items() >= {"signal": "SIGKILL", "where": "save", "by": "kill@save=1", "step": 2}.items()
    assert arm["struck"][1]["by"] == "chance" and arm["repeated"] >= 2
    assert (folder / "fp32-adamw" / "killed1" / "events.jsonl").is_file()


def test_an_arm_that_differs_is_named_and_not_trained_again(study):
    folder, source, result = study
    arm = result["arms"][0] | {"equal": False, "why": "row 3 of metrics.jsonl is none"}
    good = (folder / "results.jsonl").read_text()
    (folder / "results.jsonl").write_text(json.dumps(arm) + "\n")
    result, output = verify(folder.parent, "study", source, 1)
    (folder / "results.jsonl").write_text(good)
    assert not result["equal"] and result["arms"] == [arm]
    assert "error: not equal: fp32-adamw; " in output and "row 3 of metrics.jsonl" in output


def test_a_process_that_fails_is_shown_with_its_error(study):
    result, output = verify(study[0].parent, "failing", "text:/nowhere/*.txt", 1)
    assert result["arms"][0]["why"].startswith("left alone: exit status 2, expected 0")
    assert "error: not equal: fp32-adamw; " in output and "/nowhere/*.txt: no such file" in output


@pytest.mark.parametrize("key", ["step", "tokens", "data_sha256", "params_sha256"])
def test_another_finish_event_is_a_difference(study, tmp_path, key):
    alone, killed = copies(study, tmp_path)
    assert verify_resume.difference(alone, killed) == ""
    edit(killed / "events.jsonl", lambda rows: [*rows[:-1], rows[-1] | {key: "other"}])
    assert verify_resume.difference(alone, killed).startswith(f"{key} is other, not ")


METRICS = {
    "a loss": lambda rows: [*rows[:3], rows[3] | {"loss": 1.0}, *rows[4:]],
    "a row twice": lambda rows: [*rows[:4], rows[3], *rows[4:]],
    "a row missing": lambda rows: [*rows[:3], *rows[4:]],
    "the last row missing": lambda rows: rows[:-1],
}


@pytest.mark.parametrize("edits", METRICS.values(), ids=METRICS)
def test_another_row_is_a_difference(study, tmp_path, edits):
    alone, killed = copies(study, tmp_path)
    edit(killed / "metrics.jsonl", edits)
    assert "of metrics.jsonl is " in verify_resume.difference(alone, killed)


def test_speed_is_not_compared_and_the_finish_event_is_needed(study, tmp_path):
    alone, killed = copies(study, tmp_path)
    edit(killed / "metrics.jsonl", lambda rows: [row | {"tokens_per_s": 1.0, "mfu": 0.5} for row in rows])
    assert verify_resume.difference(alone, killed) == ""
    edit(killed / "events.jsonl", lambda rows: rows[:-1])
    assert "params_sha256 is None" in verify_resume.difference(alone, killed)
    with open(alone / "metrics.jsonl", "a") as f:
        f.write('{"step": 9')
    assert "of metrics.jsonl is null" in verify_resume.difference(alone, killed)
