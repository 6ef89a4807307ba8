"""Turns documents into batches: mixes the sources, packs, and gives a cursor that resumes at the exact token.

A lane makes an equal part of each batch's rows, with one Reader per source and its own mix of the sources. The setting
`readers` is the number of lanes. Hosts divide the lanes among themselves, so the batches do not depend on the number of
hosts. With more hosts than lanes, several hosts read the same lane and take their own rows of it. See docs/data.md.
"""

import contextlib
import hashlib
import importlib
import itertools
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from lowrank_jax.config import PhaseConfig, SourceConfig, UsageError
from lowrank_jax.data import blocks, chat, packing, sources
from lowrank_jax.data.blocks import BadRecord, Source
from lowrank_jax.data.packing import Batch, Lane
from lowrank_jax.data.reader import IGNORE, ONCE, PLENTY, Limit, Note, Part, Reader
from lowrank_jax.data.tokenizer import Tokenizer
from lowrank_jax.machine import interrupt
from lowrank_jax.machine.console import ABANDONED

MOST_READERS = 8  # most lanes by default; each keeps about 1 MB of documents of every source in memory
CHECK_READ, CHECK_ENCODED = 2000, 200  # documents of each source that `check` reads and encodes
# Limits of the sample that estimates the tokens of a source: encoding so many takes 0.1 s, and a network is slower.
SAMPLE_ROWS, ROWS_OF_BLOCK, SAMPLE_BYTES, SAMPLE_SECONDS = 64, 16, 1 << 18, 0.5
SIGNAL_POLL_SECONDS = 5.0  # between checks for a signal while a batch is awaited
AHEAD = 2  # batches that are placed on the device before they are used
MIN_ROWS_PER_LANE = 8  # of every source; if one has fewer, a single lane makes the whole batch
ROWS_TO_COUNT = 32  # for each lane: a source of so many rows may be shared by blocks, however long its rows are
SMALL_STEP, SMALLEST_PIECE = 1 << 14, 12_288  # tokens: a lane's part of a smaller step is too little for a piece


def open_phase(
    p: PhaseConfig, tokenizer: Tokenizer, seed: int, chats: bool, start=(None, ""), share=(0, 1), note: Note = IGNORE
) -> "Stream":
    """Open the endless, shuffled stream of a phase's training part; raises UsageError for a cursor of other data.

    `start` is (the cursor to go on from, or None, and the hash of all batches before the phase). `share` is (this host,
    hosts): the stream has this host's rows of every batch.
    """
    (cursor, data_so_far), (host, hosts) = start, share
    all_sources = _open(p.sources, tokenizer, chats)
    lane_cursors = cursor["lanes"] if cursor else {}
    is_old = cursor is not None and not any(lane.get("piece") for lane in lane_cursors.values())  # of before pieces
    count = readers(p)
    rows = [_count_rows(source, ROWS_TO_COUNT * count) for source in all_sources]
    if min(rows) < MIN_ROWS_PER_LANE * count and not (is_old and cursor["readers"] == count):
        count = 1
    fingerprints = [source.fingerprint for source in all_sources]
    facts = {"sources": [s.spec for s in p.sources], "fingerprints": fingerprints, "readers": count}
    if cursor is not None:
        _check_cursor(cursor, facts, all_sources, p)
    indices = range(host * count // hosts, -(-(host + 1) * count // hosts))
    cursors = {i: lane_cursors.get(str(i)) for i in indices}
    by_blocks = [None if is_old else _shares_blocks(*pair, count) for pair in zip(all_sources, rows)]
    limits = [Limit(s.spec, p.max_skipped, note) for s in p.sources]
    for i, limit in enumerate(limits if cursor else ()):
        limit.skipped = sum(lane["readers"][i]["skipped"] + lane["refused"][i] for lane in cursors.values())
    parts = [Part(_held_out_every(source, p.eval_fraction), False, True, endless=True) for source in all_sources]
    piece = max(p.tokens_per_step // count, SMALLEST_PIECE if p.tokens_per_step < SMALL_STEP else 0)

    def lane(index: int) -> Lane:
        own = []
        for i, (source, part, limit) in enumerate(zip(all_sources, parts, limits)):
            place = cursor and cursors[index]["readers"][i]
            own.append(Reader(source, part, limit, chats, seed + i, (index, count, by_blocks[i]), place))
        sha256 = hashlib.sha256(f"{data_so_far} {index}".encode()).hexdigest()
        return Lane(own, tokenizer, chats, lambda step: mixture(p, step), cursors[index], sha256, piece)

    return Stream([lane(i) for i in indices], facts, share)


def open_held_out(p: PhaseConfig, tokenizer: Tokenizer, seed: int, chats: bool, note: Note = IGNORE) -> "Stream":
    """Open the held-out part of a phase, once, in the shuffled order of the seed."""
    own = []
    for i, (config, source) in enumerate(zip(p.sources, _open(p.sources, tokenizer, chats))):
        if period := _held_out_every(source, p.eval_fraction):
            part = Part(period, held_out=True, shuffled=True, endless=False)
            own.append((config, Reader(source, part, Limit(config.spec, p.max_skipped, note), chats, seed + i)))
    return _finite(own, tokenizer, chats)


def read_once(configs: Sequence[SourceConfig], tokenizer: Tokenizer, chats: bool = False) -> "Stream":
    """Open all of some sources, once and in order, with weight on every token, or with `chats` on the answers'."""
    pairs = zip(configs, _open(configs, tokenizer, chats))
    return _finite([(c, Reader(s, ONCE, Limit(c.spec, 0), chats)) for c, s in pairs], tokenizer, chats)


def import_libraries(phases: Iterable[PhaseConfig]) -> None:
    """Import what reads the sources, before a thread compiles.

    While grain and TFDS are imported, etils.epy.lazy_imports gives the imports of all threads a placeholder. One that
    traced a step then failed with "No module named 'jax._src.hijax.HiType'".
    """
    names = ["grain", *["tensorflow_datasets"] * any(s.spec.startswith("tfds:") for p in phases for s in p.sources)]
    for name in names:
        with contextlib.suppress(ImportError):  # opening the source names what is missing
            importlib.import_module(name)


def is_chat(config: SourceConfig) -> bool:
    """Return whether a source holds conversations: its first document is one, or it was tokenised for SFT."""
    source = sources.open_source(config)
    first = lambda: Reader(source, ONCE, Limit(config.spec, 0), chats=False).next() or {}
    return source.chats if hasattr(source, "chats") else "messages" in first()


def _finite(own: list[tuple[SourceConfig, Reader]], tokenizer: Tokenizer, chats: bool) -> "Stream":
    weights = [config.weight[0][1] or 1.0 for config, _ in own]
    shares = tuple(w / sum(weights) for w in weights)
    facts = {"sources": [config.spec for config, _ in own], "fingerprints": [], "readers": 1}
    lane = Lane([reader for _, reader in own], tokenizer, chats, lambda step: shares, None, "", 0)
    return Stream([lane], facts, (0, 1))


class Checked(NamedTuple):
    """A source's fingerprint, and about how many bytes it has and tokens its training part; 0 where unknown."""

    fingerprint: str
    bytes: int
    tokens: int


def check(p: PhaseConfig, tokenizer: Tokenizer, chats: bool) -> dict[str, Checked]:
    """Encode the first documents of every source and a few others, and return facts of each source.

    Raises UsageError if there is nothing to learn from.
    """
    facts = {}
    if chats:
        chat.check(tokenizer)
    for config, source in zip(p.sources, _open(p.sources, tokenizer, chats)):
        limit = Limit(config.spec, p.max_skipped)
        reader = Reader(source, ONCE, limit, chats)
        count, learnt = 0, False
        for document in itertools.islice(iter(reader.next, None), CHECK_READ):
            if count < CHECK_ENCODED and not learnt:
                try:
                    _, said = packing.encode_document(tokenizer, document, chats)
                except UsageError as e:  # the chat template does not take it
                    reader.refuse(str(e))
                    continue
                learnt = said[1 : p.block + 1].any()
            count += 1
        if not count:
            reason = f"; the last unusable record: {limit.last}" if limit.last else ""
            raise UsageError(f"source {config.spec}: there is no text in it{reason}")
        if not learnt:
            reason = f"the assistant never speaks within the first {p.block} tokens; raise config.sft.block"
            raise UsageError(f"source {config.spec}: in its first {min(count, CHECK_ENCODED)} conversations {reason}")
        tokens = round(_count_tokens(source, tokenizer, chats) * (1 - p.eval_fraction))
        facts[config.spec] = Checked(source.fingerprint, getattr(source, "bytes", 0), tokens)
    return facts


def corpus_bytes(configs: Sequence[SourceConfig]) -> int:
    """Return about how many bytes different sources have together; 0 where one of them does not tell."""
    sizes = [getattr(sources.open_source(config), "bytes", 0) for config in {c.spec: c for c in configs}.values()]
    return sum(sizes) if all(sizes) else 0


def _count_tokens(source: Source, tokenizer: Tokenizer, chats: bool) -> float:
    """Return a source's bytes x the tokens per byte of a few of its rows, from blocks all over it."""
    tokens, size, rows, started = 0, 0, 0, time.monotonic()
    for block in range(0, source.blocks, max(source.blocks // SAMPLE_ROWS, 1)):
        with contextlib.suppress(BadRecord, UsageError, OSError):
            for row in itertools.islice(source.rows(block), ROWS_OF_BLOCK):
                document, rows = source.document(row), rows + 1
                tokens += len(packing.encode_document(tokenizer, document, chats)[0])
                raw = row[2] if isinstance(row, tuple) else None  # a record as it lies in its file
                size += len(raw) if isinstance(raw, bytes) else blocks.text_bytes(document)
        if rows >= SAMPLE_ROWS or size >= SAMPLE_BYTES or time.monotonic() - started > SAMPLE_SECONDS:
            break
    return getattr(source, "bytes", 0) * tokens / size if size else 0


def texts(phases: Sequence[PhaseConfig], max_bytes: int) -> Iterator[str]:
    """Yield texts of the phases' training parts, equally many bytes of each phase and source."""
    for p in phases:
        yield from source_texts(p.sources, max_bytes // len(phases), p.max_skipped, p.eval_fraction)


def source_texts(configs: Sequence[SourceConfig], max_bytes: int, max_skipped: int, held_out=0.0) -> Iterator[str]:
    """Yield texts of the sources for a tokenizer to learn from, without the share that is held out."""
    for config in configs:
        source, left = sources.open_source(config), max_bytes // len(configs)
        part = Part(_held_out_every(source, held_out), held_out=False, shuffled=True, endless=False)
        reader = Reader(source, part, Limit(config.spec, max_skipped), chats=False)
        while left > 0 and (document := reader.next()) is not None:
            if "ids" in document:
                raise UsageError(f"source {config.spec} holds tokens, not text: name their tokenizer.path")
            text = document.get("text") or "\n".join(m["content"] for m in document["messages"])
            yield text
            left -= len(text.encode("utf-8", "replace"))


class Stream:
    """Batches of packed tokens; `open_phase` continues exactly at a `cursor`.

    After an error a Stream cannot continue: reopen it at the last cursor.
    """

    def __init__(self, lanes: list[Lane], facts: dict, share: tuple[int, int]):
        self._lanes, self._facts, self._share = lanes, facts, share
        self._first = share[0] * facts["readers"] // share[1]
        threads = min(len(lanes), len(os.sched_getaffinity(0)))
        self._workers = ThreadPoolExecutor(threads, "reader") if threads > 1 else None

    def cursor(self) -> dict:
        """Return where the next batch begins, as JSON values: this host's part of it, see `merge`."""
        return self._facts | {"lanes": {str(self._first + i): lane.cursor() for i, lane in enumerate(self._lanes)}}

    def next(self, rows: int, length: int, step: int = 0) -> Batch | None:
        """Return this host's part of the next `rows`, or None at the end; raises UsageError or OSError for bad data."""
        host, hosts = self._share
        each, rest = divmod(rows, self._facts["readers"])
        if rest:
            raise ValueError(f"{rows} rows cannot be shared by {self._facts['readers']} readers")
        run = self._workers.map if self._workers else map
        parts = list(run(lambda lane: lane.next(each, length, step), self._lanes))
        if None in parts:
            return None
        first = host * rows // hosts - self._first * each
        own = slice(first, first + (host + 1) * rows // hosts - host * rows // hosts)
        return {key: np.concatenate([part[key] for part in parts])[own] for key in parts[0]}

    def close(self) -> None:
        if self._workers:
            self._workers.shutdown(wait=False, cancel_futures=True)


class Feed:
    """(place(step, batch), the cursor after the batch) for each step, prepared up to AHEAD steps before its use.

    `shape_at(step)` gives the arguments of `Stream.next`; `place` may put the batch on a device.
    """

    def __init__(self, stream: Stream, steps: range, shape_at: Callable, place: Callable):
        self._stream = stream
        # An error ends this generator, so nothing is read after it.
        batches = ((place(step, stream.next(*shape_at(step))), stream.cursor()) for step in steps)
        self._thread = ThreadPoolExecutor(1, ABANDONED)  # a read that hangs must not hold up the exit
        self._submit = lambda: self._thread.submit(next, batches)
        self._ahead, self._waits = deque(self._submit() for _ in range(AHEAD)), False

    def take(self, stop: Callable[[], bool] = lambda: False) -> tuple:
        """Return the next batch; raises StopIteration at the end, and Interrupted if `stop()` before it is ready."""
        if len(self._ahead) <= AHEAD:
            self._ahead.append(self._submit())
        self._waits = True
        prepared = interrupt.wait(self._ahead[0], stop, SIGNAL_POLL_SECONDS)
        self._waits = False
        self._ahead.popleft()
        return prepared

    def close(self) -> None:
        hangs = self._waits and not self._ahead[0].done()
        self._thread.shutdown(wait=not hangs, cancel_futures=True)
        self._stream.close()


def readers(p: PhaseConfig) -> int:
    """Return the config's number of readers, or the most up to MOST_READERS that divide the rows of every length."""
    common = math.gcd(*(p.tokens_per_step // n for n in p.lengths))
    return p.readers or max(n for n in range(1, MOST_READERS + 1) if common % n == 0)


def mixture(p: PhaseConfig, phase_step: int) -> tuple[float, ...]:
    """Return the sources' shares of the tokens at a step of the phase; they add up to 1."""
    weights = [[w for step, w in source.weight if step <= phase_step][-1] for source in p.sources]
    return tuple(w / sum(weights) for w in weights)


def merge(cursors: Sequence[dict]) -> dict:
    """Return the global cursor from those of all hosts."""
    lanes = {name: lane for cursor in cursors for name, lane in cursor["lanes"].items()}
    return cursors[0] | {"lanes": dict(sorted(lanes.items(), key=lambda item: int(item[0])))}


def data_sha256(cursor: dict) -> str:
    """Return a hash of every batch so far: equal hashes mean the same tokens in the same order."""
    return hashlib.sha256("".join(lane["sha256"] for lane in cursor["lanes"].values()).encode()).hexdigest()


def summary(cursor: dict) -> list[dict]:
    """Return counts of each source: what the batches hold, and which records were passed over, each counted once."""
    lanes, rows = list(cursor["lanes"].values()), []
    counts = [packing.trained(lane) for lane in lanes]
    for i, name in enumerate(cursor["sources"]):
        summed = {key: sum(count[key][i] for count in counts) for key in packing.TRAINED}
        # With packed conversations, a lane's own counts are those at the window's start; "drawn" has the newest.
        summed |= {key: sum((lane["drawn"] or lane)[key][i] for lane in lanes) for key in ("unanswered", "refused")}
        newest = [
            (lane["drawn"] or {}).get("passed") or list(map(packing.passed_over, lane["readers"])) for lane in lanes
        ]
        met = {key: sum(passed[i][k] for passed in newest) for k, key in enumerate(("skipped", "empty"))}
        rows.append({"source": name} | summed | met | {"epochs": round(summed["epochs"] / len(lanes), 3)})
    return rows


def describe(counts: dict) -> str:
    """Return a line that says what `summary` counts of a source."""
    shown = [f"{counts[key]:,} {key}" for key in ("documents", "tokens")] + [f"{counts['epochs']:.3g} epochs"]
    rest = ("cut", "unanswered", "refused", "skipped", "empty")
    return f"{counts['source']}: {', '.join(shown + [f'{counts[key]:,} {key}' for key in rest if counts[key]])}"


def check_sources(cursor: dict, p: PhaseConfig, tokenizer: Tokenizer, chats: bool) -> None:
    """Raise UsageError if a phase now has readers or sources of other contents than its cursor.

    The sources' names may change with their files.
    """
    if cursor["readers"] > 1:  # small sources have one, whatever the config says
        _check_readers(cursor, readers(p))
    if cursor["sources"] != [s.spec for s in p.sources]:
        _check_contents(cursor, _open(p.sources, tokenizer, chats), p)


def _refuse_names(cursor: dict, p: PhaseConfig) -> None:
    before, now = ", ".join(cursor["sources"]), ", ".join(s.spec for s in p.sources)
    remedy = "put them back, or use a new --workdir"
    raise UsageError(f"the run is reading {before}, but the config now names {now}; {remedy}")


def _check_cursor(cursor: dict, facts: dict, all_sources: Sequence[Source], p: PhaseConfig) -> None:
    _check_contents(cursor, all_sources, p)
    _check_readers(cursor, facts["readers"])


def _check_readers(cursor: dict, count: int) -> None:
    if cursor["readers"] != count:
        remedy = f"set readers={cursor['readers']} to resume it"
        raise UsageError(f"the run began with readers={cursor['readers']} and the config now gives {count}; {remedy}")


def _check_contents(cursor: dict, all_sources: Sequence[Source], p: PhaseConfig) -> None:
    if len(cursor["sources"]) != len(p.sources):
        _refuse_names(cursor, p)
    for spec, before, config, source in zip(cursor["sources"], cursor["fingerprints"], p.sources, all_sources):
        is_old = spec == config.spec and before == getattr(source, "old_fingerprint", None)  # names and sizes alone
        if before == source.fingerprint or is_old:
            continue
        if before.split("/")[1:] == source.fingerprint.split("/")[1:] != []:
            what = "has the same files, but their names now sort in another order; rename them to sort as before"
        elif spec != config.spec:
            _refuse_names(cursor, p)
        else:
            facts_compared = "contents" if "/" in before else "names or sizes"
            what = f"has changed since the run stopped (its files' {facts_compared}); put it back"
        raise UsageError(f"source {config.spec} {what}, or use a new --workdir")


def _open(configs: Sequence[SourceConfig], tokenizer: Tokenizer, chats: bool) -> list[Source]:
    all_sources = [sources.open_source(config, chats) for config in configs]
    for config, source in zip(configs, all_sources):
        if getattr(source, "tokenizer_sha256", tokenizer.sha256) != tokenizer.sha256:
            remedy = "name that one as tokenizer.path, or run `tokenize` again with this one"
            raise UsageError(f"source {config.spec} was written with another tokenizer; {remedy}")
        if getattr(source, "chats", chats) != chats:
            flag = "with" if chats else "without"
            raise UsageError(f"source {config.spec} must be written by `tokenize` {flag} --chats for this phase")
    return all_sources


def _places(source: Source) -> Iterator[tuple[int, int]]:
    """Yield the block and number of every row that can be read."""
    for block in range(source.blocks):
        with contextlib.suppress(BadRecord):
            yield from ((block, row) for row, _ in enumerate(source.rows(block)))


def _count_rows(source: Source, most: int) -> int:
    return sources.patiently(lambda: sum(1 for _ in itertools.islice(_places(source), most)))


def _shares_blocks(source: Source, rows: int, count: int) -> bool:
    """Return whether lanes share a source by its blocks: if there are plenty, and few of them are without a row."""
    return source.blocks >= PLENTY * count and rows >= min(7 * source.blocks // 8, ROWS_TO_COUNT * count)


def _held_out_every(source: Source, fraction: float) -> int:
    """Return n if every n-th row is held out, or 0 if none is.

    A source of one row, or of few that lie where the rows to hold out do, would have none left to train on.
    """
    period = round(1 / fraction) if fraction else 0
    is_left = lambda: any((block + row) % period for block, row in _places(source))
    return period if period and sources.patiently(is_left) else 0
