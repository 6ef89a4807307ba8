"""Text and JSON files, in blocks whose place follows from their number: there is no index to build, whatever the size.

Block k of a plain file starts at byte k x `size`, and holds the lines (or the one piece of text) that start in it, as
Hadoop's input splits do. A compressed file or one JSON array can only be read from its start, so it is one block.
"""

import bz2
import contextlib
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import stat
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import fsspec

from lowrank_jax.config import UsageError
from lowrank_jax.data import blocks, encodings, records
from lowrank_jax.data.blocks import BadRecord, Document, InFiles
from lowrank_jax.machine.console import say

if sys.version_info >= (3, 14):  # not zstandard, which does not notice a file that is cut short
    from compression import zstd
else:
    from backports import zstd

SMALLEST, BLOCKS = 2 << 10, 200  # small corpora get small blocks, so that there are blocks to shuffle
REMOTE_BLOCK = 4 << 20  # a request to a bucket takes as long as reading a megabyte does
LONGEST_LINE = 64 << 20  # bytes of one record in memory
LARGEST_ARRAY = 1 << 30
READ = 1 << 20
DAMAGE_SHOWS = 1 << 20  # bytes: bzip2, for example, checks what it unpacks after each 900 kB
SAMPLE = encodings.HEAD  # bytes of a file's head, middle and tail that are hashed
OPENERS, SLOW = 16, 2e-3  # threads that look at many files if each takes that many seconds
BUCKET_HASHES = ("ETag", "etag", "md5Hash", "blob_id")  # of S3, HTTP, Google Cloud Storage and the Hugging Face hub
BOM = encodings.UTF8_BOM

LONGEST_WINDOW = {zstd.DecompressionParameter.window_log_max: 31}  # of `zstd --long=31`: the default refuses above 27
COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
COMPRESSED[".zst"] = functools.partial(zstd.open, options=LONGEST_WINDOW)
PACKING = 3  # bytes of text in a packed byte: English prose in gzip has 2.5 to 3.5
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError, UnicodeDecodeError)
BREAKS = ((b"\n\n", b"\n\r\n", b"\r\r"), (b"\n",), (b"\r",), (b" ",))  # a text may have lines of LF, CRLF or CR


def find(spec: str, pattern: str) -> list[str]:
    """Return the files that a glob matches, local or in a bucket (gs://, s3://), sorted; raises UsageError for none."""
    if _is_remote(pattern):
        matches = paths = _find_remote(spec, pattern)
    else:
        pattern = os.path.expanduser(pattern)
        matches = [pattern] if os.path.lexists(pattern) else glob.glob(pattern, recursive=True)
        kinds = {path: kind_of(path) for path in matches}
        paths = sorted(path for path in matches if kinds[path] == "a file")
        for path, kind in kinds.items():
            if kind not in ("a file", "a folder"):
                remedy = "name regular files, because they are read several times"
                raise UsageError(f"source {spec}: {path} is {kind}; {remedy}")
    if matches and not paths:
        raise UsageError(f"source {spec}: {matches[0]} is a folder; name its files, as in {matches[0].rstrip('/')}/*")
    if not paths:
        raise UsageError(f"source {spec}: no such file")
    return paths


def _find_remote(spec: str, pattern: str) -> list[str]:
    try:
        system, inner = fsspec.core.url_to_fs(pattern)
        return sorted(system.unstrip_protocol(p) for p in system.glob(inner) if system.isfile(p))
    except ImportError as e:  # fsspec says which package it needs
        raise UsageError(f"source {spec}: {blocks.one_line(e)}, for example with pip, or copy the files here") from None
    except Exception as e:  # a network and its libraries may raise anything
        raise UsageError(f"source {spec}: cannot be opened: {blocks.one_line(e)}") from None


def kind_of(path: str) -> str:
    """Return what is at a local path, without opening it: "a file", "a folder", "a named pipe" and so on."""
    try:
        mode = os.stat(path).st_mode
    except OSError as e:
        is_broken = os.path.islink(path)
        return f"a broken link to {os.readlink(path)}" if is_broken else f"not readable ({e.strerror})"
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def sample(path: str) -> tuple[int, str]:
    """Return a file's size and a hash of it with the head, middle and tail, or with all of a small file.

    For a file in a bucket, the hash that the bucket keeps is taken instead, or else the name.
    """
    if not _is_remote(path):
        with _listed(path):
            facts = os.stat(path)
            return facts.st_size, _digest(path, facts.st_size, facts.st_mtime_ns, facts.st_ino)
    system, inner = fsspec.core.url_to_fs(path)
    facts = system.info(inner)
    hashes = [str(facts[key]) for key in BUCKET_HASHES if facts.get(key)]
    return facts["size"], blocks.fingerprint([facts["size"], *(hashes or [os.path.basename(path)])])


@functools.lru_cache(1 << 16)  # a run opens a source four times: tokenizer, first check, training, evaluation
def _digest(path: str, n: int, *_) -> str:
    digest, is_small = hashlib.sha256(b"%d " % n), n <= 3 * SAMPLE
    with open(path, "rb", buffering=0) as f:
        for start in (0,) if is_small else (0, (n - SAMPLE) // 2, n - SAMPLE):
            f.seek(start)
            digest.update(f.read(n if is_small else SAMPLE))
    return digest.hexdigest()[:16]


def unpacked(path: str, size: int) -> int:
    """Return about how many bytes a file of `size` bytes has when it is unpacked."""
    return size * (PACKING if path.endswith((*COMPRESSED, ".parquet")) else 1)


def beginning(path: str) -> bytes:
    """Return the first bytes of a file."""
    if _is_remote(path):  # an open file would fetch megabytes ahead
        system, inner = fsspec.core.url_to_fs(path)
        return system.cat_file(inner, 0, min(encodings.HEAD, system.size(inner)))
    with _listed(path), open(path, "rb", buffering=0) as f:
        return f.read(encodings.HEAD)


@contextlib.contextmanager
def _listed(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UsageError(f"{path} is gone since its folder was listed; start again once the files stay") from None


def at_once(look: Callable[[str], tuple], paths: Sequence[str]) -> list[tuple]:
    """Return `look(path)` of each file; several at a time if the first two are slow, as on a network."""
    started = time.monotonic()
    facts = [look(path) for path in paths[:2]]
    if time.monotonic() - started < 2 * SLOW:  # threads would take longer: 0.5 s instead of 0.13 s for 5,000 files
        return facts + [look(path) for path in paths[2:]]
    with ThreadPoolExecutor(OPENERS) as pool:
        return facts + list(pool.map(look, paths[2:]))


class Watch:
    """Says once if a local file is no longer what it was when its source was opened; buckets keep their objects."""

    def __init__(self, digests: dict[str, str]):
        self._digests, self._looks = digests, {}

    def look(self, path: str) -> None:
        """Compare the size and time of a file with the last look, and if they differ its contents with the first."""
        with contextlib.suppress(OSError, UsageError):  # which reading reports
            facts = None if _is_remote(path) else os.stat(path)
            if facts and self._looks.get(path) != (looks := (facts.st_size, facts.st_mtime_ns)):
                self._looks[path] = looks
                if sample(path)[1] != self._digests[path]:
                    what = "has changed while it is read, so a resume of this run will refuse it until it is put back"
                    say(f"warning: {blocks.printable(path)} {what}", everyone=True)


class _Files(InFiles):
    """Blocks of `largest` bytes at most: `_part` reads one of a plain file, and `_whole` a file that is one block."""

    def __init__(self, paths: list[str]):
        facts = at_once(self._facts, paths)
        sizes, self._wholes = [n for n, *_ in facts], {p for p, (*_, is_whole) in zip(paths, facts) if is_whole}
        largest = REMOTE_BLOCK if any(map(_is_remote, paths)) else self.largest
        self.size = min(max(sum(sizes) // BLOCKS, SMALLEST), largest)
        self.number_blocks(paths, [bool(n) if p in self._wholes else -(-n // self.size) for p, n in zip(paths, sizes)])
        self.bytes = sum(unpacked(path, n) for path, n in zip(paths, sizes))
        self._watch = Watch({path: digest for path, (_, digest, _) in zip(paths, facts)})
        self.fingerprint = blocks.fingerprint_of_files([digest for _, digest, _ in facts], type(self).__name__)
        self.old_fingerprint = blocks.fingerprint([(os.path.basename(p), n) for p, n in zip(paths, sizes)])

    def rows(self, block: int, start: int = 0) -> Iterator:
        path, k = self.locate(block)
        self._watch.look(path)
        return itertools.islice(self._whole(path) if path in self._wholes else self._part(path, k), start, None)

    def _facts(self, path: str) -> tuple[int, str, bool]:
        is_compressed = os.path.splitext(path)[1] in COMPRESSED
        return *sample(path), is_compressed or self._is_whole(beginning(path), path)

    def _is_whole(self, head: bytes, path: str) -> bool:
        """Return whether a file that is not compressed can only be read from its start."""
        return encodings.detect(head, path) != "utf-8"


class TextFiles(_Files):
    """Text, cut into pieces at blank lines, line ends or spaces: a block of a plain file is one piece."""

    largest = 64 << 10  # a document is little larger, which bounds its memory

    def document(self, row: tuple[str, int, bytes]) -> Document:
        path, offset, raw = row
        if encodings.has_nuls(raw):  # such as UTF-16 that a shell appended
            raise BadRecord(path, f"has NUL bytes, from byte {offset + raw.index(0)} on, so it is no UTF-8 text there")
        try:
            return {"text": raw.decode("utf-8-sig" if offset == 0 else "utf-8").strip("\r\n")}
        except UnicodeDecodeError as e:
            raise BadRecord(path, f"not UTF-8 text at byte {offset + e.start}") from None

    def place(self, row: tuple[str, int, bytes]) -> str:
        return f"{row[0]}, byte {row[1]}"

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
        with _unpacked(path, lambda: f"byte {offset + len(raw)}") as (f, _):
            while raw := raw + f.read(2 * self.size - len(raw)):
                stop = self.size + _break(raw[self.size :]) if len(raw) > self.size else len(raw)
                if raw[:stop].strip():
                    yield path, offset, raw[:stop]
                raw, offset = raw[stop:], offset + stop


class JsonFiles(_Files):
    """JSON lines of one object each, or one array of objects per file."""

    largest = 128 << 10  # about a hundred web pages

    def __init__(self, paths: list[str], text_key: str, messages_key: str, chats: bool):
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
            return records.document(_parse(raw) if isinstance(raw, bytes) else raw, *self._keys, where)
        except (ValueError, RecursionError, BadRecord) as e:
            reason = e.reason if isinstance(e, BadRecord) else f"not JSON: {e}"
            raise BadRecord(where, reason, exact) from None

    def place(self, row: tuple[str, int, object, int]) -> str:
        path, number, _, offset = row
        return f"{path}, record {number or _line_number(path, offset)}"

    def _is_whole(self, head: bytes, path: str) -> bool:
        return super()._is_whole(head, path) or encodings.begins(head, "[")

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
        number = 0
        with _unpacked(path, lambda: f"record {number + 1}") as (f, head):
            if encodings.begins(head, "["):
                yield from ((path, i, record, 0) for i, record in enumerate(self._array(path), 1))
                return
            for number, (_, line) in enumerate(_lines(f.readline), 1):
                if line.strip():
                    yield path, number, line, 0


def _is_remote(path: str) -> bool:
    return "://" in path


def open_file(path: str) -> BinaryIO:
    """Open a file to read, local or in a bucket."""
    return fsspec.open(path, "rb").open() if _is_remote(path) else open(path, "rb")


@contextlib.contextmanager
def _unpacked(path: str, place: Callable[[], str]) -> Iterator[tuple[BinaryIO, bytes]]:
    """Open a file as UTF-8, unpacked, with its head; damage that a read meets is a BadRecord at `place()`."""
    with COMPRESSED.get(os.path.splitext(path)[1], lambda f: f)(open_file(path)) as f:
        try:
            head = _head(f)
            try:
                encoding = encodings.detect(head, path)
            except UsageError:
                f.read(DAMAGE_SHOWS)  # raises if the head is no other encoding, but what damage made of text
                raise
            yield f if encoding == "utf-8" else io.BufferedReader(encodings.AsUtf8(f, encoding)), head
        except (*DAMAGE, OSError) as e:
            if blocks.may_pass(e):
                raise
            raise BadRecord(f"{path}, {place()}", f"the file is damaged or cut short: {e}") from None


def encoding(path: str) -> str:
    """Return the encoding of a file's text; raises UsageError for a file that is none."""
    with _unpacked(path, lambda: "byte 0") as (_, head):
        return encodings.detect(head, path)


def _head(f: BinaryIO) -> bytes:
    """Return the first bytes of a file, as far as it is not damaged, and go back to its start."""
    head = b""
    try:
        while len(head) < encodings.HEAD and (part := f.read(512)):  # a read that meets damage gives nothing
            head += part
    except (*DAMAGE, OSError) as e:
        if blocks.may_pass(e):
            raise
    f.seek(0)
    return head


def _break(window: bytes) -> int:
    """Return where to cut text: after its first blank line, line end or space, or else between two characters."""
    for marks in BREAKS:  # `find` takes a tenth of the time of a regular expression
        if ends := [window.find(mark) + len(mark) for mark in marks if mark in window]:
            return min(ends)
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


def _parse(raw: bytes):
    """Return the value of a JSON text in UTF-8, the only encoding in which a file is cut into records."""
    return json.loads(raw.removeprefix(BOM).decode("utf-8", "surrogatepass"))


def _array(path: str) -> list:
    with _unpacked(path, lambda: "its array") as (f, _):
        raw = f.read(LARGEST_ARRAY + 1)
    if len(raw) > LARGEST_ARRAY:
        limit = f"more than {LARGEST_ARRAY >> 30} GiB"
        raise UsageError(f"{path} is one JSON array of {limit}; write one object per line instead")
    try:
        return _parse(raw)
    except (ValueError, RecursionError) as e:
        raise BadRecord(path, f"not JSON: {e}") from None
