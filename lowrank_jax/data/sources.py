"""Where documents come from: `kind:location` -> a random-access sequence of documents.

A document is {"text": str} or {"messages": [{"role", "content"}]}. Random access makes the order of a run a pure
function of (seed, epoch, index), so that a cursor is one integer per source and never a saved buffer.
"""

import glob
import json
import os
from collections.abc import Sequence

from lowrank_jax.config import SourceConfig, UsageError
from lowrank_jax.data import builtin

# A text file is cut into pieces at paragraph or line ends. Small corpora get small pieces, so that shuffling and the
# held-out split have something to work with; 64 KiB bounds the memory that one document of a large file takes.
MIN_PIECE, MAX_PIECE, PIECES = 2 << 10, 64 << 10, 200


def open_source(source: SourceConfig) -> Sequence[dict]:
    """The documents of a source; raises UsageError, naming it, where there are none or the kind is unknown."""
    kind, _, location = source.spec.partition(":")
    if kind == "builtin":
        documents = builtin.load(location)
    elif kind == "text":
        documents = TextFiles(_files(source.spec, location))
    elif kind == "json":
        documents = JsonFiles(_files(source.spec, location), source.text_key, source.messages_key)
    else:
        raise UsageError(f"source {source.spec}: kind {kind!r} is not one of text, json, builtin")
    if not len(documents):
        raise UsageError(f"source {source.spec}: there is no text in it")
    return documents


class TextFiles(Sequence):
    """UTF-8 files, cut into pieces at blank lines, line ends or spaces."""

    def __init__(self, paths: list[str]):
        size = sum(os.path.getsize(p) for p in paths)
        piece = min(max(size // PIECES, MIN_PIECE), MAX_PIECE)
        self._spans = [(p, a, b) for p in paths for a, b in _pieces(p, piece)]

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, i: int) -> dict:
        path, start, stop = self._spans[i]
        return {"text": _decode(_read(path, start, stop), path, start).strip("\n")}


class JsonFiles(Sequence):
    """One JSON object a line (or one array of objects a file), with a text or a messages key."""

    def __init__(self, paths: list[str], text_key: str, messages_key: str):
        self.text_key, self.messages_key = text_key, messages_key
        self._paths, self._spans = paths, []  # spans: (file, line, start, stop) per record; an array's, its records
        for n, path in enumerate(paths):
            self._spans += _json_array(n, path) if _starts_array(path) else _json_lines(n, path)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, i: int) -> dict:
        n, line, start, stop = self._spans[i]
        where = f"{self._paths[n]}, record {line}"
        record = start if stop is None else _parse(_read(self._paths[n], start, stop), where)
        if not isinstance(record, dict):
            raise UsageError(f"{where}: a record must be a JSON object, not {type(record).__name__}")
        if self.messages_key in record:
            return {"messages": _check_messages(record[self.messages_key], f"{where}, {self.messages_key!r}")}
        if not isinstance(record.get(self.text_key), str):
            raise UsageError(f"{where}: neither {self.messages_key!r} nor a text in {self.text_key!r}")
        return {"text": _whole(record[self.text_key])}


class Subset(Sequence):
    """Every `period`-th document (the held-out part), or all the others (the training part).

    The split depends on the number of documents alone, so every command and every resume agrees on it.
    """

    def __init__(self, documents: Sequence[dict], fraction: float, held_out: bool):
        n = len(documents)
        count = max(1, round(n * fraction)) if fraction and n > 1 else 0
        self.documents, self.period, self.held_out = documents, n // count if count else 0, held_out
        self._len = count if held_out else n - count

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < self._len:
            raise IndexError(i)
        if self.held_out:
            return self.documents[i * self.period]
        if not self.period:
            return self.documents[i]
        kept = self.period - 1
        count = len(self.documents) - self._len  # held-out documents, at 0, period, 2 period, ...
        return self.documents[i + i // kept + 1 if i < count * kept else i + count]


def _files(spec: str, pattern: str) -> list[str]:
    paths = sorted(p for p in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(p))
    if not paths:
        raise UsageError(f"source {spec}: no such file")
    packed = [p for p in paths if p.endswith((".gz", ".zst", ".bz2", ".xz", ".zip"))]
    if packed:
        raise UsageError(f"source {spec}: {packed[0]} is compressed; unpack it first")
    return paths


def _read(path: str, start: int, stop: int) -> bytes:
    with open(path, "rb") as f:
        f.seek(start)
        return f.read(stop - start)


def _decode(raw: bytes, path: str, start: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UsageError(f"{path}: not UTF-8 text at byte {start + e.start}") from None


def _pieces(path: str, target: int) -> list[tuple[int, int]]:
    """Byte spans of about `target` bytes that end after a blank line, a line, a space or (at worst) a character."""
    size, start, spans = os.path.getsize(path), 0, []
    while start < size:
        stop = min(start + target, size)
        if stop < size:
            window = _read(path, stop, min(stop + target, size))
            cut = next((window.find(mark) + len(mark) for mark in (b"\n\n", b"\n", b" ") if mark in window), None)
            if cut is None:  # on to the end of the character that `stop` may have split
                cut = next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), len(window[:4]))
            stop += cut
        if _read(path, start, stop).strip():
            spans.append((start, stop))
        start = stop
    return spans


def _starts_array(path: str) -> bool:
    with open(path, "rb") as f:
        return f.read(4096).lstrip()[:1] == b"["


def _json_array(n: int, path: str) -> list[tuple]:
    records = _parse(_read(path, 0, os.path.getsize(path)), path)
    return [(n, i + 1, record, None) for i, record in enumerate(records)]


def _json_lines(n: int, path: str) -> list[tuple]:
    spans, start = [], 0
    with open(path, "rb") as f:
        for line, raw in enumerate(f, 1):
            if raw.strip():
                spans.append((n, line, start, start + len(raw)))
            start += len(raw)
    return spans


def _parse(raw: bytes, where: str):
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{where}: not JSON: {e}") from None


def _whole(text: str) -> str:
    """JSON can escape half of a surrogate pair, which is not text: it becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _check_messages(messages, where: str) -> list[dict]:
    ok = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not ok:
        raise UsageError(f"{where} must be a list of objects with a 'role' and a 'content'")
    if not any(m["role"] == "assistant" and m["content"] for m in messages):
        raise UsageError(f"{where} has no assistant turn, so there is nothing to learn from it")
    return [{"role": _whole(m["role"]), "content": _whole(m["content"])} for m in messages]
