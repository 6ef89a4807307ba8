"""The device check: parts that hang, crash or babble do not hide the other rows, and its measurements notice faults."""

import json
import os
import time

import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.model import attention
from scripts import check_device
from scripts.device import memory, numerics, rows, sees

PARTS = {
    "good": 'print(\'{"check": "speed", "ok": true, "tokens_per_s": 12345.6}\')',
    "null": 'print(\'{"check": "size", "ok": null, "loss": NaN}\')',
    "false": 'print(\'{"check": "bound", "ok": false, "reason": "a | b"}\')',
    "crash": 'print(\'{"check": "first", "ok": true}\', flush=True); raise ValueError(\'boom\')',
    "babble": "print('Hello'); print('[1]'); print('{\"ok\": true}'); print('{\"check\": \"late\", \"ok\": true}')",
    "hang": (
        'import subprocess, sys, time; print(\'{"check": "before", "ok": true}\', flush=True)\n'
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open(__file__ + '.pid', 'w').write(str(child.pid)); time.sleep(600)"
    ),
    "interrupt": (
        'import os, signal, time; print(\'{"check": "before", "ok": true}\', flush=True); time.sleep(0.3)\n'
        "os.kill(os.getppid(), signal.SIGINT); time.sleep(600)"
    ),
}


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Replace the parts by PARTS; return a function that runs some of them and returns (report, error)."""
    for name, code in PARTS.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setattr(check_device, "FOLDER", tmp_path)
    monkeypatch.setattr(check_device, "SHARES", dict.fromkeys([*PARTS, "absent"], 1))
    monkeypatch.setattr(check_device, "on_accelerator", lambda: False)

    def run(*names, seconds=30, error=RunFailure):
        out = tmp_path / "out"
        with pytest.raises(error) if error else check_device.contextlib.nullcontext():
            check_device.command([f"--out={out}", f"--parts={','.join(names)}", f"--seconds={seconds}"])
        report = json.loads((out / "check.json").read_text())
        lines = [json.loads(line) for line in (out / "check.jsonl").read_text().splitlines()]
        assert lines == report["rows"]
        return report["rows"], (out / "check.md").read_text()

    return run


def test_rows_are_kept_and_what_fails_is_a_false_row(parts):
    rows, page = parts("good", "null", "false", "crash", "babble", "absent")
    kinds = [(row["part"], row["check"], row["ok"]) for row in rows]
    assert kinds[:3] == [("good", "speed", True), ("null", "size", None), ("false", "bound", False)]
    assert kinds[3:5] == [("crash", "first", True), ("crash", "part", False)]
    assert "ValueError: boom" in rows[4]["reason"]
    assert kinds[5:9] == [("babble", "part", False)] * 3 + [("babble", "late", True)] and "Hello" in rows[5]["reason"]
    assert kinds[9:] == [("absent", "part", None)]
    assert "| ok | tokens_per_s |" in page and "| ok | 12,346 |" in page and "a \\| b" in page
    assert "- crash: part: reason exit status 1: ValueError: boom" in page.split("## good")[0]
    assert rows[1]["loss"] is None  # JSON has no NaN


def test_checks_that_begin_with_the_same_word_share_a_table():
    rows = [{"part": "speed", "check": name, "ok": None, "ms": 1.5} for name in ("step of base", "step of 1b")]
    rows += [{"part": "speed", "check": "step of 1b / base", "ok": True, "value": 2}, rows[0] | {"part": "peers"}]
    rows += [{"part": "sees", "check": "choices", "ok": True, "kernel": name} for name in "ab"]
    sizes = [(key[0], [row["check"] for row in table]) for key, table in check_device.grouped(rows).items()]
    expected = [("speed", ["step of base", "step of 1b"]), ("speed", ["step of 1b / base"])]
    expected += [("peers", ["step of base"]), ("sees", ["choices"] * 2)]
    assert sizes == expected


def test_a_part_that_hangs_is_killed_with_its_children_and_the_next_one_runs(parts, tmp_path):
    started = time.monotonic()
    rows, _ = parts("hang", "good", seconds=3)
    assert [(row["check"], row["ok"]) for row in rows] == [("before", True), ("part", False), ("speed", True)]
    assert "killed after" in rows[1]["reason"] and time.monotonic() - started < 4
    child = int((tmp_path / "hang.py.pid").read_text())
    state = f"/proc/{child}/stat"
    assert not os.path.exists(state) or open(state).read().split()[2] == "Z"


def test_ctrl_c_writes_the_report(parts):
    rows, page = parts("good", "interrupt", "null", error=KeyboardInterrupt)
    assert [row["check"] for row in rows] == ["speed", "before"] and "## interrupt: before" in page


def test_all_rows_true_or_null_is_success(parts):
    assert len(parts("good", "null", "absent", error=None)[0]) == 3


@pytest.mark.parametrize("flag", ["--parts=seas", "--parts=", "--seconds=0", "--small --full"])
def test_bad_flags_are_usage_errors(flag, tmp_path):
    with pytest.raises(UsageError):
        check_device.command([f"--out={tmp_path}/out", *flag.split()])
    assert not (tmp_path / "out").exists()


def rows_of(capsys, check, *arguments) -> list[dict]:
    with open(1, "w", closefd=False) as stdout:
        check(rows.Rows(True, time.monotonic() + 600, stdout), *arguments)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_attention_is_compared_with_the_formula_and_a_wrong_kernel_is_noticed(capfd, monkeypatch):
    rows = rows_of(capfd, numerics.compare_kernels, jnp.float32, (1, 45, 2, 16), True)
    assert [(row["kernel"], row["ok"]) for row in rows] == [("reference", True), ("chunked", True), ("native", True)]
    assert all(max(row["errors"].values()) < 1e-6 for row in rows)
    of_chunks = attention._chunked
    monkeypatch.setattr(attention, "_chunked", lambda q, k, v, s: of_chunks(q, 1.01 * k, v, s))
    rows = rows_of(capfd, numerics.compare_kernels, jnp.float32, (1, 45, 2, 16), False)
    assert [row["ok"] for row in rows] == [True, False, True]


def test_a_kernel_that_refuses_or_fails_has_a_reason(capfd, monkeypatch):
    monkeypatch.setattr(attention, "_chunked", lambda *qkv: 1 / 0)
    rows = rows_of(capfd, numerics.compare_kernels, jnp.bfloat16, (1, 45, 2, 16), True)
    assert [row["ok"] for row in rows] == [True, False, None]
    assert "ZeroDivisionError" in rows[1]["reason"] and "native takes float32" in rows[2]["reason"]


def test_the_kernels_in_a_program_are_those_it_calls():
    call = lambda target: f'  %c{len(target)} = f32[8]{{0}} custom-call(%x), custom_call_target="{target}"\n'
    text = "HloModule m\n\nENTRY %main (x: f32[8]) -> f32[8] {\n  %x = f32[8]{0} parameter(0)\n"
    targets = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward", "__cublas$gemm"
    text += "".join(map(call, targets)) + "  ROOT %y = f32[8]{0} negate(%x)\n}\n"
    assert numerics.kernels_in(text) == {"cudnn": 2}


def test_a_preset_that_falls_back_is_a_false_row(monkeypatch):
    ok, figures = sees.choices("quickstart.py")
    assert ok and set(figures["kernels"].values()) == {"native"}
    monkeypatch.setattr(attention, "resolve", lambda *shape: ("chunked", "why"))
    ok, figures = sees.choices("quickstart.py")
    assert not ok and set(figures["notes"].values()) == {"why"}


@pytest.mark.parametrize("predicted, ok", [(100, True), (110, True), (99, False), (111, False)])
def test_a_prediction_is_at_least_the_peak_and_at_most_a_tenth_above(predicted, ok):
    assert memory.judge({"predicted_bytes": predicted, "measured_bytes": 100})[0] is ok
    assert memory.judge({"predicted_bytes": predicted, "measured_bytes": None})[0] is None


def test_exact_attention_is_that_of_two_tokens_by_hand():
    q, k, v, g = (np.array([[[[a]], [[b]]]]) for a, b in ((1.0, 2.0), (0.5, -1.0), (3.0, 5.0), (1.0, 1.0)))
    weight = 1 / (1 + np.exp(2 * -1.0 - (2 * 0.5 - 2.0**-8)))  # of the first token, for the second
    out, _, _, dv = numerics.exact_attention(q, k, v, g, None)
    np.testing.assert_allclose(out.ravel(), [3.0, 3 * weight + 5 * (1 - weight)])
    np.testing.assert_allclose(dv.ravel(), [1 + weight, 1 - weight])
