"""Folders of exports: created whole or not at all, and the files that all of them share."""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np

from lowrank_jax.config import PhaseConfig, RunConfig, UsageError
from lowrank_jax.export import hf_tokenizer, verify, weights
from lowrank_jax.training.progress import Progress
from lowrank_jax.training.trained import Trained

ORIGIN, TOKENIZER = "lowrank_jax.json", "tokenizer"  # what an import needs beside weights and config.json
PUBLIC = ("hf", "tfds", "builtin")  # kinds of sources whose locations are names, not paths


def unused(path: str, flag: str) -> str:
    """Return the absolute path of a new or empty folder; raises UsageError for any other."""
    out = os.path.realpath(path)
    if os.path.lexists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise UsageError(f"{flag}={path} exists already; name a folder that is new or empty")
    return out


@contextlib.contextmanager
def whole_folder(out: str) -> Iterator[str]:
    """Yield a path beside `out` that is renamed to `out` at the end; an exception leaves nothing behind."""
    parent = os.path.dirname(out)
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=parent) as hidden:
        yield (folder := os.path.join(hidden, "export"))
        os.makedirs(os.path.dirname(out), exist_ok=True)
        if os.path.isdir(out):  # it is empty: os.rename replaces an empty folder on POSIX alone
            os.rmdir(out)
        os.rename(folder, out)


def write(
    trained: Trained, folder: str, texts: dict[str, str], code: Sequence[str] = (), settings: dict | None = None
) -> None:
    """Write config.json with `settings` besides the model's sizes, the tokenizer, and `texts` by file name.

    `code` names files of this package to copy. Raises UsageError for a tokenizer that cannot be described.
    """
    os.makedirs(folder, exist_ok=True)
    length = verify.longest(trained.config)
    config = weights.settings(trained.config.model, trained.tokenizer, length) | (settings or {})
    texts = texts | hf_tokenizer.files(trained.tokenizer, length) | {"config.json": as_json(config)}
    for name, text in texts.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8", newline="") as f:
            f.write(text)
    for name in code:
        shutil.copyfile(os.path.join(os.path.dirname(__file__), name), os.path.join(folder, name))


def write_weights(trained: Trained, folder: str, tensors: dict[str, np.ndarray]) -> None:
    """Add the weights, and what an import needs besides, to a folder that `write` has filled."""
    verify.need("safetensors")
    from safetensors.numpy import save_file

    path = os.path.join(folder, weights.FILE)
    save_file(tensors, path, metadata={"format": "pt"})
    shutil.copymode(os.path.join(folder, "config.json"), path)  # save_file lets only the owner read it
    with open(os.path.join(folder, ORIGIN), "w", encoding="utf-8") as f:
        f.write(as_json({"config": without_paths(trained.config).to_dict(), "progress": plain(trained.progress)}))
    trained.tokenizer.save(os.path.join(folder, TOKENIZER))


def as_json(value: dict) -> str:
    return json.dumps(value, indent=2) + "\n"


def plain(progress: Progress) -> dict:
    """Return the numbers and words of a run's progress."""
    return {key: x for key, x in dataclasses.asdict(progress).items() if isinstance(x, (int, float, str)) and x != ""}


def without_paths(config: RunConfig) -> RunConfig:
    """Return the config with no path but the last part of each source: an export tells nothing of the machine."""

    def name(spec: str) -> str:
        kind, _, place = spec.partition(":")
        return f"{kind}:{place if kind in PUBLIC else os.path.basename(place)}"

    def phase(p: PhaseConfig) -> PhaseConfig:
        return dataclasses.replace(p, sources=tuple(dataclasses.replace(s, spec=name(s.spec)) for s in p.sources))

    tokenizer = dataclasses.replace(config.tokenizer, path="")
    phases = {"pretrain": phase(config.pretrain), "sft": phase(config.sft)}
    return dataclasses.replace(config, init_from="", tokenizer=tokenizer, **phases)


def facts(trained: Trained) -> str:
    """Return a Markdown table for a card: the model's sizes and what it was trained on."""
    config, c = without_paths(trained.config), trained.config.model
    sources = lambda p: ", ".join(f"`{source.spec}`" for source in p.sources)
    rows = {
        "width, layers, heads": f"{c.d}, {c.layers}, {c.heads}",
        "ranks of Q, K, V, O": ", ".join(map(str, c.ranks)) if c.rank else "dense",
        "vocabulary": f"{c.vocab:,}",
        "longest sequence in training": f"{verify.longest(config):,}",
        "precision in training": config.precision,
        "pretraining data": sources(config.pretrain),
    }
    if config.sft.steps:
        rows["chat data"] = sources(config.sft)
    shown = {key: f"{value:,}" if isinstance(value, int) else value for key, value in plain(trained.progress).items()}
    rows |= {f"`{key}` in training": value for key, value in shown.items()}
    return "| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in rows.items())
