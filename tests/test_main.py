"""`python -m lowrank_jax` lists the commands without JAX, runs them, and names near matches of an unknown one."""

import importlib
import os
import pathlib
import subprocess
import sys

import pytest
import runs

from lowrank_jax.__main__ import COMMANDS
from lowrank_jax.config import UsageError

ROOT = pathlib.Path(__file__).parents[1]


def run(*args: str, first: str = "", last: str = "") -> subprocess.CompletedProcess:
    """Run the package's __main__ with these arguments; Python statements may come before and after."""
    program = f"import atexit, runpy, sys\n{first}\nsys.argv = ['lowrank_jax', *{args!r}]\n"
    program += f"atexit.register(lambda: {last})\n"
    program += "runpy.run_module('lowrank_jax', run_name='__main__', alter_sys=True)"
    line = [sys.executable, "-c", program]
    return subprocess.run(line, cwd=ROOT, env=os.environ | runs.ENVIRONMENT, capture_output=True, text=True)


@pytest.mark.parametrize("args", [(), ("--help",)])
def test_the_list_has_a_line_for_each_command_and_imports_no_jax(args):
    done = run(*args, last="print('jax' in sys.modules)")
    *lines, has_jax = done.stdout.splitlines()
    lines = [line.split() for line in lines if line.startswith("  ")]
    assert done.returncode == 0 and has_jax == "False", done.stderr
    assert [line[0] for line in lines] == list(COMMANDS) and min(map(len, lines)) > 3


def test_an_unknown_command_is_one_line_with_its_near_matches():
    done = run("trian", last="None")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown command 'trian'; use train\n"
    done = run("nothing", last="None")
    assert done.stderr.count("\n") == 1 and all(name in done.stderr for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_an_unknown_flag(name):
    module, function = COMMANDS[name]
    command = getattr(importlib.import_module(f"lowrank_jax.{module}"), function)
    with pytest.raises((UsageError, SystemExit)):
        command(["--no_such_flag=1"])


PATHS = {"train": "workdir config", "plan": "config", "evaluate": "workdir", "generate": "workdir", "serve": "workdir"}
PATHS |= {"report": "workdir", "compress": "from out", "import": "from workdir tokenizer config"}
PATHS |= {"export": "workdir out", "tokenize": "tokenizer out", "learn_tokenizer": "out"}
PATHS |= {"verify_resume": "config folder bucket", "launch_local": ""}  # its flags are those of train


@pytest.mark.parametrize("name", COMMANDS)
def test_every_path_of_a_command_is_local_and_has_its_home_expanded(name, tmp_path, monkeypatch):
    """Add a new flag for a path to PATHS; with `Parser.add_path` it behaves like the others."""
    module, function = COMMANDS[name]
    command = getattr(importlib.import_module(f"lowrank_jax.{module}"), function)
    monkeypatch.chdir(tmp_path)
    for flag in PATHS[name].split():
        for text in ("http://host/x", "~nobody-of-that-name/x"):
            with pytest.raises(UsageError, match=f"^--{flag}={text} "):
                command([f"--{flag}={text}"])
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "name, flags",
    [
        ("evaluate", ["--workdir=none", "--lengths=64,1000000000000"]),
        ("tokenize", ["--tokenizer=none", "--sources=text:a", "--out=none", "--shards=1000000000"]),
        ("tokenize", ["--tokenizer=none", "--sources=text:a", "--out=none", "--workers=1000000000"]),
    ],
)
def test_a_flag_has_a_bound_that_machines_can_hold(name, flags):
    module, function = COMMANDS[name]
    with pytest.raises(UsageError, match=f"{flags[-1].split('=')[0]}.* at most [0-9,]+$"):
        getattr(importlib.import_module(f"lowrank_jax.{module}"), function)(flags)


def test_train_prepares_the_process_before_jax_and_spares_its_imports():
    first = "from lowrank_jax.machine import startup\n"
    first += "startup.prepare = lambda: print('prepared', 'jax' in sys.modules)\n"
    first += "startup.spare_imports = lambda: print('spared', 'jax' in sys.modules)"
    done = run("train", "--help", first=first, last="None")
    assert done.returncode == 0 and done.stdout.startswith("prepared False\nspared True\nusage: ")
    done = run("plan", "--help", first=first, last="None")
    assert done.returncode == 0 and done.stdout.startswith("usage: ")
