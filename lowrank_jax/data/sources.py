"""Opens sources, `kind:location`. For a new kind, write a class like `blocks.Source` and open it in `open_source`."""

import functools
from collections.abc import Iterator

from lowrank_jax.config import SourceConfig, UsageError
from lowrank_jax.data import builtin, files, shards, tables
from lowrank_jax.data.blocks import Source, fingerprint
from lowrank_jax.data.records import Document

KINDS = ("text", "json", "parquet", "hf", "tfds", "arrayrecord", "builtin")


def open_source(source: SourceConfig, chats: bool = False) -> Source:
    """Open a source, of conversations with `chats`; raises UsageError, which names it, if there is none."""
    kind, _, location = source.spec.partition(":")
    keys = (source.text_key, source.messages_key, chats)
    match kind:
        case "text":
            return files.TextFiles(files.find(source.spec, location))
        case "json":
            return files.JsonFiles(files.find(source.spec, location), *keys)
        case "parquet":
            return tables.Parquet(files.find(source.spec, location), *keys)
        case "hf":
            name, _, config = location.partition(":")
            return tables.hugging_face(name, config, source.split, *keys)
        case "tfds":
            return tables.TFDS(location, source.split, *keys)
        case "arrayrecord":
            return shards.ArrayRecord(location)
        case "builtin":
            return Builtin(location)
    raise UsageError(f"source {source.spec}: kind {kind!r} is not one of {', '.join(KINDS)}")


@functools.cache  # a run opens it four times: tokenizer, first check, training, evaluation
class Builtin:
    """A corpus in memory; every document is a block."""

    def __init__(self, name: str):
        self._documents = builtin.load(name)
        self.blocks, self.fingerprint = len(self._documents), fingerprint(self._documents)

    def rows(self, block: int, start: int = 0) -> Iterator[int]:
        return iter(range(block, block + 1 - min(start, 1)))

    def document(self, row: int) -> Document:
        return self._documents[row]
