"""Runs that run out of memory, leave fp8 or get a signal at a bad moment, and warm starts; mostly real processes."""

import os
import pathlib
import shutil
import signal
import threading
import time
from collections.abc import Callable

import pytest
from runs import STEPS, assert_one_line, last_json, launch, rows, run, same_end, train, train_args

from lowrank_jax import cli
from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.data import tokenizer
from lowrank_jax.machine import console, interrupt
from lowrank_jax.training import loop as training
from lowrank_jax.training import run_folder, step

HALF = {"pretrain__microbatch_tokens": 64, "sft__microbatch_tokens": 64}  # of the 128 tokens that the runs begin with


def events(folder, *kinds: str) -> list[dict]:
    return [event for event in rows(folder, "events.jsonl") if event["event"] in kinds]


def finish(folder) -> dict:
    (event,) = events(folder, "finish")
    return event


def losses(folder) -> list[tuple]:
    return [(row["step"], row["loss"], row["lr"]) for row in rows(folder, "metrics.jsonl") if "lr" in row]


# ----------------------------------------------------------------------------------------------------------- no memory


@pytest.fixture(scope="module")
def halved(data, tmp_path_factory):
    """A function: an undisturbed run whose first `steps` updates have microbatches of 128 tokens, the rest of 64."""
    folder, runs = tmp_path_factory.mktemp("halved"), {}

    def after(steps: int) -> pathlib.Path:
        if steps not in runs:
            runs[steps] = folder / str(steps)
            if steps:
                assert train(data, runs[steps], faults=f"term@step={steps}")[0] == 143
            code, _, err = train(data, runs[steps], **HALF)
            assert code == 0, err
        return runs[steps]

    return after


@pytest.mark.parametrize("step, restored, source", [(1, 0, None), (4, 3, "memory"), (6, 4, "checkpoint")])
def test_running_out_of_memory_goes_on_with_half_as_much_at_a_time(
    data, reference, halved, tmp_path, step, restored, source
):
    """It happens at the first step of the run, at the first step of a stage, and in the middle of a stage."""
    code, out, err = train(data, tmp_path / "run", faults=f"oom@step={step}")
    assert code == 0 and f"out of memory at step {step}: going on with 64 tokens at once" in err, err
    (oom,) = events(tmp_path / "run", "oom")
    assert (oom["step"], oom["microbatch_tokens"], oom["remat"]) == (step - 1, 64, False)
    assert [(e["step"], e["source"]) for e in events(tmp_path / "run", "restore")] == (
        [(restored, source)] if source else []
    )
    ended, whole = finish(tmp_path / "run"), finish(reference)
    assert last_json(out)["step"] == STEPS and ended["data_sha256"] == whole["data_sha256"]
    assert ended["tokens"] == whole["tokens"] and [s for s, *_ in losses(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert ended["params_sha256"] == finish(halved(restored))["params_sha256"] != whole["params_sha256"]
    assert losses(tmp_path / "run") == losses(halved(restored))


def test_a_resumed_run_keeps_its_cap(data, reference, tmp_path):
    faults = "oom@step=4,kill@step=5"
    assert train(data, tmp_path / "run", faults=faults)[0] == -signal.SIGKILL  # with the newest checkpoint from before
    assert train(data, tmp_path / "run", faults="kill@step=11")[0] == -signal.SIGKILL
    assert train(data, tmp_path / "run")[0] == 0
    at_once = [e["microbatch"] * e["seq_len"] for e in events(tmp_path / "run", "stage")]
    assert at_once[0] == 128 and set(at_once[1:]) == {64} and len(at_once) >= 6
    assert len(events(tmp_path / "run", "oom")) == 1
    assert finish(tmp_path / "run")["data_sha256"] == finish(reference)["data_sha256"]


def test_where_one_row_at_a_time_is_too_much_it_is_rematerialised_and_then_the_run_ends_in_one_line(data, tmp_path):
    faults = ",".join(f"oom@step={n}" for n in (7, 8, 9))
    code, _, err = train(data, tmp_path / "run", faults=faults)
    assert_one_line(code, err, 1, "out of memory at step 9", "one row of 64 tokens")
    assert [(e.get("microbatch_tokens"), e.get("remat")) for e in events(tmp_path / "run", "oom")] == [
        (64, False), (64, True), (None, None)
    ]  # fmt: skip
    code, out, err = train(data, tmp_path / "run")
    assert code == 0 and last_json(out)["step"] == STEPS, err
    assert events(tmp_path / "run", "stage")[-1]["remat"] and "rematerialised" in out


def test_the_gate_chooses_what_fits_before_the_first_step_and_refuses_what_cannot(data, tmp_path):
    args = [a for a in train_args(data, tmp_path / "run") if "workdir" not in a]
    tokenizer = ["--config.tokenizer.vocab_size=400", "--config.model.vocab=400"]
    code, out, err = run("plan", "--json", "--topology=cpu", *args, *tokenizer)
    assert code == 0, err
    whole = last_json(out)
    assert whole["topology"] == "cpu" and all(s["fits"] and s["compile_seconds"] > 0 for s in whole["stages"])
    needs = [s["peak_bytes_per_device"] for s in whole["stages"]]
    assert [s["microbatch"] for s in whole["stages"]] == [8, 4, 2, 4] and max(needs) == needs[3]
    limit = (max(needs) - 1) / 2**30
    code, out, err = train(data, tmp_path / "run", memory_gb=limit, sft__steps=2)
    assert code == 0, err
    assert "rematerialised" not in out and f"of {limit:.1f} GiB" in out
    chosen = {
        e["stage"]: (e["microbatch"], e["peak_bytes"], e["device_bytes"]) for e in events(tmp_path / "run", "compile")
    }
    assert [rows for rows, *_ in chosen.values()] == [8, 4, 2, 2]
    assert all(need <= most == int(limit * 2**30) for _, need, most in chosen.values())
    assert finish(tmp_path / "run")["tokens"] == 11 * 256
    code, _, err = train(data, tmp_path / "none", memory_gb=0.0002)
    assert_one_line(code, err, 2, "stage pretrain-16 needs", "one row of 16 tokens", "config.memory_gb")
    assert not (tmp_path / "none").exists()


# ------------------------------------------------------------------------------------------------------------ precision


def test_fp8_that_is_off_falls_back_to_bf16_also_in_a_run_that_is_killed(data, tmp_path):
    settings = {
        "precision": "fp8",
        "every__fp8_check": 2,
        "optim__ema": 0.9,
        "optim__name": "adamw",
        "model__layers": 1,
    }
    code, _, err = train(data, tmp_path / "alone", faults="fp8@step=5", **settings)
    assert code == 0 and "going on in bf16" in err, err
    assert [e["step"] for e in events(tmp_path / "alone", "fp8_check", "fallback")] == [0, 2, 4]
    (fallback,) = events(tmp_path / "alone", "fallback")
    assert fallback["step"] == 4 and fallback["off_by"]["loss"] == "nan"
    ran = [(e["step"], e["precision"]) for e in events(tmp_path / "alone", "stage")]
    assert ran == [(0, "fp8"), (3, "fp8"), (4, "bf16"), (6, "bf16"), (9, "bf16")]
    assert train(data, tmp_path / "killed", faults="fp8@step=5,kill@step=6", **settings)[0] == -signal.SIGKILL
    assert train(data, tmp_path / "killed", faults="fp8@step=5,kill@step=8", **settings)[0] == -signal.SIGKILL
    assert train(data, tmp_path / "killed", **settings)[0] == 0  # what it fell back to is in the checkpoint
    assert same_end(tmp_path / "killed", tmp_path / "alone")


# -------------------------------------------------------------------------------------------------------------- signals


def test_signals_during_evaluations_and_a_save_cost_nothing(data, reference, tmp_path):
    for fault in ("term@eval=1", "term@eval=4", "term@save=2"):
        code, _, err = train(data, tmp_path / "run", faults=fault)
        assert code == 143 and "saved at step" in err, err
        preempt = events(tmp_path / "run", "preempt")[-1]
        assert (tmp_path / "run" / "checkpoints" / str(preempt["step"])).is_dir()
        evaluated = [row["step"] for row in rows(tmp_path / "run", "metrics.jsonl") if "split" in row]
        assert preempt["step"] not in evaluated or "save" in fault
    assert train(data, tmp_path / "run")[0] == 0
    assert same_end(tmp_path / "run", reference)


class StuckCompiler:
    """A replacement of `step.lower` that calls `begin` and then blocks until the test is over."""

    def __init__(self, begin: Callable[[], None] = lambda: None):
        self.begin, self.begun, self.end = begin, threading.Event(), threading.Event()

    def __call__(self, *_):
        self.begin()
        self.begun.set()
        self.end.wait(30)
        raise AssertionError("something waited for the compiler")


@pytest.fixture
def stick(monkeypatch):
    """A function: block the compiler of this process until the test is over."""
    compilers = []

    def stuck(*begin: Callable[[], None]) -> StuckCompiler:
        compilers.append(StuckCompiler(*begin))
        monkeypatch.setattr(step, "lower", compilers[-1])
        return compilers[-1]

    yield stuck
    for compiler in compilers:
        compiler.end.set()


def tiny(make, data, **changes):
    settings = {"tokens_per_step": 32, "block": 16, "steps": 1, "eval_fraction": 0.0, "sources": f"text:{data}/a.txt"}
    settings = {f"pretrain__{key}": value for key, value in settings.items()}
    return make.run_config(**settings | {"track": "", "model__vocab": 0, "tokenizer__vocab_size": 400} | changes)


def test_a_signal_while_the_first_program_compiles_saves_the_start_and_nobody_waits(make, data, stick, tmp_path):
    """A resumed run compiles first, too."""
    folder = str(tmp_path / "run")
    for resumes in (False, True):
        received = []
        stick(lambda received=received: received.append(signal.SIGTERM))
        with pytest.raises(SystemExit) as end:
            training.run(tiny(make, data), folder, received)
        assert end.value.code == 143 and run_folder.newest_checkpoint(folder) == 0
        assert events(folder, "start")[-1]["resumes"] is resumes
    assert [e["step"] for e in events(folder, "preempt")] == [0, 0]


def test_a_mistake_in_the_data_does_not_wait_for_the_compiler(make, data, stick, monkeypatch, tmp_path):
    (tmp_path / "blank.txt").write_text(" \n \n")
    compiler, learn = stick(), tokenizer.train
    monkeypatch.setattr(tokenizer, "train", lambda *args: compiler.begun.wait(30) and learn(*args))
    with pytest.raises(UsageError, match="there is no text"):
        training.run(tiny(make, data, pretrain__sources=f"text:{tmp_path}/blank.txt"), str(tmp_path / "run"))
    assert compiler.begun.is_set() and not (tmp_path / "run").exists()


def lower_the_first(config, fitted, *rest, lower=step.lower):
    """A replacement of `step.lower` that compiles the first program and blocks forever in all others."""
    return threading.Event().wait() if fitted.stage.start else lower(config, fitted, *rest)


def test_a_signal_while_the_next_program_compiles_ends_the_process_at_once_with_its_state(data, tmp_path):
    patches = {"lowrank_jax.training.step.lower": lower_the_first}
    process = launch("main", *train_args(data, tmp_path / "run"), patches=patches)
    try:
        while 3 not in [row["step"] for row in run_folder.read_rows(tmp_path / "run", "metrics.jsonl")]:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)  # the compiler never ends
    finally:
        process.kill()
    assert process.returncode == 143 and "saved at step 3" in err, err
    assert events(tmp_path / "run", "preempt")[0]["step"] == 3
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()


class Ended(BaseException):
    """Raised instead of ending this process."""


@pytest.fixture
def ends(monkeypatch):
    def end(status: int):
        raise Ended(status)

    monkeypatch.setattr(os, "_exit", end)


@pytest.mark.parametrize("failure, status", [
    (UsageError("text"), 2), (RunFailure("disk"), 1), (OSError("disk"), 1), (SystemExit(143), 143),
    (KeyboardInterrupt(), 130), (RuntimeError("RESOURCE_EXHAUSTED: memory"), 1),
])  # fmt: skip
def test_no_failure_waits_for_a_compiler(ends, failure, status):
    def command(argv: list[str]):
        raise failure

    over = threading.Event()
    compiler = threading.Thread(target=over.wait, name=f"{console.ABANDONED}_0")
    compiler.start()
    try:
        with pytest.raises(Ended, match=f"^{status}$"):
            cli.main(command)
    finally:
        over.set()
        compiler.join()


def test_signals_are_noted_and_told_once_and_handlers_put_back(ends, capfd, request):
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    outside = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, outside))
    before = [signal.getsignal(number) for number in numbers]
    with interrupt.signals() as received:
        assert received == []
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGHUP):
            signal.raise_signal(number)
    assert set(received) == {*numbers} and received[0] == signal.SIGTERM
    assert [signal.getsignal(number) for number in numbers] == before
    assert [line.split(":")[0] for line in capfd.readouterr().err.splitlines()] == ["SIGTERM", "SIGINT", "SIGHUP"]


def test_under_nohup_a_terminal_may_close(ends):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupt.signals() as received:
            signal.raise_signal(signal.SIGHUP)
        assert received == [] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_from_the_keyboard_ends_the_process_at_once(ends):
    with interrupt.signals() as received:
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]
        with pytest.raises(Ended, match="^130$"):
            signal.raise_signal(signal.SIGINT)


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(data, reference, tmp_path):
    assert train(data, tmp_path / "run", faults="term@step=7")[0] == 143
    newest = tmp_path / "run" / "checkpoints" / "7"
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    code, _, err = train(data, tmp_path / "run")
    assert code == 0 and "warning: the checkpoint of step 7 is damaged" in err and "using step 6" in err, err
    assert [e["step"] for e in events(tmp_path / "run", "restore_failed")] == [7]
    assert same_end(tmp_path / "run", reference)


# ----------------------------------------------------------------------------------------------------------- warm start


def test_a_deeper_run_begins_where_a_shallower_one_ended(data, reference, tmp_path):
    changes = {"model__layers": 4, "init_from": reference, "pretrain__steps": 2, "sft__steps": 0, "every__save": 50}
    code, _, err = train(data, tmp_path / "run", faults="kill@step=2", **changes)
    assert code == -signal.SIGKILL and "2 layers became 4" in err and "took 15 of 15 arrays" in err, err
    first = next(row for row in rows(tmp_path / "run", "metrics.jsonl") if "split" in row)
    code, out, err = run("evaluate", "--json", f"--workdir={reference}", "--lengths=64")
    assert code == 0, err
    assert first["step"] == 0 and first["eval_loss"] == pytest.approx(last_json(out)["results"][0]["loss"], rel=1e-5)
    gone = changes | {"init_from": tmp_path / "gone"}
    code, _, err = train(data, tmp_path / "run", **gone)  # the start is saved: the other run is not needed any more
    assert code == 0, err
    code, _, err = train(data, tmp_path / "other", **gone)
    assert_one_line(code, err, 2, "gone")
    assert not (tmp_path / "other").exists()


def test_a_run_with_profile_and_track_is_traced_and_tracked(data, reference, tmp_path):
    assert not (reference / "tensorboard").exists()
    shutil.copytree(reference, tmp_path / "run")
    code, _, err = train(data, tmp_path / "run", sft__steps=20, profile=2, track="tensorboard")
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    assert code == 0 and "traced 2 steps" in err, err
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    page = (tmp_path / "run" / "report.html").read_text()
    stage = events(tmp_path / "run", "stage")[-1]
    assert stage["step"] == STEPS and stage["stall_seconds"] > 0
    assert f"<dt>steps</dt><dd>{STEPS + 16}</dd>" in page and f">{stage['stall_seconds']:.4g}</td>" in page
