"""The identity of a run: its tokenizer, its precision, and the settings that a resume may not change."""

import dataclasses
import os
import pathlib
import platform
import shlex
import subprocess
import sys

import jax
from jax.sharding import Mesh

from lowrank_jax.config import RECORDED, RunConfig, UsageError
from lowrank_jax.data import stream, tokenizer
from lowrank_jax.data.tokenizer import Tokenizer, pieces_for
from lowrank_jax.machine import processes, sharding, storage
from lowrank_jax.machine.console import say
from lowrank_jax.model import precision
from lowrank_jax.training import mirror, run_folder


def open_config(folder: str, flag: str = "--workdir") -> tuple[RunConfig, Tokenizer]:
    """Return a run's config and tokenizer; raises UsageError where the tokenizer's files are not those of the run."""
    (config, sha256), path = run_folder.read_identity(folder, flag), run_folder.tokenizer_folder(folder)
    if not os.path.isdir(path):
        raise UsageError(f"{flag}={folder} has no tokenizer: {path} is missing")
    if sha256 and storage.again(lambda: tokenizer.folder_sha256(path)) != sha256:
        remedy = f"restore them from a copy, or delete {RECORDED} in config.json to use them as they are"
        raise UsageError(f"{path} is damaged: its files are not those that {folder} was trained with; {remedy}")
    return config, tokenizer.load(path)


def first_tokenizer(config: RunConfig) -> Tokenizer | None:
    """Return the tokenizer that a new run of this config takes, or None where it learns one."""
    if config.tokenizer.path or not config.init_from:
        return tokenizer.load(config.tokenizer.path) if config.tokenizer.path else None
    with mirror.opened(config.init_from, "config.init_from") as folder:
        return open_config(folder, "config.init_from")[1]


def with_tokenizer(config: RunConfig) -> tuple[RunConfig, Tokenizer | None]:
    """Return a new run's config with the size of its vocabulary, and the tokenizer, or None where it will be learned.

    Where the config names no size, that follows from the sources, which must exist.
    """
    if tok := first_tokenizer(config):
        return config.with_vocab(tok.vocab_size), tok
    size = config.tokenizer.vocab_size or config.model.vocab
    size = size or pieces_for(stream.corpus_bytes([s for p in config.phases.values() for s in p.sources]))
    return _with_learned(config, size).with_vocab(size), None


def _with_learned(config: RunConfig, vocab_size: int) -> RunConfig:
    return dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, vocab_size=vocab_size))


def resume(config: RunConfig, folder: str) -> tuple[RunConfig, RunConfig, Tokenizer]:
    """Return (config with the run's vocabulary and precision, the run's own config, its tokenizer).

    Raises UsageError where the config is that of another run. A tokenizer with the same files is the same one, wherever
    it lies.
    """
    old, tok = open_config(folder)
    if not config.tokenizer.vocab_size:
        config = _with_learned(config, old.tokenizer.vocab_size)
    config = _keep_precision(config.with_vocab(tok.vocab_size), old, run_folder.read_rows(folder, "events.jsonl"))
    is_auto, t = "auto" in (old.precision, config.precision), config.tokenizer
    same = {"precision": config.precision} if is_auto else {}
    if t.path and (t.path == old.tokenizer.path or tokenizer.load(t.path).files_sha256 == tok.files_sha256):
        same["tokenizer"] = t
    run_folder.check_same_run(folder, dataclasses.replace(old, **same), config)
    return config, old, tok


def _keep_precision(config: RunConfig, old: RunConfig, events: list[dict]) -> RunConfig:
    """Return the config with the precision that the run had for an `auto` that is another on this device.

    Raises UsageError where the config names another one than the run had.
    """
    had = [event["precision"] for event in events if isinstance(event.get("precision"), str)][-1:]
    was = had[0] if old.precision == "auto" and had else old.precision
    now = precision.resolve(config.precision, jax.devices()[0].platform)
    if was in ("auto", now) or (config.precision != "auto" and old.precision != "auto"):
        return config
    if config.precision != "auto":
        raise UsageError(f"config.precision={now}, but the run began with auto, which was {was}; use {was}, or auto")
    return dataclasses.replace(config, precision=was)


def announce(config: RunConfig, old: RunConfig | None, mesh: Mesh) -> dict:
    """Say what the run trains on, and every setting that has changed since its last start; return both as facts."""
    device, changes = sharding.a_device(mesh), run_folder.differences(old or config, config)
    facts = {"devices": mesh.devices.size, "processes": processes.count(), "mesh": dict(mesh.shape)}
    facts["precision"] = precision.resolve(config.precision, device.platform)
    kind = device.platform if device.platform == device.device_kind else f"{device.platform} ({device.device_kind})"
    axes, why = ", ".join(f"{axis} {n}" for axis, n in mesh.shape.items()), ""
    if config.precision == "auto":
        why = " (auto)"
    elif old and config.precision != (auto := precision.resolve("auto", device.platform)):
        why = f" (as the run had it; auto is {auto} on this device)"
    say(f"training on {mesh.devices.size} x {kind} (mesh {axes}), precision {facts['precision']}{why}")
    for key, was, now in changes:
        say(f"config.{key} was {run_folder.describe(was)}, is {run_folder.describe(now)}")
    facts |= {"command": shlex.join(sys.orig_argv), "hardware": f"{kind}, {os.cpu_count()} CPU cores"}
    facts |= {"versions": f"Python {platform.python_version()}, JAX {jax.__version__}", "commit": _commit()}
    return facts | {"changed": [f"{key}: {was} -> {now}" for key, was, now in changes]}


def _commit() -> str | None:
    """Return the commit of the checkout that the package lies in, with + where files differ; None outside of one."""
    root = pathlib.Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed, perhaps below the checkout of something else
        return None
    command = ["git", "-C", root, "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip() or None
