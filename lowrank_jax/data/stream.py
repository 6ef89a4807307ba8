"""Documents to batches: mix, pack, and a cursor that continues at the exact token.

A batch is made by several readers (`readers`, a function of the config alone): each mixes the sources by itself
and fills an equal part of the rows. Hosts share the readers out, so a run may go on with another number of hosts and
see the same batches. The cursor is a plain dict of the readers' cursors; it says where every source was before the
oldest document still in use and how much of that is spent. No token is ever stored.

The shape of a batch is an argument of `next`, so sequences may grow without a token lost or repeated.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np

from lowrank_jax.config import PhaseConfig, SourceConfig, UsageError
from lowrank_jax.data import packing, sources
from lowrank_jax.data.packing import Batch, Lane
from lowrank_jax.data.reader import Limit, Note, Part, Reader, describe
from lowrank_jax.data.records import BadRecord
from lowrank_jax.data.sources import Source
from lowrank_jax.data.tokenizer import Tokenizer
from lowrank_jax.machine import interrupt

# Hosts up to this many read shares of their own. Each reader holds about a megabyte of documents for every source.
MOST_READERS = 8
PATIENCE = 5.0  # seconds that a batch may take to come before a signal is more urgent
AHEAD = 2  # batches that are on the device before they are used
ONCE = Part(period=0, held_out=False, shuffled=False, endless=False)
READ, ENCODED = 2000, 200  # documents of each source that are looked at before anything else is done
SHARED_FROM = 8  # documents for each reader: a source with fewer is too small to be shared


def _ignore(*_, **__) -> None:
    pass


def open_phase(
    p: PhaseConfig,
    tokenizer: Tokenizer,
    seed: int,
    chats: bool,
    cursor: dict | None = None,
    share: tuple[int, int] = (0, 1),
    note: Note = _ignore,
    previous: str = "",
) -> "Stream":
    """The endless, shuffled stream of a phase's training part, from its start or from a cursor.

    `share` is (this host, hosts): the stream has this host's rows of every batch. `previous` is the `data_sha256` of
    what was trained on before the phase. Raises UsageError where the cursor is of other data.
    """
    opened = _open(p.sources, tokenizer, chats)
    many = readers(p)
    if any(_is_small(source, many) for source in opened):
        many = 1
    facts = {"sources": [s.spec for s in p.sources], "fingerprints": [s.fingerprint for s in opened], "readers": many}
    if cursor is not None:
        _check_cursor(cursor, facts, p)
    host, hosts = share
    mine = range(host * many // hosts, -(-(host + 1) * many // hosts))
    at = {i: cursor["lanes"][str(i)] if cursor else None for i in mine}
    limits = [Limit(s.spec, p.max_skipped, note) for s in p.sources]
    for i, limit in enumerate(limits):
        limit.skipped = sum(lane["readers"][i]["skipped"] + lane["refused"][i] for lane in at.values()) if cursor else 0
    parts = [Part(_period(source, p.eval_fraction), held_out=False, shuffled=True, endless=True) for source in opened]

    def lane(index: int) -> Lane:
        cursors = at[index]["readers"] if cursor else [None] * len(opened)
        readers = [
            Reader(source, part, limit, chats, seed + i, (index, many), where)
            for i, (source, part, limit, where) in enumerate(zip(opened, parts, limits, cursors))
        ]
        start = hashlib.sha256(f"{previous} {index}".encode()).hexdigest()
        return Lane(readers, tokenizer, chats, lambda step: mixture(p, step), at[index], start)

    return Stream([lane(i) for i in mine], facts, share)


def open_held_out(p: PhaseConfig, tokenizer: Tokenizer, seed: int, chats: bool, note: Note = _ignore) -> "Stream":
    """The held-out part of a phase, once, in the shuffled order that the seed gives."""
    opened = _open(p.sources, tokenizer, chats)
    parts = [Part(_period(source, p.eval_fraction), True, shuffled=True, endless=False) for source in opened]
    used = [i for i, part in enumerate(parts) if part.period]
    return _read(p.sources, [(i, opened[i], parts[i]) for i in used], tokenizer, seed, chats, p.max_skipped, note)


def read_once(all_sources: Sequence[SourceConfig], tokenizer: Tokenizer) -> "Stream":
    """All of some sources, once and in order, with weight on every token."""
    opened = _open(all_sources, tokenizer, False)
    return _read(all_sources, [(i, source, ONCE) for i, source in enumerate(opened)], tokenizer, 0, False, 0, _ignore)


def check(p: PhaseConfig, tokenizer: Tokenizer, chats: bool) -> None:
    """Encodes the first documents of every source; raises UsageError where there would be nothing to learn from."""
    for config, source in zip(p.sources, _open(p.sources, tokenizer, chats)):
        limit = Limit(config.spec, p.max_skipped, _ignore)
        reader = Reader(source, ONCE, limit, chats, 0, (0, 1), None)
        found, learnt = 0, False
        while found < READ and (document := reader.next()) is not None:
            found += 1
            if found <= ENCODED and not learnt:
                _, said = packing.encode_document(tokenizer, document, chats)
                learnt = said[1 : p.block + 1].any()
        if not found:
            why = f"; the last record that could not be used: {describe(limit.last)}" if limit.last else ""
            raise UsageError(f"source {config.spec}: there is no text in it{why}")
        if not learnt:
            raise UsageError(
                f"source {config.spec}: in none of its first {min(found, ENCODED)} conversations does the assistant "
                f"speak within the first {p.block} tokens; raise config.sft.block"
            )


def check_sources(cursor: dict, p: PhaseConfig) -> None:
    """Raises UsageError where a phase now names other sources than those that the cursor counts."""
    names = [s.spec for s in p.sources]
    if cursor["sources"] != names:
        was, now = ", ".join(cursor["sources"]), ", ".join(names)
        raise UsageError(
            f"the run is reading {was}, but the config now names {now}; put them back, or use a new --workdir"
        )


def texts(phases: Sequence[PhaseConfig], max_bytes: int) -> Iterator[str]:
    """Texts of the training parts, every phase and source in equal parts, for a tokenizer to learn from."""
    for p in phases:
        for config in p.sources:
            source, left = sources.open_source(config), max_bytes // len(phases) // len(p.sources)
            part = Part(_period(source, p.eval_fraction), False, shuffled=True, endless=False)
            reader = Reader(source, part, Limit(config.spec, p.max_skipped, _ignore), False, 0, (0, 1), None)
            while left > 0 and (document := reader.next()) is not None:
                if "ids" in document:
                    raise UsageError(f"source {config.spec} holds tokens, not text: name their tokenizer.path")
                text = document.get("text") or "\n".join(m["content"] for m in document["messages"])
                yield text
                left -= len(text.encode("utf-8", "replace"))


class Stream:
    """Batches of packed tokens; what `cursor` gives, `open_phase` continues exactly."""

    def __init__(self, lanes: list[Lane], facts: dict, share: tuple[int, int]):
        self._lanes, self._facts, self._share = lanes, facts, share
        self._first = share[0] * facts["readers"] // share[1]
        threads = min(len(lanes), len(os.sched_getaffinity(0)))
        self._workers = ThreadPoolExecutor(threads, "reader") if threads > 1 else None

    def cursor(self) -> dict:
        """Where the next batch begins, as JSON values: this host's part of it, see `merge`."""
        return self._facts | {"lanes": {str(self._first + i): lane.cursor() for i, lane in enumerate(self._lanes)}}

    def next(self, rows: int, length: int, step: int = 0) -> Batch | None:
        """This host's rows of the next batch of `rows`, at a step of the phase; None where a stream that ends is over.

        Raises UsageError for data that cannot be used and OSError for data that cannot be read; the stream is then of
        no further use, and a cursor taken before goes on.
        """
        host, hosts = self._share
        readers = self._facts["readers"]
        each = rows // readers
        if each * readers != rows:
            raise ValueError(f"{rows} rows cannot be shared by {readers} readers")
        run = self._workers.map if self._workers else map
        parts = list(run(lambda lane: lane.next(each, length, step), self._lanes))
        if any(part is None for part in parts):
            return None
        first = host * rows // hosts - self._first * each
        own = slice(first, first + (host + 1) * rows // hosts - host * rows // hosts)
        return {key: np.concatenate([part[key] for part in parts])[own] for key in parts[0]}

    def close(self) -> None:
        if self._workers:
            self._workers.shutdown(wait=False, cancel_futures=True)


def readers(p: PhaseConfig) -> int:
    """How many readers a phase's batches are made of: each fills an equal part of the rows, whatever the length.

    Without a number of its own, as many as divide the rows of every length, up to MOST_READERS.
    """
    common = math.gcd(*(p.tokens_per_step // n for n in p.lengths))
    return p.readers or max(n for n in range(1, MOST_READERS + 1) if common % n == 0)


def mixture(p: PhaseConfig, phase_step: int) -> tuple[float, ...]:
    """The shares of the sources at a step of the phase: they add up to 1."""
    weights = [[w for step, w in source.weight if step <= phase_step][-1] for source in p.sources]
    return tuple(w / sum(weights) for w in weights)


def merge(cursors: Sequence[dict]) -> dict:
    """The global cursor from those of all hosts."""
    lanes = {name: lane for cursor in cursors for name, lane in cursor["lanes"].items()}
    return cursors[0] | {"lanes": dict(sorted(lanes.items(), key=lambda item: int(item[0])))}


def data_sha256(cursor: dict) -> str:
    """Hash of every batch so far: two runs that agree here have trained on the same tokens in the same order."""
    return hashlib.sha256("".join(lane["sha256"] for lane in cursor["lanes"].values()).encode()).hexdigest()


def summary(cursor: dict) -> list[dict]:
    """What a phase has read of each source so far."""
    lanes = cursor["lanes"].values()

    def of_source(i: int) -> dict:
        counted = {key: sum((lane["drawn"] or lane)[key][i] for lane in lanes) for key in packing.COUNTS}
        readers = [lane["readers"][i] for lane in lanes]
        met = {key: sum(r[key] + r["met"][k] for r in readers) for k, key in enumerate(("skipped", "empty"))}
        return counted | met | {"epochs": min(lane["readers"][i]["epoch"] for lane in lanes)}

    return [{"source": name} | of_source(i) for i, name in enumerate(cursor["sources"])]


class _Batches(grain.IterDataset):
    """The stream as grain sees it; the state of its iterator is the cursor, as JSON text that costs nothing to copy."""

    def __init__(self, stream: Stream, steps: range, shape_at: Callable, place: Callable):
        super().__init__()
        self._iterator = _Iterator(stream, steps, shape_at, place)

    def __iter__(self):
        return self._iterator


class _Iterator(grain.DatasetIterator):
    def __init__(self, stream: Stream, steps: range, shape_at: Callable, place: Callable):
        super().__init__()
        self._stream, self._steps, self._shape_at, self._place = stream, iter(steps), shape_at, place

    def __next__(self):
        step = next(self._steps)
        return self._place(step, self._stream.next(*self._shape_at(step)))

    def get_state(self):
        return {"json": json.dumps(self._stream.cursor())}

    def set_state(self, state):
        raise NotImplementedError("open the stream with the cursor instead")


class Feed:
    """(place(step, batch), the cursor after it) for each step, prepared by a thread AHEAD of its use, from now on.

    `shape_at(step)` gives the arguments of `Stream.next`; `place` may put the batch on a device.
    """

    def __init__(self, stream: Stream, steps: range, shape_at: Callable, place: Callable):
        self._stream, batches = stream, _Batches(stream, steps, shape_at, place)
        self._ahead = iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=AHEAD))
        self._ahead.start_prefetch()
        self._taker, self._taking = ThreadPoolExecutor(1, "taker"), None

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> tuple:
        return self.take()

    def take(self, stop: Callable[[], bool] = lambda: False) -> tuple:
        """The next one; raises Interrupted where `stop()` says so before it is there: a read may hang."""
        self._taking = self._taker.submit(lambda: (next(self._ahead), json.loads(self._ahead.get_state()["json"])))
        return interrupt.wait(self._taking, stop, PATIENCE)

    def close(self) -> None:
        self._taker.shutdown(wait=False)
        if not self._taking or self._taking.done():  # else something hangs, and so would this
            self._ahead.close()
            self._stream.close()


def _check_cursor(cursor: dict, facts: dict, p: PhaseConfig) -> None:
    check_sources(cursor, p)
    for name, was, now in zip(facts["sources"], cursor["fingerprints"], facts["fingerprints"]):
        if was != now:
            raise UsageError(
                f"source {name} has changed since the run stopped (its files' names or sizes), so there is no going on "
                "in the middle of it; put it back, or use a new --workdir"
            )
    if cursor["readers"] != facts["readers"]:
        raise UsageError(
            f"the run began with readers={cursor['readers']} and the config now gives {facts['readers']}; "
            f"set readers={cursor['readers']} to go on"
        )


def _open(configs: Sequence[SourceConfig], tokenizer: Tokenizer, chats: bool) -> list[Source]:
    opened = [sources.open_source(config, chats) for config in configs]
    for config, source in zip(configs, opened):
        if getattr(source, "tokenizer_sha256", tokenizer.sha256) != tokenizer.sha256:
            raise UsageError(
                f"source {config.spec} was written with another tokenizer; name that one as tokenizer.path, or write "
                "it again with scripts/tokenize.py"
            )
        if getattr(source, "chats", chats) != chats:
            needs = "with --chats" if chats else "without --chats"
            raise UsageError(f"source {config.spec} must be written {needs} to be used here (scripts/tokenize.py)")
    return opened


def _read(configs, used: list[tuple[int, Source, Part]], tokenizer, seed, chats, max_skipped, note) -> Stream:
    """A stream that ends, of the sources `used`: (index in configs, source, part)."""
    readers = [
        Reader(source, part, Limit(configs[i].spec, max_skipped, note), chats, seed + i, (0, 1), None)
        for i, source, part in used
    ]
    weights = [configs[i].weight[0][1] or 1.0 for i, _, _ in used]
    shares = tuple(w / sum(weights) for w in weights)
    facts = {"sources": [configs[i].spec for i, _, _ in used], "fingerprints": [], "readers": 1}
    return Stream([Lane(readers, tokenizer, chats, lambda step: shares, None, "")], facts, (0, 1))


def _count(source: Source, most: int) -> int:
    """How many rows a source has, counted up to `most`."""
    count = 0
    for block in range(source.blocks):
        try:
            for _ in source.rows(block):
                count += 1
                if count >= most:
                    return count
        except BadRecord:
            continue
    return count


def _is_small(source: Source, readers: int) -> bool:
    return source.blocks < SHARED_FROM * readers and _count(source, SHARED_FROM * readers) < SHARED_FROM * readers


def _period(source: Source, fraction: float) -> int:
    """Every so many rows one is held out; the first is, so a source needs two."""
    return round(1 / fraction) if fraction and _count(source, 2) > 1 else 0
