"""Streams: control characters on terminals, characters that an encoding lacks, streams that are closed, JSON."""

import ast
import io
import json
import os
import pathlib
import subprocess
import sys
import types

import pytest

from lowrank_jax import cli
from lowrank_jax.config import UsageError
from lowrank_jax.machine import console

ROOT = pathlib.Path(__file__).parents[2]
HOSTILE = "\x1b]0;title\x07\x1b[31mred\x9b1m \x85\x7f\r\x00 \u202egnp.exe\u202c\u2066\u2069 \udcff\ud83d"


class Stream(io.TextIOWrapper):
    """A stream of one encoding, as a terminal or as a pipe."""

    def __init__(self, encoding: str, terminal: bool):
        super().__init__(io.BytesIO(), encoding=encoding)
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


@pytest.fixture
def streams(monkeypatch):
    """Return a function that sets stdout and stderr, prepares them as commands do, and returns both."""

    def put(encoding: str = "utf-8", terminal: bool = True) -> tuple[Stream, Stream]:
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, Stream(encoding, terminal))
        console.prepare_streams()
        return sys.stdout, sys.stderr

    return put


def is_harmless(text: str) -> bool:
    return all(c in "\t\n" or c.isprintable() for c in text)


@pytest.mark.parametrize("terminal", [True, False])
def test_messages_and_errors_show_control_characters(streams, terminal):
    _, err = streams(terminal=terminal)

    def fail(argv):
        raise UsageError(f"no file {HOSTILE}")

    console.say(f"a\tb\n{HOSTILE}")
    with pytest.raises(SystemExit):
        cli.main(fail, [])
    assert is_harmless(err.text()) and "a\tb\n\\x1b]0;title\\x07\\x1b[31mred\\x9b1m" in err.text()
    assert err.text().count("\n") == 3 and r"\u202egnp.exe\u202c\u2066\u2069 \udcff\ud83d" in err.text()


def test_results_are_raw_in_a_pipe_and_harmless_on_a_terminal(streams):
    out, _ = streams(terminal=True)
    console.show(HOSTILE + "\t文\n", end="")
    assert is_harmless(out.text()) and out.text().endswith("\t文\n")
    out, _ = streams(terminal=False)
    console.show(HOSTILE[:40], end="")
    assert out.buffer.getvalue().decode("utf-8").startswith("\x1b]0;title\x07\x1b[31mred\x9b1m")


@pytest.mark.parametrize(
    ("encoding", "kept"), [("ascii", r"\xe9"), ("iso-8859-1", "é"), ("cp1252", "é"), ("utf-8", "é")]
)
def test_an_encoding_without_a_character_gets_it_in_ascii(streams, encoding, kept):
    out, err = streams(encoding)
    console.show("≤ 3.5 é 文 \ud800")
    console.say("≤ é")
    expected = "≤ 3.5 é 文 \\ud800\n" if encoding == "utf-8" else f"<= 3.5 {kept} \\u6587 \\ud800\n"
    assert out.text() == expected and err.text() == expected[: 4 - (encoding == "utf-8")].split(" ")[0] + f" {kept}\n"


def test_a_closed_stream_is_replaced_and_hurts_no_command(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    cli.main(lambda argv: {"value": 1}, ["--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main(lambda argv: cli.Parser("doc").parse_args(["--nonsense"]), [])
    assert ended.value.code == 2 and sys.stdin.read() == ""


def test_json_has_null_for_what_json_does_not_have(capsys):
    cli.main(lambda argv: {"loss": float("nan"), "rows": [{"x": (float("inf"), -0.5)}, "é\x1b\x7f"]}, ["--json"])
    line = capsys.readouterr().out
    assert line == '{"loss": null, "rows": [{"x": [null, -0.5]}, "\\u00e9\\u001b\\u007f"]}\n'
    assert json.loads(console.to_json({float("nan"): 1}, indent=1)) == {"null": 1}


def test_only_the_console_prints():
    """A result goes through `console.show`, a message through `console.say`: no other call decides what is harmless."""
    prints = set()
    for path in (ROOT / "lowrank_jax").rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
        if any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls):
            prints.add(os.path.relpath(path, ROOT / "lowrank_jax"))
    assert prints == {"machine/console.py"}


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend 'tpu': x. (set y)")])
def test_platforms_that_cannot_be_used_are_one_line(monkeypatch, capsys, error):
    """JAX's error has no text where the plugin of CUDA is missing; asked again, some devices of a list are there."""

    def command(argv):
        raise error

    devices = command if not str(error) else list
    jax = types.SimpleNamespace(config=types.SimpleNamespace(jax_platforms="cuda"), devices=lambda: devices(()))
    monkeypatch.setitem(sys.modules, "jax", jax)
    with pytest.raises(SystemExit) as ended:
        cli.main(command, [])
    reason = "Unable to initialize backend 'tpu': x" if str(error) else "its plugin for JAX is not installed"
    line = f"error: JAX_PLATFORMS=cuda cannot be used ({reason}); set JAX_PLATFORMS=cpu, or unset it\n"
    assert (ended.value.code, capsys.readouterr().err) == (2, line)


def test_an_unknown_error_stays_a_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.main(lambda argv: 1 / 0, [])


@pytest.mark.slow
def test_a_real_training_says_that_the_platform_is_unknown_and_leaves_nothing(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu,rubbish"}
    line = [sys.executable, "-m", "lowrank_jax.main", "--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "Backend 'rubbish' is not in the list of known backends" in done.stderr and not os.listdir(tmp_path)
