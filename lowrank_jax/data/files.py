"""Text and JSON files, in blocks whose place follows from their number: there is no index to build, whatever the size.

Block k of a plain file starts at byte k x `size`, and holds the lines (or the one piece of text) that start in it, as
Hadoop's input splits do. A compressed file or one JSON array can only be read from its start, so it is one block.
"""

import bz2
import contextlib
import functools
import glob
import gzip
import itertools
import json
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import fsspec

from lowrank_jax.config import UsageError
from lowrank_jax.data import blocks, records
from lowrank_jax.data.blocks import BadRecord, Document, InFiles

if sys.version_info >= (3, 14):  # not zstandard, which does not notice a file that is cut short
    from compression import zstd
else:
    from backports import zstd

SMALLEST, BLOCKS = 2 << 10, 200  # small corpora get small blocks, so that there are blocks to shuffle
REMOTE_BLOCK = 4 << 20  # a request to a bucket takes as long as reading a megabyte does
LONGEST_LINE = 64 << 20  # bytes of one record in memory
LARGEST_ARRAY = 1 << 30
READ = 1 << 20
BOM = b"\xef\xbb\xbf"

COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": zstd.open}
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError)


def find(spec: str, pattern: str) -> list[str]:
    """Return the files that a glob matches, local or in a bucket (gs://, s3://), sorted; raises UsageError for none."""
    if _is_remote(pattern):
        system, inner = fsspec.core.url_to_fs(pattern)
        matches = paths = sorted(system.unstrip_protocol(p) for p in system.glob(inner) if system.isfile(p))
    else:
        matches = glob.glob(os.path.expanduser(pattern), recursive=True)
        paths = sorted(p for p in matches if os.path.isfile(p))
    if matches and not paths:
        raise UsageError(f"source {spec}: {matches[0]} is a folder; name its files, as in {matches[0].rstrip('/')}/*")
    if not paths:
        raise UsageError(f"source {spec}: no such file")
    return paths


def fingerprint(paths: list[str]) -> str:
    """Return a hash that changes if a file is added, removed, renamed or resized, but not if all files move."""
    return blocks.fingerprint([(os.path.basename(p), size(p)) for p in paths])


class _Files(InFiles):
    """Blocks of `largest` bytes at most: `_part` reads one of a plain file, and `_whole` a file that is one block."""

    def __init__(self, paths: list[str]):
        sizes = [size(p) for p in paths]
        largest = REMOTE_BLOCK if any(map(_is_remote, paths)) else self.largest
        self.size = min(max(sum(sizes) // BLOCKS, SMALLEST), largest)
        self.number_blocks(paths, [bool(n) if self._is_whole(p) else -(-n // self.size) for p, n in zip(paths, sizes)])
        self.fingerprint = fingerprint(paths)

    def rows(self, block: int, start: int = 0) -> Iterator:
        path, k = self.locate(block)
        return itertools.islice(self._whole(path) if self._is_whole(path) else self._part(path, k), start, None)

    def _is_whole(self, path: str) -> bool:
        return os.path.splitext(path)[1] in COMPRESSED


class TextFiles(_Files):
    """UTF-8 text, cut into pieces at blank lines, line ends or spaces: a block of a plain file is one piece."""

    largest = 64 << 10  # a document is little larger, which bounds its memory

    def document(self, row: tuple[str, int, bytes]) -> Document:
        path, offset, raw = row
        try:
            return {"text": raw.decode("utf-8-sig" if offset == 0 else "utf-8").strip("\n")}
        except UnicodeDecodeError as e:
            raise BadRecord(path, f"not UTF-8 text at byte {offset + e.start}") from None

    def _part(self, path: str, k: int) -> Iterator[tuple[str, int, bytes]]:
        """Yield the piece from the first break after byte k x size to the first break after byte (k + 1) x size."""
        with open_file(path) as f:
            f.seek(k * self.size)
            raw = f.read(2 * self.size)
        start = _break(raw[: self.size]) if k else 0
        stop = self.size + _break(raw[self.size : 2 * self.size])
        if raw[start:stop].strip():
            yield path, k * self.size + start, raw[start:stop]

    def _whole(self, path: str) -> Iterator[tuple[str, int, bytes]]:
        raw, offset = b"", 0
        with _unpacked(path, lambda: f"byte {offset + len(raw)}") as f:
            while raw := raw + f.read(2 * self.size - len(raw)):
                stop = self.size + _break(raw[self.size :]) if len(raw) > self.size else len(raw)
                if raw[:stop].strip():
                    yield path, offset, raw[:stop]
                raw, offset = raw[stop:], offset + stop


class JsonFiles(_Files):
    """JSON lines of one object each, or one array of objects per file."""

    largest = 128 << 10  # about a hundred web pages

    def __init__(self, paths: list[str], text_key: str, messages_key: str, chats: bool):
        is_compressed = super()._is_whole
        self._arrays = {p for p in paths if not is_compressed(p) and _starts_array(p)}
        self._keys = (text_key, messages_key, chats)
        self._array = functools.lru_cache(1)(_array)  # readers that share an array share its memory
        super().__init__(paths)

    def document(self, row: tuple[str, int, object, int]) -> Document:
        path, number, raw, offset = row
        where, exact = f"{path}, record {number}", None
        if not number:  # the number of a line in a large file is worth a scan only if the run ends with it
            where, exact = f"{path}, byte {offset}", lambda: f"{path}, record {_line_number(path, offset)}"
        if isinstance(raw, bytes) and len(raw) >= LONGEST_LINE:
            raise BadRecord(where, f"longer than {LONGEST_LINE >> 20} MiB", exact)
        try:
            return records.document(json.loads(raw) if isinstance(raw, bytes) else raw, *self._keys, where)
        except (ValueError, RecursionError, BadRecord) as e:
            reason = e.reason if isinstance(e, BadRecord) else f"not JSON: {e}"
            raise BadRecord(where, reason, exact) from None

    def _is_whole(self, path: str) -> bool:
        return path in self._arrays or super()._is_whole(path)

    def _part(self, path: str, k: int) -> Iterator[tuple]:
        offset = k * self.size
        with open_file(path) as f:
            if k:  # skip the rest of the line that the byte before the block belongs to
                f.seek(offset - 1)
                rest = f.readline(self.size + 1)
                if not rest.endswith(b"\n"):
                    return  # the line continues beyond this block
                offset += len(rest) - 1
            for start, line in _lines(f.readline, offset):
                if start >= (k + 1) * self.size:
                    return
                if line.strip():
                    yield path, 0, line, start

    def _whole(self, path: str) -> Iterator[tuple]:
        if path in self._arrays:
            yield from ((path, i, record, 0) for i, record in enumerate(self._array(path), 1))
            return
        number = 0
        with _unpacked(path, lambda: f"record {number + 1}") as f:
            for number, (_, line) in enumerate(_lines(f.readline), 1):
                if line.strip():
                    yield path, number, line, 0


def _is_remote(path: str) -> bool:
    return "://" in path


def open_file(path: str) -> BinaryIO:
    """Open a file to read, local or in a bucket."""
    return fsspec.open(path, "rb").open() if _is_remote(path) else open(path, "rb")


def size(path: str) -> int:
    """Return the bytes of a file, local or in a bucket."""
    if not _is_remote(path):
        return os.path.getsize(path)
    system, inner = fsspec.core.url_to_fs(path)
    return system.size(inner)


@contextlib.contextmanager
def _unpacked(path: str, place: Callable[[], str]) -> Iterator[BinaryIO]:
    """Open a compressed file; damage that a read meets is a BadRecord at `place()`."""
    with COMPRESSED[os.path.splitext(path)[1]](open_file(path)) as f:
        try:
            yield f
        except (*DAMAGE, OSError) as e:
            if blocks.may_pass(e):
                raise
            raise BadRecord(f"{path}, {place()}", f"the file is damaged or cut short: {e}") from None


def _break(window: bytes) -> int:
    """Return where to cut text: after its first blank line, line end or space, or else between two characters."""
    for mark in (b"\n\n", b"\n", b" "):
        if mark in window:
            return window.find(mark) + len(mark)
    return next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), len(window[:4]))


def _lines(readline: Callable[[int], bytes], offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield (offset in the file, line) without a BOM; only the beginning of a line that is too long."""
    while line := readline(LONGEST_LINE):
        size, end = len(line), line
        while len(end) == LONGEST_LINE and not end.endswith(b"\n"):
            end = readline(LONGEST_LINE)
            size += len(end)
        yield offset, line if offset else line.removeprefix(BOM)
        offset += size


def _line_number(path: str, offset: int) -> int:
    count = 1
    with open_file(path) as f:
        while offset > 0 and (raw := f.read(min(READ, offset))):
            count += raw.count(b"\n")
            offset -= len(raw)
    return count


def _starts_array(path: str) -> bool:
    with open_file(path) as f:
        return f.read(4096).removeprefix(BOM).lstrip()[:1] == b"["


def _array(path: str) -> list:
    if size(path) > LARGEST_ARRAY:
        raise UsageError(f"{path} is one JSON array of {size(path) / 1e9:.0f} GB; write one object per line instead")
    with open_file(path) as f:
        raw = f.read()
    try:
        return json.loads(raw.removeprefix(BOM))
    except (ValueError, RecursionError) as e:
        raise BadRecord(path, f"not JSON: {e}") from None
