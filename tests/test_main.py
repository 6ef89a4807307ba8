"""`python -m lowrank_jax` lists the commands without JAX, runs them, and names near matches of an unknown one."""

import ast
import importlib
import os
import pathlib
import subprocess
import sys

import pytest
import runs

import lowrank_jax
from lowrank_jax import __main__ as program
from lowrank_jax import cli, generate
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


@pytest.mark.parametrize(
    "name, near",
    [
        ("trian", "error: unknown command 'trian'; use train"),
        ("verfy_resume", "error: unknown command 'verfy_resume'; use verify-resume"),
        ("main", "error: unknown command 'main'; use train"),
        ("lowrank_jax.trainer", "error: lowrank_jax.trainer is no command; use python -m lowrank_jax train"),
        ("lowrank_jax.config", "error: lowrank_jax.config is no command; use python -m lowrank_jax config"),
        (
            "lowrank_jax.inference.server",
            "error: lowrank_jax.inference.server is no command; use python -m lowrank_jax serve",
        ),
    ],
)
def test_an_unknown_name_is_answered_with_the_command_that_was_meant(name, near):
    assert program.unknown(name) == near


def test_a_module_that_is_no_program_is_refused_when_it_is_run(monkeypatch):
    refused = []
    monkeypatch.setattr(program, "refuse", refused.append)
    package, programs, modules = pathlib.Path(lowrank_jax.__path__[0]), [], []
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        blocks = [ast.unparse(node.test) for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)]
        name = ".".join(parts[:-1] if parts[-1] in ("__init__", "__main__") else parts)
        (programs if "__name__ == '__main__'" in blocks else modules).append(name)
    modules = [name for name in modules if name not in programs]
    for name in [*programs, *modules, "lowrank_jax.trainer", "lowrank_jax.configs.quickstart"]:
        lowrank_jax._refuse_others(name)
    assert len(programs) >= 12 and len(modules) > 60
    assert refused == [*modules, "lowrank_jax.trainer", "lowrank_jax.configs.quickstart"]


@pytest.mark.parametrize("option", [["-m", "lowrank_jax.config"], ["-mlowrank_jax.config", "--help", "-m"]])
def test_python_m_of_a_module_that_is_no_program_is_one_line_and_status_2(option):
    done = subprocess.run([sys.executable, *option], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: lowrank_jax.config is no command; use python -m lowrank_jax config\n"


def test_dashes_and_underscores_are_alike_in_commands_and_flags(monkeypatch):
    started = []
    monkeypatch.setattr(cli, "main", lambda command: started.append((command.__name__, sys.argv)))
    for name in ("learn-tokenizer", "learn_tokenizer"):
        monkeypatch.setattr(sys, "argv", ["/usr/bin/lowrank", name, "--help"])
        program.main()
    assert started == [("learn_tokenizer", ["lowrank learn-tokenizer", "--help"])] * 2
    for flag in ("--max-tokens", "--max_tokens"):
        assert generate.arguments(["--workdir=run", "--prompt=a=b", f"{flag}=7", "--top-p", "0.5"]).max_tokens == 7


def test_chat_is_generate_with_chat(monkeypatch):
    monkeypatch.setattr(generate, "command", lambda argv: argv)
    assert generate.chat(["--workdir=run"]) == ["--chat", "--workdir=run"]


def test_an_unknown_flag_is_answered_with_the_flag_that_was_meant():
    with pytest.raises(UsageError, match="^unrecognized arguments: --max_token=3; did you mean --max_tokens"):
        generate.arguments(["--workdir=run", "--prompt=x", "--max_token=3"])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_an_unknown_flag(name):
    module, function = COMMANDS[name]
    command = getattr(importlib.import_module(f"lowrank_jax.{module}"), function)
    with pytest.raises((UsageError, SystemExit)):
        command(["--no_such_flag=1"])


PATHS = {"train": "workdir config", "plan": "config", "evaluate": "workdir", "generate": "workdir", "serve": "workdir"}
PATHS |= {"report": "workdir", "compress": "from out", "import": "from workdir tokenizer config"}
PATHS |= {
    "export": "workdir out",
    "tokenize": "tokenizer out",
    "learn-tokenizer": "out",
    "chat": "workdir",
    "config": "",
}
PATHS |= {"verify-resume": "config folder bucket", "launch-local": ""}  # its flags are those of train


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
