"""The encoding of a text file, decided once from its beginning. A file that is no text is refused by its real kind."""

import codecs
import io
import re
from typing import BinaryIO

from lowrank_jax.config import UsageError

HEAD = 16 << 10  # bytes of a file that decide
UTF8_BOM = codecs.BOM_UTF8
WIDE = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}  # first: one begins with the mark of UTF-16
WIDE |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
FEW = 2  # lines with bytes that are not UTF-8, or such bytes: these are damage to single records, not an encoding
UNPACK = {".gz": "zcat", ".bz2": "bzcat", ".xz": "xzcat", ".zst": "zstdcat"}
FOREIGN = (  # (place, bytes, kind and remedy)
    (257, b"ustar", "a tar archive; unpack it, for example with `tar -xf`, and name the files in it"),
    (0, b"PK\x03\x04", "a zip archive; unpack it, for example with `unzip`, and name the files in it"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (0, b"Rar!\x1a\x07", "a rar archive; unpack it"),
    (0, b"\x1f\x8b", "compressed by gzip; give it a name that ends in .gz"),
    (0, b"\xfd7zXZ\0", "compressed by xz; give it a name that ends in .xz"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd; give it a name that ends in .zst"),
    (4, b"1AY&SY", "compressed by bzip2; give it a name that ends in .bz2"),
    (0, b"\x04\x22\x4d\x18", "compressed by lz4; unpack it"),
    (0, b"\x1f\x9d", "compressed by compress; unpack it"),
    (0, b"PAR1\x15", "a Parquet file; read it with parquet:"),
    (0, b"ARROW1\0\0", "an Arrow file; use hf:"),
    (0, b"\x89PNG\r\n", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"\x93NUMPY", "an array of NumPy"),
    (0, b"version https://git-lfs", "a pointer of Git LFS and not the data; fetch them with `git lfs pull`"),
    (0, b"%PDF-", "a PDF file; extract its text"),
    (0, b"SQLite format 3\0", "an SQLite database; export it"),
)


def detect(head: bytes, path: str) -> str:
    """Return the encoding of a file that begins with `head`: "utf-8", or "utf-16" or "utf-32" by its byte order mark.

    Raises UsageError for a file that is none of them. It takes more than a few damaged records to make one.
    """
    if encoding := _by_mark(head):
        return encoding
    for place, magic, kind in FOREIGN:
        if head.startswith(magic, place):
            raise UsageError(f"{path} is {kind}")
    if has_nuls(head):
        what = f"has NUL bytes, from byte {head.index(0)} on: it is UTF-16 without a byte order mark, or no text"
        raise UsageError(f"{path} {what}; convert it, {remedy('UTF-16LE' if head.index(0) % 2 else 'UTF-16BE', path)}")
    if not head.isascii() and (first := _first_foreign_byte(head)) is not None:
        what = f"is not UTF-8 text (byte {first} is 0x{head[first]:02x}), and it has no byte order mark"
        raise UsageError(f"{path} {what}; convert it, {remedy('WINDOWS-1252', path)}")
    return "utf-8"


def has_nuls(raw: bytes) -> bool:
    """Return whether bytes have more NULs than a text that is damaged in a few places."""
    return raw.count(0) > max(FEW, len(raw) // 100)


def begins(head: bytes, letter: str) -> bool:
    """Return whether a letter comes first in a file that begins with `head`, after white space."""
    return head.decode(_by_mark(head) or "utf-8-sig", "ignore").lstrip()[:1] == letter


def _by_mark(head: bytes) -> str | None:
    return next((encoding for mark, encoding in WIDE.items() if head.startswith(mark)), None)


def _first_foreign_byte(head: bytes) -> int | None:
    """Return the place of the first byte that is not UTF-8 if more than a few are not, and more than are; else None."""
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(head)  # a character may be cut at the end
    escaped = re.findall("[\udc80-\udcff]", text)
    others = sum(not c.isascii() for c in text) - len(escaped)
    lines = sum(re.search("[\udc80-\udcff]", line) is not None for line in text.split("\n"))
    is_much = lines > FEW or len(escaped) > max(FEW, len(head) // 100)
    if not is_much or len(escaped) <= others:
        return None
    return len(text[: text.index(escaped[0])].encode())


def remedy(encoding: str, path: str) -> str:
    """Return the words that name the command that converts a file."""
    unpack = next((f"{cat} {path} | " for suffix, cat in UNPACK.items() if path.endswith(suffix)), "")
    name = "" if unpack else f"{path} "
    return f"for example with `{unpack}iconv -f {encoding} -t UTF-8 {name}> NEW` if that is its encoding"


class AsUtf8(io.RawIOBase):
    """A file in UTF-16 or UTF-32, read as UTF-8. Half of a surrogate pair stays one, as in JSON's escapes."""

    def __init__(self, file: BinaryIO, encoding: str):
        self._file, self._rest, self._is_whole = file, b"", False
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not (self._rest or self._is_whole):
            raw = self._file.read(HEAD)
            self._is_whole = not raw  # half a character at the end raises when all before it is read
            self._rest = self._decoder.decode(raw, self._is_whole).encode("utf-8", "surrogatepass")
        n = min(len(buffer), len(self._rest))
        buffer[:n], self._rest = self._rest[:n], self._rest[n:]
        return n
