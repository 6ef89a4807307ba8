"""Where documents come from: `kind:location` -> documents in blocks that can be read in any order.

| kind | location | block |
|---|---|---|
| text, json | glob of files, here or in a bucket; .gz, .bz2, .xz, .zst | a range of bytes; a compressed file |
| parquet | glob of files | a row group |
| hf | hub name, folder or file, for the `datasets` library | a shard |
| tfds | name[/config][:version] | 64 records |
| arrayrecord | glob or folder of shards written by scripts/tokenize.py | 64 records |
| builtin | a corpus that ships in a Python package | a document |
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Protocol

from lowrank_jax.config import SourceConfig, UsageError
from lowrank_jax.data import builtin, files, tables
from lowrank_jax.data.records import Document

KINDS = ("text", "json", "parquet", "hf", "tfds", "arrayrecord", "builtin")


class Source(Protocol):
    """Documents in blocks that can be read in any order; the same arguments always give the same rows.

    Any method may raise OSError, for a read that may work when it is tried again.
    """

    blocks: int
    fingerprint: str
    """Changes when the data does, and not when it moves to another folder."""

    def rows(self, block: int, start: int = 0) -> Iterator:
        """The rows of a block from the `start`-th on: cheap, and bounded in memory.

        Raises BadRecord where the rest of the block cannot be read.
        """

    def document(self, row) -> Document:
        """What a row says; raises BadRecord where it cannot be used."""


class Builtin:
    """A corpus in memory; every document is a block."""

    def __init__(self, name: str):
        self._documents = builtin.load(name)
        self.blocks = len(self._documents)
        self.fingerprint = hashlib.sha256(json.dumps(self._documents).encode()).hexdigest()[:16]

    def rows(self, block: int, start: int = 0) -> Iterator[int]:
        return iter(range(block, block + 1 - min(start, 1)))

    def document(self, row: int) -> Document:
        return self._documents[row]


_builtin = functools.cache(Builtin)  # opened for the tokenizer, a first look, training and evaluation


def open_source(source: SourceConfig, chats: bool = False) -> Source:
    """The documents of a source, read as conversations where there are some if `chats`.

    Raises UsageError, naming it, where it is not there or its kind is unknown.
    """
    kind, _, location = source.spec.partition(":")
    keys = (source.text_key, source.messages_key, chats)
    if kind == "builtin":
        return _builtin(location)
    if kind == "hf":
        name, _, config = location.partition(":")
        return tables.hugging_face(name, config, source.split, *keys)
    if kind == "tfds":
        return tables.TFDS(location, source.split, *keys)
    if kind not in KINDS:
        raise UsageError(f"source {source.spec}: kind {kind!r} is not one of {', '.join(KINDS)}")
    if kind == "arrayrecord":
        return tables.ArrayRecord(location)
    paths = files.find(source.spec, location)
    if kind == "text":
        return files.TextFiles(paths)
    return files.JsonFiles(paths, *keys) if kind == "json" else tables.Parquet(paths, *keys)
