"""The order in which one reader goes through a source, and the cursor that goes on in the middle of it.

The blocks of an epoch are a permutation drawn from (seed, epoch). A reader gathers about a megabyte of documents from
the blocks that come next (a window), and shuffles those. So every epoch reads every document once, in an order that
is a pure function of the seed; the cursor is where the window began and how many of its documents are spent; and a
resume reads one window again, wherever it is.

Several readers share a source: by blocks where there are plenty, or else by rows.
"""

import functools
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import grain
import numpy as np

from lowrank_jax.config import UsageError
from lowrank_jax.data.records import BadRecord, Document
from lowrank_jax.data.sources import Source
from lowrank_jax.machine import faults

WINDOW, HELD_OUT_WINDOW = 1 << 20, 1 << 16  # bytes of documents that are shuffled together
ATTEMPTS, FIRST_WAIT = 6, 0.5  # a read is tried 6 times over 15 seconds
PLENTY = 4  # blocks for each reader: with fewer, sharing out blocks would leave the readers unequal

Note = Callable[..., None]
"""note("skip" | "retry", **facts): tells of something that the reader got over."""


class Limit:
    """How many records of a source cannot be used, over all its readers, and how many may be skipped."""

    def __init__(self, name: str, most: int, note: Note):
        self.name, self.most, self.note = name, most, note
        self.skipped, self.last, self._lock = 0, None, threading.Lock()

    def skip(self, bad: BadRecord, is_new: bool = True) -> None:
        """Counts a bad record, and tells of a new one; raises UsageError, with its file and line, if it is too many."""
        with self._lock:
            self.skipped, self.last = self.skipped + 1, bad
            if self.skipped <= self.most:
                if is_new:
                    self.note("skip", source=self.name, where=bad.where, reason=bad.reason)
                return
        told = f"; {self.skipped} such records, and max_skipped={self.most}" if self.most else ""
        raise UsageError(f"{describe(bad)}{told}")

    def take_back(self, count: int) -> None:
        """Counts so many bad records less: they are about to be met again."""
        with self._lock:
            self.skipped -= count


def describe(bad: BadRecord) -> str:
    return f"{bad.exact() if bad.exact else bad.where}: {bad.reason}"


class Part(NamedTuple):
    """Which documents of a source are read, and how."""

    period: int  # row r of block b is held out where (b + r) is a multiple of it; 0: none
    held_out: bool  # the held-out ones, or all the others
    shuffled: bool
    endless: bool  # epoch after epoch


class Reader:
    """What falls to the `share[0]`-th of `share[1]` readers of a source; with a `cursor`, the rest of that."""

    def __init__(
        self, source: Source, part: Part, limit: Limit, chats: bool, seed: int, share: tuple[int, int], cursor
    ):
        self._source, self._part, self.limit, self._chats, self._seed = source, part, limit, chats, seed
        self._index, self._readers = share
        self._by_blocks = source.blocks >= PLENTY * self._readers
        self._first, self._stride = share if self._by_blocks else (0, 1)
        self._at = cursor or {
            "epoch": 0,
            "block": self._first,
            "row": 0,
            "taken": 0,
            "skipped": 0,
            "empty": 0,
            "met": [0, 0],
        }
        self._taken, self._window, self._next, self.exhausted = self._at["taken"], None, None, source.blocks == 0

    @property
    def endless(self) -> bool:
        return self._part.endless

    def cursor(self) -> dict:
        """Where the window begins (epoch, place in its order of blocks, row), and how much of it is spent.

        Skipped and empty records are counted up to there; `met` are those of the window itself.
        """
        if self._window is None:
            return self._at | {"taken": self._taken}
        if self._taken == len(self._window) and not self.exhausted:  # a resume is to find out the same
            return self._next | {"taken": 0, "met": [0, 0]}
        met = [self._next[key] - self._at[key] for key in ("skipped", "empty")]
        return self._at | {"taken": self._taken, "met": met}

    def next(self) -> Document | None:
        """The next document; None at the end, or where an epoch has no document for this reader."""
        while not self.exhausted:
            if self._window is None:
                self._window, self._next = self._patiently(self._read_window)
            if self._taken < len(self._window):
                self._taken += 1
                return self._window[self._taken - 1]
            whole_epoch = (self._at["block"], self._at["row"]) == (self._first, 0)
            ended = self._next["epoch"] > self._at["epoch"]
            if ended and (not self._part.endless or (whole_epoch and not self._window)):
                self.exhausted = True
            else:
                self._at, self._window, self._taken = self._next, None, 0
        return None

    def _read_window(self) -> tuple[list[Document], dict]:
        """The shuffled documents of the window that begins here, and where the one after it begins."""
        at, window, size = dict(self._at), [], 0
        enough = HELD_OUT_WINDOW if self._part.held_out else WINDOW
        counting = at["epoch"] == 0  # what is wrong with the data, later epochs only meet again
        while at["block"] < self._source.blocks:
            block = self._block(at["epoch"], at["block"])
            try:
                for row in self._source.rows(block, at["row"]):
                    mine = self._takes(block, at["row"])
                    at["row"] += 1
                    if not mine:
                        continue
                    faults.strike_read()
                    try:
                        document = self._document(row)
                    except BadRecord as bad:
                        self._skip(bad, at, counting)
                        continue
                    at["empty"] += counting and not document
                    if document:
                        window.append(document)
                        size += _size(document)
                    if size >= enough:
                        return self._shuffled(window), at
            except BadRecord as bad:  # the rest of the block cannot be read: one of the readers that share it says so
                self._skip(bad, at, counting and not self._part.held_out and self._owns(at["row"]))
            at["block"], at["row"] = at["block"] + self._stride, 0
        return self._shuffled(window), at | {"epoch": at["epoch"] + 1, "block": self._first, "row": 0}

    def _block(self, epoch: int, place: int) -> int:
        return _shuffled_block(self._source.blocks, self._seed, epoch, place) if self._part.shuffled else place

    def _takes(self, block: int, row: int) -> bool:
        held_out = self._part.period > 0 and (block + row) % self._part.period == 0
        return held_out == self._part.held_out and self._owns(row)

    def _owns(self, row: int) -> bool:
        # Every row in turn, but not the same one each time around: a period of held-out rows would take it from one.
        return self._by_blocks or (row + row // self._readers) % self._readers == self._index

    def _document(self, row) -> Document | None:
        """None for a document without text."""
        document = self._source.document(row)
        if "text" in document:
            if self._chats:
                raise BadRecord(self.limit.name, "a record has no messages, so SFT has no assistant turn to learn from")
            return document if document["text"].strip() else None
        return document if len(document.get("messages", document.get("ids"))) else None

    def _skip(self, bad: BadRecord, at: dict, counting: bool) -> None:
        if counting:
            self._skipping += 1
            self.limit.skip(bad, is_new=self._skipping > self._told)
            at["skipped"] += 1

    def _shuffled(self, window: list[Document]) -> list[Document]:
        if not self._part.shuffled:
            return window
        at = self._at
        draw = np.random.default_rng([self._seed, self._index, at["epoch"], at["block"], at["row"]])
        return [window[i] for i in draw.permutation(len(window))]

    def _patiently(self, read: Callable):
        """Tries again when a read fails, each time after twice as long; raises OSError when that did not help."""
        self._told = 0  # bad records that an earlier attempt told of: each attempt meets the same ones first
        for attempt in range(ATTEMPTS):
            self._skipping = 0
            try:
                return read()
            except OSError as e:
                self.limit.take_back(self._skipping)
                self._told = max(self._told, self._skipping)
                if attempt == ATTEMPTS - 1:
                    raise OSError(f"source {self.limit.name}: {e} (tried {ATTEMPTS} times)") from e
                wait = FIRST_WAIT * 2**attempt
                self.limit.note("retry", source=self.limit.name, reason=str(e), attempt=attempt + 1, wait_seconds=wait)
                time.sleep(wait)


@functools.lru_cache(maxsize=1 << 12)
def _shuffled_block(blocks: int, seed: int, epoch: int, place: int) -> int:
    """The block at a place in an epoch's order: 11 ms where there are two of them, which is why readers share it."""
    return _blocks(blocks, seed)[epoch * blocks + place]


@functools.lru_cache
def _blocks(count: int, seed: int) -> grain.MapDataset:
    return grain.MapDataset.range(count).seed(seed).shuffle().repeat()


def _size(document: Document) -> int:
    if "ids" in document:
        return 4 * len(document["ids"])
    return len(document.get("text", "")) + sum(len(m["content"]) for m in document.get("messages", []))
