"""Folders of exports: created whole or not at all, and the files that all of them share."""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from lowrank_jax.config import RunConfig, RunFailure, UsageError
from lowrank_jax.export import hf_tokenizer, verify, weights
from lowrank_jax.machine import bucket, storage
from lowrank_jax.training.plan import Progress
from lowrank_jax.training.trained import Trained

ORIGIN, TOKENIZER = "lowrank_jax.json", "tokenizer"  # what an import needs beside weights and config.json
HIDDEN, LOCK = ".export-", "lowrank_jax.lock"  # an unfinished folder, and the file in it that its process locks
FULL = os.strerror(errno.ENOSPC)
PUBLIC = ("hf", "tfds", "builtin")  # kinds of sources whose locations are names, not paths


def unused(path: str, flag: str) -> str:
    """Return the absolute path of a new or empty folder that can be created; raises UsageError for any other."""
    if bucket.is_remote(path):
        raise UsageError(f"{flag}={path} must be a new local folder; copy it into the bucket afterwards")
    out = os.path.realpath(path)
    try:
        is_new, reason = not os.listdir(out), ""
    except FileNotFoundError:
        is_new, reason = True, ""
    except OSError as e:  # a file, a path below a file, a name that is too long
        is_new, reason = not os.path.lexists(out), e.strerror
    if not is_new:
        raise UsageError(f"{flag}={path} exists already; name a folder that is new or empty")
    if not os.access(parent := _existing_parent(out), os.W_OK | os.X_OK):
        reason = f"{parent} does not let you write"
    if reason:
        raise UsageError(f"{flag}={path} cannot be created: {reason}")
    return out


def _existing_parent(path: str) -> str:
    while not os.path.isdir(path := os.path.dirname(path)):
        pass
    return path


@contextlib.contextmanager
def whole_folder(out: str) -> Iterator[str]:
    """Yield a path beside `out` that is renamed to `out` at the end; an exception leaves nothing behind.

    What a kill leaves is removed by the next export: the lock in it is free.
    """
    parent = _existing_parent(out)
    for name in os.listdir(parent):
        lock = os.path.join(parent, name, LOCK)
        if name.startswith(HIDDEN) and os.path.isfile(lock) and not os.path.islink(os.path.dirname(lock)):
            with contextlib.suppress(OSError), storage.lock(lock):  # another export may be running
                shutil.rmtree(os.path.dirname(lock), ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=HIDDEN, dir=parent) as hidden, storage.lock(os.path.join(hidden, LOCK)):
        try:
            yield (folder := os.path.join(hidden, "export"))
        except Exception as e:  # some libraries have an exception of their own for a full disk
            if FULL not in str(e):
                raise
            raise RunFailure(f"{out} cannot be written: {FULL[0].lower()}{FULL[1:]}") from None
        os.makedirs(os.path.dirname(out), exist_ok=True)
        if os.path.isdir(out):  # it is empty: os.rename replaces an empty folder on POSIX alone
            os.rmdir(out)
        os.rename(folder, out)


def write(trained: Trained, folder: str, texts: dict[str, str], settings: dict | None = None) -> None:
    """Write config.json, the tokenizer and `texts`; raises UsageError for a tokenizer that cannot be described."""
    length = verify.longest(trained.config)
    config = weights.settings(trained.config.model, trained.tokenizer, length) | (settings or {})
    texts = texts | hf_tokenizer.files(trained.tokenizer, length) | {"config.json": as_json(config)}
    os.makedirs(folder, exist_ok=True)
    for name, text in texts.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8", newline="") as f:
            f.write(text)


def write_weights(trained: Trained, folder: str, texts: dict[str, str], tensors: dict, settings: dict | None = None):
    """Do the same, and write the weights and what an import needs besides."""
    verify.need("safetensors")
    from safetensors.numpy import save_file

    origin = {"config": settings_without_paths(trained.config), "progress": plain(trained.progress)}
    write(trained, folder, texts | {ORIGIN: as_json(origin)}, settings)
    path = os.path.join(folder, weights.FILE)
    save_file(tensors, path, metadata={"format": "pt"})
    shutil.copymode(os.path.join(folder, ORIGIN), path)  # save_file lets only the owner read it
    trained.tokenizer.save(os.path.join(folder, TOKENIZER))


def as_json(value: dict) -> str:
    return json.dumps(value, indent=2) + "\n"


def packaged(name: str, **words: str) -> str:
    """Return the text of a file of this package, with each {word} in it replaced by its value."""
    text = (pathlib.Path(__file__).parent / name).read_text(encoding="utf-8")
    for word, value in words.items():
        text = text.replace("{" + word + "}", value)
    return text


def plain(progress: Progress) -> dict:
    """Return the numbers and words of a run's progress."""
    return {key: x for key, x in dataclasses.asdict(progress).items() if isinstance(x, (int, float, str)) and x != ""}


def settings_without_paths(config: RunConfig) -> dict:
    """Return plain settings with no path but the last part of each source: an export tells nothing of the machine."""
    values = config.to_dict()
    values["tokenizer"]["path"] = ""
    values["init_from"] = "" if config.pretrain.steps else os.path.basename(os.path.abspath(config.init_from))
    for source in (*values["pretrain"]["sources"], *values["sft"]["sources"]):
        kind, _, place = source["spec"].partition(":")
        if kind not in PUBLIC:
            source["spec"] = f"{kind}:{os.path.basename(place)}"
    return values


def facts(trained: Trained) -> str:
    """Return a Markdown table for a card: the model's sizes and what it was trained on."""
    config, c, settings = trained.config, trained.config.model, settings_without_paths(trained.config)
    sources = lambda phase: ", ".join(f"`{_cell(source['spec'])}`" for source in settings[phase]["sources"])
    rows = {
        "width, layers, heads": f"{c.d}, {c.layers}, {c.heads}",
        "ranks of Q, K, V, O": ", ".join(str(rank or "dense") for rank in c.ranks) if c.rank else "dense",
        "vocabulary": f"{c.vocab:,}",
        "longest sequence in training": f"{verify.longest(config):,}",
        "precision in training": config.precision,
    }
    rows |= {f"{'chat' if name == 'sft' else 'pretraining'} data": sources(name) for name in trained.phases}
    text = lambda value: f"{value:,}" if isinstance(value, int) else f"`{_cell(str(value))}`"
    shown = {key: text(value) for key, value in plain(trained.progress).items()}
    rows |= {f"`{key}` in training": value for key, value in shown.items()}
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def _cell(text: str) -> str:
    """Return a run's text as part of one cell of a Markdown table: it ends neither code, nor the cell, nor the line."""
    line = " ".join(text.encode("utf-8", "replace").decode().replace("`", "'").replace("<", "&lt;").split())
    return "".join(c if c.isprintable() else "?" for c in line[:200]).replace("|", "\\|")
