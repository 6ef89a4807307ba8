"""The commands as real processes: the settings of a tiny run, and helpers that start it and read its files."""

import atexit
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import forks

from lowrank_jax.machine import startup

ROOT = pathlib.Path(__file__).parents[1]
WORDS = "the cat sat on a mat while two dogs ran over some hills and then slept under old trees".split()
TINY = {
    "model.d": 32,
    "model.layers": 2,
    "model.heads": 2,
    "model.rank": 4,
    "tokenizer.vocab_size": 400,
    "pretrain.steps": 9,
    "pretrain.tokens_per_step": 256,
    "pretrain.microbatch_tokens": 128,
    "pretrain.block": 16,
    "pretrain.grow_plan": "16,32,64",
    "pretrain.grow_every_steps": 3,
    "pretrain.eval_fraction": 0.1,
    "pretrain.eval_tokens": 256,
    "pretrain.sample": "The cat",
    "sft.steps": 4,
    "sft.tokens_per_step": 256,
    "sft.block": 64,
    "sft.eval_fraction": 0.1,
    "sft.eval_tokens": 128,
    "track": "",  # TensorBoard's package imports PyTorch where it is installed, 3 CPU seconds a run
    "every.log": 1,
    "every.eval": 5,
    "every.save": 2,
}
STEPS = TINY["pretrain.steps"] + TINY["sft.steps"]


# Compiled programs of all processes, as dozens of processes run the same programs. The first process creates the folder
# and deletes it at its end. A folder that LOWRANK_TEST_CACHE names stays, which makes later test runs faster.
CACHE = os.environ.get("LOWRANK_TEST_CACHE") or tempfile.mkdtemp(prefix="lowrank_jax_test_cache_")
if "LOWRANK_TEST_CACHE" not in os.environ:
    os.environ["LOWRANK_TEST_CACHE"] = CACHE
    atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
# Tests spend nearly all their time compiling. Without LLVM's passes a tiny run's programs compile in 15 CPU seconds,
# without XLA's fusion emitters in 7. With huge pages on, no command restarts itself to request them (startup.py).
# XLA since JAX 0.11 aborts on that flag: its emitters are always on.
FUSIONS = {"xla_cpu_use_fusion_emitters": True} if importlib.metadata.version("jax").startswith("0.10.") else {}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": CACHE,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": " ".join(["--xla_backend_optimization_level=0", *(f"--{name}=false" for name in FUSIONS)]),
    startup.TUNABLES: "glibc.malloc.hugetlb=1",
}


def launch(module: str, *args: str, faults: str = "", fresh: bool = False, patches: dict | None = None, **popen):
    """Start a command, as a fork of a process that has imported the package, or with `fresh` as a new Python.

    `patches` are values that a fork sets in the package, such as {"lowrank_jax.training.recovery.ALONE_SECONDS": 2}.
    """
    env = os.environ | ENVIRONMENT | {"LOWRANK_FAULTS": faults} | popen.pop("env", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | popen
    if fresh:
        command = [sys.executable, "-m", f"lowrank_jax.{module}", *args]
        return subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes)
    forks.start_server(ENVIRONMENT)
    return forks.Fork(f"lowrank_jax.{module}", list(args), ROOT, env, patches or {}, **pipes)


def run(module: str, *args: str, faults: str = "", stdin: str | None = None):
    process = launch(module, *args, faults=faults, stdin=subprocess.PIPE)
    out, err = process.communicate(stdin, timeout=300)
    return process.returncode, out, err


def train_args(data: pathlib.Path, workdir, **changes) -> list[str]:
    settings = {
        "pretrain.sources": f"text:{data}/*.txt,json:{data}/notes.jsonl",
        "sft.sources": f"json:{data}/chats.jsonl",
    }
    settings |= TINY | {key.replace("__", "."): value for key, value in changes.items()}
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    return ["--config=configs/quickstart.py", f"--workdir={workdir}", *overrides]


def train(data, workdir, faults: str = "", **changes):
    return run("main", "--json", *train_args(data, workdir, **changes), faults=faults)


def last_json(out: str) -> dict:
    return json.loads(out.strip().splitlines()[-1])


def rows(workdir, name: str) -> list[dict]:
    return [json.loads(line) for line in (pathlib.Path(workdir) / name).read_text().splitlines()]


def assert_one_line(code: int, err: str, status: int, *names: str) -> None:
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == status and len(errors) == 1 and "Traceback" not in err, err
    for name in names:
        assert name in errors[0], errors[0]


def same_end(workdir, reference) -> bool:
    """Return whether two runs have the same weights, data and losses at every step."""
    finish, expected = rows(workdir, "events.jsonl")[-1], rows(reference, "events.jsonl")[-1]
    facts = lambda folder: [
        (row["step"], row.get("loss"), row.get("eval_loss"), row.get("lr")) for row in rows(folder, "metrics.jsonl")
    ]
    assert facts(workdir) == facts(reference)
    keys = ("event", "params_sha256", "data_sha256", "tokens")
    return [finish[key] for key in keys] == [expected[key] for key in keys]
