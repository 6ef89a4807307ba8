"""The folder of an export for PyTorch or ONNX: what is in each of them, and how it comes to be whole or not at all."""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np

from lowrank_jax.config import PhaseConfig, RunConfig
from lowrank_jax.export import hf_tokenizer, verify, weights
from lowrank_jax.training.progress import Progress
from lowrank_jax.training.trained import Trained

ORIGIN, TOKENIZER = "lowrank_jax.json", "tokenizer"  # what an import needs beside the weights, see importer.py
PUBLIC = ("hf", "tfds", "builtin")  # kinds of sources whose places are names, not paths


@contextlib.contextmanager
def whole_folder(out: str) -> Iterator[str]:
    """A path beside `out` that becomes `out` if nothing is raised, and otherwise leaves nothing behind."""
    parent = os.path.dirname(out)
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=parent) as hidden:
        yield (made := os.path.join(hidden, "export"))
        os.makedirs(os.path.dirname(out), exist_ok=True)
        if os.path.isdir(out):  # an empty one: rename replaces it on POSIX alone
            os.rmdir(out)
        os.rename(made, out)


def write(trained: Trained, folder: str, settings: dict, texts: dict[str, str], code: Sequence[str] = ()) -> None:
    """Makes the folder of config.json with the model's sizes and `settings`, the tokenizer, and `texts` by name.

    `code` are files of this package. Raises UsageError for a tokenizer that cannot be described.
    """
    config, tokenizer, _, _ = trained
    length = verify.longest(config)
    texts = texts | hf_tokenizer.files(tokenizer, length)
    texts["config.json"] = as_json(weights.settings(config.model, tokenizer, length) | settings)
    os.makedirs(folder, exist_ok=True)
    for name, text in texts.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8", newline="") as f:
            f.write(text)
    for name in code:
        shutil.copyfile(os.path.join(os.path.dirname(__file__), name), os.path.join(folder, name))


def write_weights(trained: Trained, folder: str, found: dict[str, np.ndarray], format: str) -> None:
    """Adds weights.FILE, as readable as the config.json that `write` made, and what an import needs beside it."""
    weights.save(found, os.path.join(folder, weights.FILE), format)
    shutil.copymode(os.path.join(folder, "config.json"), os.path.join(folder, weights.FILE))
    config, tokenizer, _, progress = trained
    with open(os.path.join(folder, ORIGIN), "w", encoding="utf-8") as f:
        f.write(as_json({"config": without_places(config).to_dict(), "progress": plain(progress)}))
    tokenizer.save(os.path.join(folder, TOKENIZER))


def as_json(value: dict) -> str:
    return json.dumps(value, indent=2) + "\n"


def plain(progress: Progress) -> dict:
    """What a run's progress says in numbers and words."""
    return {
        key: value for key, value in progress.to_dict().items() if isinstance(value, (int, float, str)) and value != ""
    }


def without_places(config: RunConfig) -> RunConfig:
    """The config without paths, but for the last part of each source's: where files lay is nobody's business."""

    def name(spec: str) -> str:
        kind, _, place = spec.partition(":")
        return f"{kind}:{place if kind in PUBLIC else os.path.basename(place)}"

    def phase(p: PhaseConfig) -> PhaseConfig:
        return dataclasses.replace(p, sources=tuple(dataclasses.replace(s, spec=name(s.spec)) for s in p.sources))

    tokenizer = dataclasses.replace(config.tokenizer, path="")
    phases = {"pretrain": phase(config.pretrain), "sft": phase(config.sft)}
    return dataclasses.replace(config, init_from="", tokenizer=tokenizer, **phases)


def facts(config: RunConfig, progress: Progress) -> str:
    """A table for a card: what the model is and, as far as the progress tells it, what it has been trained on."""
    c, sources = config.model, lambda p: ", ".join(f"`{source.spec}`" for source in p.sources)
    known = without_places(config)
    found = {
        "width, layers, heads": f"{c.d}, {c.layers}, {c.heads}",
        "ranks of Q, K, V, O": ", ".join(map(str, c.ranks)) if c.rank else "dense",
        "vocabulary": f"{c.vocab:,}",
        "longest sequence in training": f"{verify.longest(config):,}",
        "precision in training": config.precision,
        "pretraining data": sources(known.pretrain),
    }
    if config.sft.steps:
        found["chat data"] = sources(known.sft)
    shown = {key: f"{value:,}" if isinstance(value, int) else value for key, value in plain(progress).items()}
    found |= {f"`{key}` in training": value for key, value in shown.items()}
    return "| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in found.items())
