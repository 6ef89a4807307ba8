"""Opens sources, `kind:location`. For a new kind, write a class like `blocks.Source` and add it to `KINDS`."""

import re
from collections.abc import Callable
from typing import TypeVar

from lowrank_jax.config import SourceConfig, UsageError
from lowrank_jax.data import builtin, files, shards, tables
from lowrank_jax.data.blocks import Source, one_line
from lowrank_jax.machine import storage
from lowrank_jax.machine.console import say

T = TypeVar("T")

KINDS = {
    "text": lambda source, location, keys: files.TextFiles(files.find(source.spec, location)),
    "json": lambda source, location, keys: files.JsonFiles(files.find(source.spec, location), *keys),
    "parquet": lambda source, location, keys: tables.Parquet(files.find(source.spec, location), *keys),
    "hf": lambda source, location, keys: tables.hugging_face(*location.partition(":")[::2], source.split, *keys),
    "tfds": lambda source, location, keys: tables.TFDS(location, source.split, *keys),
    "arrayrecord": lambda source, location, keys: shards.ArrayRecord(location),
    "builtin": lambda source, location, keys: builtin.Builtin(location),
}

IN_BUCKETS = ("text", "json", "parquet")  # kinds that read gs:// and s3://


def open_source(source: SourceConfig, chats: bool = False) -> Source:
    """Open a source, of conversations with `chats`; raises UsageError, which names it, if there is none."""
    kind, _, location = source.spec.partition(":")
    if kind not in KINDS:
        raise UsageError(f"source {source.spec}: kind {kind!r} is not one of {', '.join(KINDS)}")
    if kind not in IN_BUCKETS and (scheme := re.match(r"[A-Za-z][\w+.-]*:/", location)):
        remedy = f"{kind}: does not read {scheme[0]}/ locations; copy or mount it, and name the local path"
        raise UsageError(f"source {source.spec}: {remedy}")
    return patiently(lambda: KINDS[kind](source, location, (source.text_key, source.messages_key, chats)))


def patiently(read: Callable[[], T]) -> T:
    """Return `read()`, which a failure that may pass does not end at once: the first reads of a run have no Reader."""
    return storage.again(read, note=lambda e, pause: say(f"retry in {pause:g} s: {one_line(e)}"))
