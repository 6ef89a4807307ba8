"""Text and JSON files in blocks that are found by arithmetic: no index to build, keep or load, whatever the size.

Block k of a plain file begins k x `size` bytes into it, and holds the lines (or the one piece of text) that begin
there, as Hadoop's input splits do. A compressed file, or one JSON array, can only be read from its start: one block.
"""

import bisect
import bz2
import collections
import contextlib
import glob
import gzip
import hashlib
import itertools
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import fsspec
from backports import zstd  # the standard library's of Python 3.14: zstandard does not notice a file that is cut short

from lowrank_jax.config import UsageError
from lowrank_jax.data import records
from lowrank_jax.data.records import BadRecord, Document

# Small corpora get small blocks, so that shuffling has something to work with. A document of text is at most 64 KiB and
# some, which bounds the memory that it takes; 128 KiB of JSON are about a hundred web pages.
SMALLEST, TEXT_BLOCK, JSON_BLOCK, BLOCKS = 2 << 10, 64 << 10, 128 << 10, 200
REMOTE_BLOCK = 4 << 20  # a read from a bucket takes as long as a megabyte does
LONGEST_LINE = 64 << 20  # what one record may hold in memory
LARGEST_ARRAY = 1 << 30
LEFT = 16  # interrupted reads that are kept open, see `Resumed`
READ = 1 << 20
BOM = b"\xef\xbb\xbf"

COMPRESSED: dict[str, Callable[[str], BinaryIO]] = {
    ".gz": lambda path: gzip.open(open_file(path)),
    ".bz2": lambda path: bz2.open(open_file(path)),
    ".xz": lambda path: lzma.open(open_file(path)),
    ".zst": lambda path: zstd.open(open_file(path)),
}
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError)


def find(spec: str, pattern: str) -> list[str]:
    """The files that a glob names, here or in a bucket (gs://, s3://), sorted. Raises UsageError for none."""
    if _is_remote(pattern):
        system, inner = fsspec.core.url_to_fs(pattern)
        paths = sorted(system.unstrip_protocol(p) for p in system.glob(inner) if system.isfile(p))
        matches = paths
    else:
        matches = glob.glob(os.path.expanduser(pattern), recursive=True)
        paths = sorted(p for p in matches if os.path.isfile(p))
    if matches and not paths:
        raise UsageError(f"source {spec}: {matches[0]} is a folder; name its files, as in {matches[0].rstrip('/')}/*")
    if not paths:
        raise UsageError(f"source {spec}: no such file")
    return paths


def fingerprint(paths: list[str]) -> str:
    """Changes when a file is added, taken away, renamed or changes its size, but not when all of them move."""
    facts = [(os.path.basename(p), _size(p)) for p in paths]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


class Resumed:
    """`rows` on top of `_read(block, start)`: whoever left off at a row finds the read still open there.

    A reader takes a large block in many small parts. To find the start of each part in a compressed or row-wise file
    would mean to read it from its beginning each time. Rows do not depend on this: it only saves the way there.
    """

    _read: Callable[[int, int], Iterator]

    def __init__(self):
        self._left = collections.OrderedDict()

    def rows(self, block: int, start: int = 0) -> Iterator:
        rows, at = self._left.pop((block, start), None) or self._read(block, start), start
        try:
            for row in rows:
                at += 1
                yield row
        except GeneratorExit:
            self._left[block, at] = rows
            with contextlib.suppress(KeyError):  # other threads may make room too
                while len(self._left) > LEFT:
                    self._left.popitem(last=False)
            raise


class _Files(Resumed):
    """Numbers the blocks of several files; what a block holds is up to `_plain` and `_packed`."""

    def __init__(self, paths: list[str], largest: int):
        super().__init__()
        sizes = [_size(p) for p in paths]
        largest = REMOTE_BLOCK if any(map(_is_remote, paths)) else largest
        self.size = min(max(sum(sizes) // BLOCKS, SMALLEST), largest)
        counts = [bool(n) if self._is_whole(p) else -(-n // self.size) for p, n in zip(paths, sizes)]
        self._paths, self._firsts = paths, [0, *itertools.accumulate(counts)]
        self.blocks, self.fingerprint = self._firsts[-1], fingerprint(paths)

    def _read(self, block: int, start: int) -> Iterator:
        file = bisect.bisect_right(self._firsts, block) - 1
        path = self._paths[file]
        rows = self._whole(path) if self._is_whole(path) else self._part(path, block - self._firsts[file])
        return itertools.islice(rows, start, None)

    def _is_whole(self, path: str) -> bool:
        return _compression(path) is not None


class TextFiles(_Files):
    """UTF-8 text, cut into pieces at blank lines, line ends or spaces: a block of a plain file is one piece."""

    def __init__(self, paths: list[str]):
        super().__init__(paths, TEXT_BLOCK)

    def document(self, row: tuple[str, int, bytes]) -> Document:
        path, offset, raw = row
        try:
            return {"text": raw.decode("utf-8-sig" if offset == 0 else "utf-8").strip("\n")}
        except UnicodeDecodeError as e:
            raise BadRecord(path, f"not UTF-8 text at byte {offset + e.start}") from None

    def _part(self, path: str, k: int) -> Iterator[tuple[str, int, bytes]]:
        """The piece between the break that follows byte k x size and the one that follows byte (k + 1) x size."""
        with open_file(path) as f:
            f.seek(k * self.size)
            raw = f.read(2 * self.size)
        start = _break(raw[: self.size]) if k else 0
        stop = self.size + _break(raw[self.size : 2 * self.size])
        if raw[start:stop].strip():
            yield path, k * self.size + start, raw[start:stop]

    def _whole(self, path: str) -> Iterator[tuple[str, int, bytes]]:
        raw, offset = b"", 0
        with _compression(path)(path) as f:
            while True:
                raw += _undamaged(f.read, 2 * self.size - len(raw), path, f"byte {offset + len(raw)}")
                if not raw:
                    return
                stop = self.size + _break(raw[self.size :]) if len(raw) > self.size else len(raw)
                if raw[:stop].strip():
                    yield path, offset, raw[:stop]
                raw, offset = raw[stop:], offset + stop


class JsonFiles(_Files):
    """A JSON object a line, or one array of objects a file."""

    def __init__(self, paths: list[str], text_key: str, messages_key: str, chats: bool):
        self._arrays = {p for p in paths if _compression(p) is None and _starts_array(p)}
        self._keys = (text_key, messages_key, chats)
        self._parsed = ("", [])  # the array read last: a window of its records needs the whole of it
        super().__init__(paths, JSON_BLOCK)

    def document(self, row: tuple[str, int, object, int]) -> Document:
        path, line, raw, offset = row
        if line:
            where, exact = f"{path}, record {line}", None
        else:  # the number of a line in a large file is only worth a scan if the run ends with it
            where, exact = f"{path}, byte {offset}", lambda: f"{path}, record {_line_number(path, offset)}"
        record = raw
        if isinstance(raw, bytes):
            if len(raw) >= LONGEST_LINE:
                raise BadRecord(where, f"longer than {LONGEST_LINE >> 20} MiB", exact)
            try:
                record = json.loads(raw)
            except (ValueError, RecursionError) as e:
                raise BadRecord(where, f"not JSON: {e}", exact) from None
        try:
            return records.document(record, *self._keys, where)
        except BadRecord as e:
            raise BadRecord(where, e.reason, exact) from None

    def _is_whole(self, path: str) -> bool:
        return path in self._arrays or super()._is_whole(path)

    def _part(self, path: str, k: int) -> Iterator[tuple]:
        """The lines whose first byte lies in block k."""
        at = k * self.size
        with open_file(path) as f:
            if k:  # to the end of the line that the byte before belongs to
                f.seek(at - 1)
                before = f.readline(self.size + 1)
                if not before.endswith(b"\n"):
                    return  # it goes on beyond this block
                at += len(before) - 1
            for raw, size in _lines(f.readline):
                if at >= (k + 1) * self.size:
                    return
                line = raw if at else raw.removeprefix(BOM)
                if line.strip():
                    yield path, 0, line, at
                at += size

    def _whole(self, path: str) -> Iterator[tuple]:
        if path in self._arrays:
            parsed = self._parsed  # another reader's thread may put another file there at any moment
            if parsed[0] != path:
                parsed = self._parsed = (path, _array(path))
            yield from ((path, i, record, 0) for i, record in enumerate(parsed[1], 1))
            return
        with _compression(path)(path) as f:
            number = 0

            def readline(n: int) -> bytes:
                return _undamaged(f.readline, n, path, f"record {number + 1}")

            for raw, _ in _lines(readline):
                number += 1
                line = raw if number > 1 else raw.removeprefix(BOM)
                if line.strip():
                    yield path, number, line, 0


def _is_remote(path: str) -> bool:
    return "://" in path


def open_file(path: str) -> BinaryIO:
    return fsspec.open(path, "rb").open() if _is_remote(path) else open(path, "rb")


def _size(path: str) -> int:
    if _is_remote(path):
        system, inner = fsspec.core.url_to_fs(path)
        return system.size(inner)
    return os.path.getsize(path)


def _compression(path: str) -> Callable[[str], BinaryIO] | None:
    return COMPRESSED.get(os.path.splitext(path)[1])


def _undamaged(read: Callable[[int], bytes], n: int, path: str, where: str) -> bytes:
    try:
        return read(n)
    except (*DAMAGE, OSError) as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise  # the system's, which may pass; those of gzip and bz2 have no number
        raise BadRecord(f"{path}, {where}", f"the file is damaged or cut short: {e}") from None


def _break(window: bytes) -> int:
    """Where to cut text within `window`: after its first blank line, line end or space, or between two characters."""
    for mark in (b"\n\n", b"\n", b" "):
        if mark in window:
            return window.find(mark) + len(mark)
    return next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), len(window[:4]))


def _lines(readline: Callable[[int], bytes]) -> Iterator[tuple[bytes, int]]:
    """(line, its size in bytes); of a line that is too long only the beginning."""
    while line := readline(LONGEST_LINE):
        size, end = len(line), line
        while len(end) == LONGEST_LINE and not end.endswith(b"\n"):
            end = readline(LONGEST_LINE)
            size += len(end)
        yield line, size


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
    if _size(path) > LARGEST_ARRAY:
        raise UsageError(f"{path} is one JSON array of {_size(path) / 1e9:.0f} GB; write one object a line instead")
    with open_file(path) as f:
        raw = f.read()
    try:
        return json.loads(raw.removeprefix(BOM))
    except (ValueError, RecursionError) as e:
        raise BadRecord(path, f"not JSON: {e}") from None
