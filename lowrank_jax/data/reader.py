"""Reads one source in a shuffled order, with a cursor that resumes in the middle of it.

The blocks of an epoch are a permutation drawn from (seed, epoch). A reader shuffles about a megabyte of documents from
the next blocks (a window). The cursor is the window's start and the number of its documents that are used.
"""

import functools
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from lowrank_jax.config import UsageError
from lowrank_jax.data.blocks import BadRecord, Document, Source
from lowrank_jax.machine import faults, storage

WINDOW, HELD_OUT_WINDOW = 1 << 20, 1 << 16  # bytes of documents that are shuffled together
MOST_KEYS = 50  # unused keys of a source that are reported: records may have names or dates as keys
PLENTY = 4  # blocks for each reader; with fewer, the readers' parts would differ too much in size
BARREN_ROUNDS = 32  # epochs for each reader, in which a document that can be used would have come to this one

Note = Callable[..., None]
"""note("skip" | "retry" | "unused", **facts) reports something that the reader recovered from, or does not use."""
IGNORE: Note = lambda *_, **__: None


class Limit:
    """Counts the unusable records of a source, over all its readers, and raises UsageError beyond `most`."""

    def __init__(self, name: str, most: int, note: Note = IGNORE):
        self.name, self.most, self.note = name, most, note
        self.skipped, self.last, self.unused, self._lock = 0, None, set(), threading.Lock()

    def skip(self, bad: BadRecord, is_new: bool = True) -> None:
        """Count a bad record, and report a new one; raises UsageError, with its file and line, beyond the limit."""
        with self._lock:
            self.skipped, self.last = self.skipped + 1, bad
            if self.skipped <= self.most:
                if is_new:
                    self.note("skip", source=self.name, where=bad.where, reason=bad.reason)
                return
        count = f"; {self.skipped} such records, and max_skipped={self.most}" if self.most else ""
        raise UsageError(f"{bad}{count}")

    def report_unused(self, keys: set[str]) -> None:
        """Report keys of records that nothing is trained from: each once, and at most MOST_KEYS."""
        if keys <= self.unused or len(self.unused) >= MOST_KEYS:
            return
        with self._lock:
            new, self.unused = sorted(keys - self.unused), self.unused | keys
        if new:
            shown = [key[:60] if key.isprintable() else ascii(key)[:60] for key in new[:MOST_KEYS]]
            self.note("unused", source=self.name, keys=", ".join(shown))

    def take_back(self, count: int) -> None:
        """Subtract bad records that will be read again."""
        with self._lock:
            self.skipped -= count


class Part(NamedTuple):
    """The documents of a source that a reader takes, and their order."""

    period: int  # row r of block b is held out if (b + r) is a multiple of it; 0: none is
    held_out: bool  # take the held-out rows, or all the others
    shuffled: bool
    endless: bool  # epoch after epoch


class Share(NamedTuple):
    """A reader of the several that share a source, and what they share."""

    index: int = 0
    readers: int = 1
    by_blocks: bool | None = None  # share the blocks, or (False) the records in turn; None: blocks, if there are PLENTY


ONCE = Part(period=0, held_out=False, shuffled=False, endless=False)


class Reader:
    """Documents for reader `share[0]` of the `share[1]` that share a source; a `cursor` resumes exactly."""

    def __init__(self, source: Source, part: Part, limit: Limit, chats: bool, seed: int = 0, share=(0, 1), cursor=None):
        self._source, self._part, self.limit, self._chats, self._seed = source, part, limit, chats, seed
        self._index, self._readers, by_blocks = Share(*share)
        self._by_blocks = source.blocks >= PLENTY * self._readers if by_blocks is None else by_blocks
        self._first, self._stride = (self._index, self._readers) if self._by_blocks else (0, 1)
        counts = {"taken": 0, "skipped": 0, "empty": 0, "met": [0, 0]}
        # Of the window. Cursors of older versions have no "number": they go on with the older rule of `_owns`.
        self._start = cursor or {"epoch": 0, "block": self._first, "row": 0, "number": 0} | counts
        self._taken, self._window, self._end = self._start["taken"], None, None
        self._used, self._barren = int(cursor is not None), 0  # documents of this epoch, and epochs without any
        self._rows = None  # what the last window left of its block: a compressed file is else read from its start again
        self.endless, self.exhausted = part.endless, source.blocks == 0

    def cursor(self) -> dict:
        """Return the window's start (epoch, place in its order of blocks, row), and how many documents are taken.

        `skipped` and `empty` count the records before the window, and `met` those in it.
        """
        if self._window is None:
            return self._start | {"taken": self._taken}
        if self._taken == len(self._window) and not self.exhausted:  # a resume must see the end again
            return self._end | {"taken": 0, "met": [0, 0]}
        met = [self._end[key] - self._start[key] for key in ("skipped", "empty")]
        return self._start | {"taken": self._taken, "met": met}

    def next(self) -> Document | None:
        """Return the next document, or None at the end, or if no record of the source gives a document.

        Where an epoch has none for this reader, other readers have it: the next epoch is shared differently.
        """
        while not self.exhausted:
            self._fill()
            if self._taken < len(self._window):
                self._taken, self._used = self._taken + 1, self._used + 1
                return self._window[self._taken - 1][0]
            if self._end["epoch"] > self._start["epoch"]:
                self._barren, self._used = 0 if self._used else self._barren + 1, 0
                self.exhausted = not self.endless or (self._barren > 0 and self._has_nothing())
            if not self.exhausted:
                self._start, self._window, self._taken = self._end, None, 0
        return None

    def refuse(self, reason: str) -> bool:
        """Pass over the newest document, which cannot be used; return whether it is counted: once, in epoch 0."""
        self._used -= 1
        if is_new := self.in_first_epoch:
            block, row = self._window[self._taken - 1][1]
            place = self._patiently(lambda: self._source.place(next(self._source.rows(block, row))))
            self.limit.skip(BadRecord(place, reason))
        return is_new

    @property
    def in_first_epoch(self) -> bool:
        """Return whether the newest document comes for the first time."""
        return self._start["epoch"] == 0

    def epochs(self) -> float:
        """Return the epochs of this reader's share that are taken: whole blocks, and documents of their windows."""
        self._fill()
        low, high = self._span
        if self._taken == len(self._window) > 0:
            return high
        return low + (high - low) * self._taken / len(self._window) if self._taken else low

    def _fill(self) -> None:
        if self._window is None:
            self._window, self._end = self._patiently(self._read_window)
            if self._taken > len(self._window):
                reason = "has fewer documents at its place than were read before the run stopped"
                raise UsageError(f"source {self.limit.name} {reason}; put it and its keys back, or use a new --workdir")
            places, blocks = (self._start, self._end), self._source.blocks
            self._span = [place["epoch"] + (place["block"] - self._first) / blocks for place in places]

    def _has_nothing(self) -> bool:
        """Return whether no reader can have a document, after an epoch without one for this reader."""
        if self._readers == 1 or self._barren == BARREN_ROUNDS * self._readers:  # a template refuses what there is
            return True
        return self._barren == 1 and not self._has_documents

    @functools.cached_property
    def _has_documents(self) -> bool:
        part, limit = self._part._replace(shuffled=False, endless=False), Limit(self.limit.name, sys.maxsize)
        return Reader(self._source, part, limit, self._chats).next() is not None

    def _read_window(self) -> tuple[list[tuple[Document, tuple[int, int]]], dict]:
        """Return the shuffled documents of a window, each with its block and row, and the start of the next window."""
        place, window, size = dict(self._start), [], 0
        enough = HELD_OUT_WINDOW if self._part.held_out else WINDOW
        is_shuffled = self._part.shuffled and self._source.blocks > 1  # the order of one block would take 0.2 s
        counting = place["epoch"] == 0  # later epochs meet the same bad records again
        while place["block"] < self._source.blocks:
            order = (self._source.blocks, self._seed, place["epoch"])
            block = _shuffled_block(*order, place["block"]) if is_shuffled else place["block"]
            rows, self._rows = self._rows or self._source.rows(block, place["row"]), None
            try:
                for number, row in self._own_rows(rows, block, place):
                    faults.strike_read()
                    try:
                        document = self._document(row)
                    except BadRecord as bad:
                        self._skip(bad, place, counting)
                        continue
                    place["empty"] += counting and not document
                    if document:
                        window.append((document, (block, number)))
                        size += _size(document)
                    if size >= enough:
                        self._rows = rows
                        return self._shuffled(window), place
            except BadRecord as bad:  # the rest of the block is unreadable: one of the readers that share it says so
                self._skip(bad, place, counting and not self._part.held_out and self._owns(place, place["row"]))
            place["block"], place["row"] = place["block"] + self._stride, 0
        first = {"block": self._first} | {key: 0 for key in ("row", "number") if key in place}
        return self._shuffled(window), place | first | {"epoch": place["epoch"] + 1}

    def _own_rows(self, rows: Iterator, block: int, place: dict) -> Iterator[tuple[int, Any]]:
        """Yield the number and the row of each row that this reader takes, and move the place past it."""
        for row in rows:
            number = place["row"]
            place["row"] += 1
            held_out = self._part.period > 0 and (block + number) % self._part.period == 0
            if held_out == self._part.held_out:
                is_own = self._owns(place, number)
                if "number" in place:
                    place["number"] += 1
                if is_own:
                    yield number, row

    def _owns(self, place: dict, row: int) -> bool:
        """Return whether this reader takes the record at a place: the readers take an epoch's records in turn.

        Each epoch begins with another reader, so that all of them see all records, however few those are.
        """
        turn = place["number"] + place["epoch"] if "number" in place else row + row // self._readers
        return self._by_blocks or turn % self._readers == self._index

    def _document(self, row) -> Document | None:
        """Return a row's document, or None if it has no text."""
        document = self._source.document(row)
        if self._chats and "text" in document:
            raise BadRecord(self.limit.name, "a record has no messages, so SFT has no assistant turn to learn from")
        text, parts = document.get("text", ""), document.get("messages", document.get("ids", ()))
        return document if text.strip() or len(parts) else None

    def _skip(self, bad: BadRecord, place: dict, counting: bool) -> None:
        if counting:
            self._skipped += 1
            self.limit.skip(bad, is_new=self._skipped > self._reported)
            place["skipped"] += 1

    def _shuffled(self, window: list) -> list:
        if not self._part.shuffled:
            return window
        seed = [self._seed, self._index, *(self._start[key] for key in ("epoch", "block", "row"))]
        return [window[i] for i in np.random.default_rng(seed).permutation(len(window))]

    def _patiently(self, read: Callable):
        """Return `read()`, called again after an OSError; each attempt meets the same bad records first."""
        self._reported = self._skipped = 0  # bad records: of earlier attempts, and of this one
        attempts = itertools.count(1)

        def note(e: BaseException, pause: float) -> None:
            self.limit.take_back(self._skipped)
            self._reported = max(self._reported, self._skipped)
            self._skipped = 0
            facts = {"reason": str(e), "attempt": next(attempts), "wait_seconds": pause}
            self.limit.note("retry", source=self.limit.name, **facts)

        try:
            return storage.again(read, lambda e: isinstance(e, OSError), note)
        except OSError as e:
            raise OSError(f"source {self.limit.name}: {e}") from e


@functools.lru_cache(maxsize=1 << 12)
def _shuffled_block(blocks: int, seed: int, epoch: int, place: int) -> int:
    """Return the block at a place in an epoch's order; cached, as it takes 11 ms where two readers share the blocks."""
    return _shuffled_blocks(blocks, seed)[epoch * blocks + place]


@functools.lru_cache
def _shuffled_blocks(count: int, seed: int):
    import grain  # here, because it imports JAX, which takes a second that a tokenising process must not pay

    return grain.MapDataset.range(count).seed(seed).shuffle().repeat()


def _size(document: Document) -> int:
    if "ids" in document:
        return 4 * len(document["ids"])
    return len(document.get("text", "")) + sum(len(m["content"]) for m in document.get("messages", []))
