"""The interface of sources, and what several kinds share. A source keeps no position: any row of it can be read."""

import bisect
import gzip
import hashlib
import importlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, Protocol

from lowrank_jax.config import UsageError

Document = dict[str, Any]
"""{"text": str}, {"messages": [{"role": str, "content": str}]}, or tokens:
{"ids": int32 array from BOS to EOS, "said": bool array, whether a token carries weight as a target}."""


class BadRecord(Exception):
    """An unusable record; if `rows` raises it, the rest of the block is unusable.

    `where` is cheap; `exact()`, if not None, scans a file to return the file and line, as `str` does.
    """

    def __init__(self, where: str, reason: str, exact: Callable[[], str] | None = None):
        self.where, self.reason, self.exact = printable(where), printable(reason), exact

    def __str__(self) -> str:
        return f"{printable(self.exact()) if self.exact else self.where}: {self.reason}"


class Source(Protocol):
    """Documents in blocks, the same whenever they are read; methods raise OSError for a read that may work again."""

    blocks: int
    bytes: int
    """About how many bytes its files have, unpacked; 0 where that is unknown."""
    fingerprint: str
    """Changes when the data does, and not when its files move or have other names that sort in the same order."""

    def rows(self, block: int, start: int = 0) -> Iterator:
        """Yield a block's rows from the `start`-th on; raises BadRecord if the rest of the block cannot be read."""

    def document(self, row) -> Document:
        """Return the document of a row; raises BadRecord if it cannot be used."""

    def place(self, row) -> str:
        """Return the file and record that a row comes from, in words."""


def text_bytes(document: Document) -> int:
    """Return the bytes of a document's text, or of all that its messages say."""
    texts = [document.get("text") or "", *(str(m.get("content") or "") for m in document.get("messages", ()))]
    return sum(len(text.encode("utf-8", "replace")) for text in texts)


class InFiles:
    """Numbers the blocks of several files one after another."""

    def number_blocks(self, paths: Sequence[str], counts: Sequence[int]) -> None:
        """Set `blocks`, from the number of blocks in each file."""
        self._paths, self._firsts = list(paths), [0, *itertools.accumulate(counts)]
        self.blocks = self._firsts[-1]

    def locate(self, block: int) -> tuple[str, int]:
        """Return the file that holds a block, and the block's number in that file."""
        file = bisect.bisect_right(self._firsts, block) - 1
        return self._paths[file], block - self._firsts[file]


def fingerprint(facts) -> str:
    """Return a short hash of JSON values."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def fingerprint_of_files(digests: Sequence[str], *facts) -> str:
    """Return a hash of the files' contents in order, and one in any order, which tells a new order from new data."""
    return f"{fingerprint([facts, digests])}/{fingerprint([facts, sorted(digests)])}"


def may_pass(e: Exception) -> bool:
    """Return whether a failed read may work again; Arrow, bz2 and gzip raise OSError without errno for damaged data."""
    is_damage = type(e) in (OSError, gzip.BadGzipFile) and e.errno is None
    return isinstance(e, OSError) and not is_damage


def printable(text: str) -> str:
    """Return text without what UTF-8 or a terminal cannot take: names and keys may hold any bytes and escapes."""
    return re.sub("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "?", text)


def one_line(e: BaseException) -> str:
    """Return an error's text in one line of at most 200 characters."""
    text = " ".join(str(e).split()) or type(e).__name__
    return text if len(text) <= 200 else text[:200] + "..."


def import_package(module: str, packages: str) -> ModuleType:
    """Import what one kind of source needs; raises UsageError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UsageError(f"this source needs a package ({e}): pip install {packages}") from None
