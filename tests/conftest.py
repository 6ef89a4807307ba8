"""Helpers of several test files: invented text, files of it, a small tokenizer, and configs built on the defaults."""

import copy
import json
import os
import pathlib
import random
import sys
import types

import absl.logging
import backend  # noqa: F401, which starts JAX
import jax
import pytest
import runs
from hypothesis import settings

from configs import default
from lowrank_jax.config import PhaseConfig, RunConfig, UsageError
from lowrank_jax.data import tokenizer
from lowrank_jax.machine import devices

settings.register_profile("toy", deadline=None, database=None, derandomize=True)
settings.load_profile("toy")
# uvicorn closes all handlers of logs when it starts, and absl's then closes its stream, unless that is stderr itself.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__


def pytest_collection_modifyitems(items):
    """Mark as slow the tests that train in a process (they use `data` or `eight`) and the interpreted splash kernel.

    Other slow files and tests have the mark themselves.
    """
    for item in items:
        if {"data", "eight"} & set(item.fixturenames) or "splash" in item.name:
            item.add_marker(pytest.mark.slow)


def _failed_if_skipped(report):
    """Return the report of a test or file. With LOWRANK_NO_SKIP, which scripts/test.sh sets, a skip is a failure."""
    if report.skipped and os.environ.get("LOWRANK_NO_SKIP"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"{reason} (LOWRANK_NO_SKIP is set: nothing may be skipped)"
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport():
    return _failed_if_skipped((yield))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report():
    return _failed_if_skipped((yield))


SYLLABLES = "ba ce di fo gu ha je ki lo mu na pe ri so tu va we xi yo zu".split()


def prose(words: int, seed: int = 0) -> str:
    """Return invented sentences, the same for the same seed."""
    draw = random.Random(seed)
    text = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 3))) for _ in range(words)]
    return " ".join(w.capitalize() + "." if i % 9 == 8 else w for i, w in enumerate(text))


def chat(turns: int, seed: int = 0) -> list[dict]:
    """Return an invented conversation in which user and assistant take turns."""
    return [
        {"role": ("user", "assistant")[i % 2], "content": prose(3 + (seed + i) % 5, seed=100 * seed + i)}
        for i in range(turns)
    ]


def write_jsonl(path, rows: list) -> str:
    """Write a row per line, and return the source that names the file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"json:{path}"


def run_config(**changes) -> RunConfig:
    """Return a config of toy size; `changes` are dotted keys with __ for the dot, such as model__d=16."""
    values = copy.deepcopy(default.get_config().to_dict())
    values["model"] |= {"vocab": 64, "d": 16, "layers": 2, "heads": 2, "rank": 4, "latent_norm": True}
    for key, value in changes.items():
        *groups, last = key.split("__")
        group = values
        for name in groups:
            group = group[name]
        assert last in group, key
        group[last] = value
    return RunConfig.from_dict(values)


def phase(sources, **changes) -> PhaseConfig:
    """Return a phase that reads `sources`, text or a list; by default it holds no documents out."""
    changes = {"sources": sources, "eval_fraction": 0.0} | changes
    return run_config(**{f"pretrain__{key}": value for key, value in changes.items()}).pretrain


def described(name: str) -> list[jax.Device]:
    """Return the topology's devices; skips the test where their compiler, which exists for Linux alone, is missing."""
    try:
        return devices.topology(name)
    except UsageError as e:
        if "is not installed" in str(e):
            pytest.skip(str(e))
        raise


@pytest.fixture(scope="session")
def tok() -> tokenizer.Tokenizer:
    """A tokenizer of 521 pieces, learned from invented prose, with bytes for any other text."""
    return tokenizer.train([prose(2000)], 521)


@pytest.fixture(scope="session")
def make():
    """The helpers of this file, for tests to call."""
    return types.SimpleNamespace(prose=prose, chat=chat, write_jsonl=write_jsonl, run_config=run_config, phase=phase)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("data")
    sentence = lambda i, n: " ".join(runs.WORDS[(i * 7 + j * j) % len(runs.WORDS)] for j in range(n)).capitalize() + "."
    for name in "ab":
        paragraphs = [" ".join(sentence(i + j + ord(name), 9) for j in range(6)) for i in range(40)]
        (folder / f"{name}.txt").write_text("\n\n".join(paragraphs))
    (folder / "notes.jsonl").write_text("".join(json.dumps({"text": sentence(i, 20)}) + "\n" for i in range(60)))
    turn = lambda i: [{"role": "user", "content": sentence(i, 4)}, {"role": "assistant", "content": sentence(i + 3, 5)}]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": turn(i)}) + "\n" for i in range(60)))
    return folder


@pytest.fixture(scope="session")
def reference(data, tmp_path_factory) -> pathlib.Path:
    """The folder of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("runs") / "reference"
    code, out, err = runs.train(data, workdir)
    assert code == 0, err
    assert runs.last_json(out)["step"] == runs.STEPS and "\r" not in out
    return workdir
