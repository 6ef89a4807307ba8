"""Shards of tokenised documents: the ArrayRecord files that the command `tokenize` writes, and how a run reads them."""

import contextlib
import functools
import glob
import json
import os
from collections.abc import Iterator

import numpy as np

from lowrank_jax.config import UsageError
from lowrank_jax.data import blocks, files
from lowrank_jax.data.blocks import BadRecord, Document, InFiles

RUN = 64  # records in a block
READ_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
META, FORMAT, SUFFIX = "meta.json", 1, ".array_record"
WRITE = "write the shards with `python -m lowrank_jax tokenize`"


def encode_record(ids: np.ndarray, said: np.ndarray) -> bytes:
    """Return a document as bytes: its ids, a bit for each of `said`, and a byte that tells the form.

    The ids are little-endian uint16, or uint32 if one needs it. No bits are written if all tokens but BOS carry weight.
    """
    wide, masked = bool(ids.max(initial=0) > 0xFFFF), bool(said[:1].any() or not said[1:].all())
    mask = np.packbits(said, bitorder="little").tobytes() if masked else b""
    return ids.astype("<u4" if wide else "<u2").tobytes() + mask + bytes([wide | masked << 1])


def decode_record(raw: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids int32, said bool) of what `encode_record` wrote; raises ValueError for anything else."""
    if not raw or raw[-1] > 3:
        raise ValueError("not a record of tokens")
    wide, masked, size = raw[-1] & 1, raw[-1] >> 1, len(raw) - 1
    width = 4 if wide else 2
    n = 8 * size // (8 * width + 1) if masked else size // width  # n ids and n bits, rounded up to bytes
    if size != n * width + (-(-n // 8) if masked else 0):
        raise ValueError("a record of tokens is cut short")
    ids = np.frombuffer(raw, "<u4" if wide else "<u2", n).astype(np.int32)
    if masked:
        bits = np.frombuffer(raw, np.uint8, size - n * width, n * width)
        return ids, np.unpackbits(bits, count=n, bitorder="little").view(bool)
    return ids, np.arange(n) > 0


def open_writer(path: str):
    """Create a shard; its `write` takes what `encode_record` returns."""
    from array_record.python.array_record_module import ArrayRecordWriter

    return ArrayRecordWriter(path, f"group_size:{RUN},uncompressed")  # a read takes a whole block; ids hardly compress


class ArrayRecord(InFiles):
    """A folder or a glob of shards, for a run of the same `tokenizer_sha256` and `chats`; a block is 64 records."""

    def __init__(self, location: str):
        module = blocks.import_package("array_record.python.array_record_module", "array-record")
        self._reader = functools.lru_cache(RUN)(lambda path: module.ArrayRecordReader(path, READ_OPTIONS))
        location = os.path.expanduser(location)
        pattern = os.path.join(glob.escape(location), "*" + SUFFIX) if os.path.isdir(location) else location
        try:
            paths = files.find(f"arrayrecord:{location}", pattern)
        except UsageError as e:
            raise UsageError(f"{e}; {WRITE}") from None
        metas = {folder: _read_meta(folder) for folder in dict.fromkeys(map(os.path.dirname, paths))}
        (self.tokenizer_sha256, self.chats), *others = {(m["tokenizer_sha256"], m["chats"]) for m in metas.values()}
        if others:
            raise UsageError(f"source arrayrecord:{location}: its folders differ in their tokenizer or --chats")
        if os.path.isdir(location) and len(paths) != metas[os.path.dirname(paths[0])]["shards"]:
            raise UsageError(f"source arrayrecord:{location}: shards are missing; write it again")
        self._counts = {path: self._count(path, metas[os.path.dirname(path)]) for path in paths}
        self.number_blocks(paths, [-(-n // RUN) for n in self._counts.values()])
        samples = files.at_once(files.sample, paths)
        facts = [(os.path.basename(p), size, n) for (p, n), (size, _) in zip(self._counts.items(), samples)]
        self.old_fingerprint = blocks.fingerprint([self.tokenizer_sha256, self.chats, *facts])
        self.bytes, digests = sum(size for size, _ in samples), [digest for _, digest in samples]
        self.fingerprint = blocks.fingerprint_of_files(digests, "ArrayRecord", self.tokenizer_sha256, self.chats)

    def rows(self, block: int, start: int = 0) -> Iterator[tuple[str, int, bytes]]:
        path, block_in_file = self.locate(block)
        first, stop = block_in_file * RUN + start, min((block_in_file + 1) * RUN, self._counts[path])
        if first >= stop:
            return
        try:
            encoded = self._reader(path).read(first, stop)
        except (RuntimeError, ValueError, IndexError) as e:
            raise BadRecord(f"{path}, record {first} to {stop - 1}", f"damaged: {blocks.one_line(e)}") from None
        yield from ((path, i, raw) for i, raw in enumerate(encoded, first))

    def document(self, row: tuple[str, int, bytes]) -> Document:
        try:
            ids, said = decode_record(row[2])
        except ValueError as e:
            raise BadRecord(self.place(row), str(e)) from None
        return {"ids": ids, "said": said}

    def place(self, row: tuple[str, int, bytes]) -> str:
        return f"{row[0]}, record {row[1]}"

    def _count(self, path: str, meta: dict) -> int:
        with contextlib.suppress(RuntimeError, ValueError):
            if (count := self._reader(path).num_records()) == meta["records"].get(os.path.basename(path)):
                return count
        raise UsageError(f"{path} is damaged, or was not written with its {META}; {WRITE}")


def _read_meta(folder: str) -> dict:
    path = os.path.join(folder, META)
    if not os.path.isfile(path):
        raise UsageError(f"{path}: no such file; {WRITE}")
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError), open(path, encoding="utf-8") as f:
        meta = json.load(f)
        types = {"tokenizer_sha256": str, "chats": bool, "shards": int, "records": dict}
        if meta["format"] == FORMAT and all(isinstance(meta[key], kind) for key, kind in types.items()):
            return meta
    raise UsageError(f"{path} is not from this version of `tokenize`; {WRITE}")
