"""Packs documents into rows; the next one comes from the source that is furthest behind its share of the tokens.

A document that would upset the shares is read in pieces, with documents of other sources between them.
"""

import collections
import hashlib
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lowrank_jax.config import UsageError
from lowrank_jax.data import chat
from lowrank_jax.data.blocks import Document
from lowrank_jax.data.reader import Reader
from lowrank_jax.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]
"""tokens, targets (int32), weights (float32, 0: not learnt), segments (int32, from 1; 0: padding), all [rows, length].

targets[t] is the token after tokens[t].
"""

# Conversations are packed into about this many rows at once. The last row stays half empty, which is 1.6% of the room.
WINDOW_ROWS = 32
COUNTS = ("documents", "tokens", "unanswered", "refused")  # of each source, while documents are drawn
TRAINED = ("documents", "tokens", "cut", "epochs")  # of each source, in the batches
# In pieces: no document up to this size is cut. A piece is a step of a lane, so shares err by 0.75 of a step at most.
LONG = 1.5
DEBT = 2048  # tokens of a source that were drawn and not trained, before it gets them back
PATIENCE = 10_000  # successive conversations without an assistant turn, before the run is stopped


def encode_document(tokenizer: Tokenizer, document: Document, chats: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return a document's ids (int32) between BOS and EOS, and which of them carry weight as targets (bool).

    In SFT (`chats`) the assistant's tokens carry weight; in pretraining every token but BOS does.
    """
    if "ids" in document:
        return document["ids"], document["said"]
    if "messages" in document:
        ids, said, is_open = chat.encode_document(tokenizer, document)
    else:
        ids, said, is_open = tokenizer.encode(document["text"]), True, True
    learnt = np.zeros(len(ids) + 2, bool)
    learnt[1:-1], learnt[-1] = (said, is_open) if chats else (True, True)
    return np.array([tokenizer.bos, *ids, tokenizer.eos], np.int32), learnt


class Drawn(NamedTuple):
    """A document, or a piece of one."""

    ids: np.ndarray
    said: np.ndarray  # which ids carry weight as targets
    source: int
    epochs: tuple[float, float]  # of the source, before the first token and after the last
    is_end: bool = True  # of the document


def trained(lane: dict) -> dict:
    """Return what the batches up to a lane's cursor hold of each source; older cursors know what was drawn for them."""
    counts, epochs = lane.get("drawn") or lane, [float(reader["epoch"]) for reader in lane["readers"]]
    return lane.get("trained") or {key: counts[key] for key in TRAINED[:3]} | {"epochs": epochs}


def passed_over(reader: dict) -> list[int]:
    """Return how many records were skipped and empty up to a reader's cursor.

    Its "skipped" and "empty" leave out the records of its newest window; "met" counts those.
    """
    return [reader[key] + reader["met"][k] for k, key in enumerate(("skipped", "empty"))]


class Lane:
    """Rows from one reader of each source; a `cursor` continues them exactly.

    `shares(step)` gives each source's share of the tokens; `sha256` is the start of the hash of all batches. `piece` is
    the size in tokens of the pieces of long documents (0: none are cut).
    """

    def __init__(
        self, readers: list[Reader], tokenizer: Tokenizer, chats: bool, shares: Callable, cursor, sha256, piece
    ):
        self._readers, self._tokenizer, self._chats, self._shares = readers, tokenizer, chats, shares
        start = cursor or {"step": 0, "offset": 0, "packed": [], "sha256": sha256, "piece": piece}
        zeros = [0] * len(readers)
        self._piece = start.get("piece", 0)  # cursors of older versions have none, and keep their order
        self._credit = list(start.get("credit", [0.0] * len(readers)))  # tokens that each source is behind its share
        self._counts = {key: list(start.get(key, zeros)) for key in COUNTS}
        counts = trained(cursor) if cursor else {key: zeros for key in TRAINED}
        self._trained = {key: list(values) for key, values in counts.items()}
        # By source: (the reader's cursor before it, a document that is not drawn whole).
        self._open: dict[int, tuple[dict, Drawn]] = {}
        self._used = list(start.get("used", zeros))  # tokens of each source's open document that are drawn
        self._debt = list(start.get("debt", zeros))  # tokens of each source that were charged and are not trained
        self._offset, self._packed, self._sha256 = start["offset"], [list(p) for p in start["packed"]], start["sha256"]
        self._buffer: list[tuple[dict, Drawn]] = []  # (position before it, document or piece) not used up yet
        self._draw_step = start["step"]  # at which the cursor's document was drawn: shares may depend on it
        self._resumed = cursor is not None  # the first document to draw was then drawn before
        self._window_start, self._rows, self._epochs_each = None, [], {}
        if self._packed:  # draw the window again, and pack it as often as its length grew
            self._window_start = self._position(start["step"])
            documents = self._draw_window(self._packed[0][0], start["step"])
            for length, taken in self._packed:
                self._rows = self._pack(documents, length)[taken:]
                documents = [document for row in self._rows for document in row]

    def cursor(self) -> dict:
        """Return where the next row begins, as JSON values."""
        if self._packed:
            position, drawn = self._window_start, {key: list(values) for key, values in self._counts.items()}
            drawn["passed"] = [passed_over(reader.cursor()) for reader in self._readers]
        else:
            position, drawn = self._buffer[0][0] if self._buffer else self._position(self._draw_step), None
        counts = {key: list(values) for key, values in self._trained.items()}
        facts = {"drawn": drawn, "trained": counts, "piece": self._piece, "sha256": self._sha256}
        return position | {"offset": self._offset, "packed": [list(p) for p in self._packed]} | facts

    def next(self, rows: int, length: int, step: int) -> Batch | None:
        """Return the next rows, or None if the sources are exhausted."""
        batch = self._next_whole(rows, length, step) if self._chats else self._next_exact(rows, length, step)
        if batch is not None:
            digest = hashlib.sha256(f"{self._sha256} {rows} {length}".encode())
            for key in sorted(batch):
                digest.update(batch[key])
            self._sha256 = digest.hexdigest()
        return batch

    def _next_exact(self, rows: int, length: int, step: int) -> Batch | None:
        """Cut the token stream every `length` tokens: the rows' tokens, one after another, are the stream."""
        need = rows * length + 1  # the last target is not used up
        have = sum(len(drawn.ids) for _, drawn in self._buffer) - self._offset
        while have < need:
            drawn = self._draw(self._draw_step if self._resumed else step)
            self._resumed = False
            if drawn is None:
                return None
            self._buffer.append(drawn)
            have += len(drawn[1].ids)
        ids = np.concatenate([drawn.ids for _, drawn in self._buffer])[self._offset :][:need]
        learnt = np.concatenate([drawn.said for _, drawn in self._buffer])[self._offset :][1:need]
        lengths = [len(drawn.ids) for _, drawn in self._buffer]
        document = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[self._offset :][: need - 1]
        self._use_up(rows * length)
        segments = document.reshape(rows, length)
        return {
            "tokens": ids[:-1].reshape(rows, length),
            "targets": ids[1:].reshape(rows, length),
            "weights": learnt.reshape(rows, length).astype(np.float32),  # BOS has none: no target crosses documents
            "segments": segments - segments[:, :1] + 1,
        }

    def _use_up(self, tokens: int) -> None:
        """Move the offset, and count what a batch holds of each source."""
        while tokens:
            drawn = self._buffer[0][1]
            size, (before, after) = len(drawn.ids), drawn.epochs
            n = min(tokens, size - self._offset)
            tokens, self._offset = tokens - n, self._offset + n
            is_whole = self._offset == size
            self._trained["tokens"][drawn.source] += n
            self._trained["documents"][drawn.source] += is_whole and drawn.is_end
            self._trained["epochs"][drawn.source] = before + (after - before) * self._offset / size
            if is_whole:
                self._trained["epochs"][drawn.source] = after
                self._buffer.pop(0)
                self._offset = 0

    def _next_whole(self, rows: int, length: int, step: int) -> Batch | None:
        """Return rows of whole conversations; one that is longer than a row is cut."""
        batch = {key: np.zeros((rows, length), np.int32) for key in ("tokens", "targets", "segments")}
        batch["weights"] = np.zeros((rows, length), np.float32)
        for row in range(rows):
            start = 0
            for segment, drawn in enumerate(self._take_row(length, step), 1):
                n = min(len(drawn.ids) - 1, length)
                span = (row, slice(start, start + n))
                batch["tokens"][span], batch["targets"][span] = drawn.ids[:n], drawn.ids[1 : n + 1]
                batch["weights"][span], batch["segments"][span] = drawn.said[1 : n + 1], segment
                start += n
                counts = {"documents": 1, "tokens": n, "cut": int(len(drawn.ids) - 1 > n)}
                for key, count in (counts | {"epochs": self._epochs_each[drawn.source]}).items():
                    self._trained[key][drawn.source] += count
        return batch if batch["segments"].any() else None

    def _take_row(self, length: int, step: int) -> list[Drawn]:
        """Return the conversations of the next row, or none if the sources are exhausted.

        A window's cursor is where it was drawn, and `packed`: [length, rows taken] for each length that it had.
        """
        if not self._rows:
            self._window_start, self._packed = self._position(step), [[length, 0]]
            self._rows = self._pack(self._draw_window(length, step), length)
        elif self._packed[-1][0] != length:  # the length grew: pack the rest again
            self._packed.append([length, 0])
            self._rows = self._pack([document for row in self._rows for document in row], length)
        row = self._rows.pop(0) if self._rows else []
        self._packed[-1][1] += 1
        if not self._rows:
            self._packed = []
        return row

    def _draw_window(self, length: int, step: int) -> list[Drawn]:
        """Return conversations for WINDOW_ROWS rows; set `_epochs_each`, the part of an epoch of one conversation."""
        window, size, unanswered, first, last = [], 0, 0, {}, {}
        while size < WINDOW_ROWS * length and (position_and_document := self._draw(step)) is not None:
            drawn = position_and_document[1]
            first.setdefault(drawn.source, drawn.epochs[0])
            last[drawn.source] = drawn.epochs[1]
            n, answers = min(len(drawn.ids) - 1, length), drawn.said[1 : length + 1].any()
            self._give_back(drawn.source, len(drawn.ids) - (n + 1 if answers else 0), step)
            if answers:
                window.append(drawn)
                size, unanswered = size + n, 0
                continue
            # Nothing in it can be learnt in a row of this length.
            self._counts["unanswered"][drawn.source] += self._readers[drawn.source].in_first_epoch
            unanswered += 1
            if unanswered == PATIENCE:
                where = f"in {PATIENCE:,} conversations in a row the assistant"
                raise UsageError(f"{where} does not speak within the first {length} tokens; raise config.sft.block")
        counts = collections.Counter(drawn.source for drawn in window)
        self._epochs_each = {source: (last[source] - first[source]) / count for source, count in counts.items()}
        return window

    def _give_back(self, source: int, tokens: int, step: int) -> None:
        """Return to a source the tokens that its documents were charged for and that no row has room for.

        A few of them wait: the shares do not need them, and the order of runs of older versions stays.
        """
        self._debt[source] += tokens if self._piece else 0
        if self._debt[source] > DEBT:
            self._credit = self._charged(source, self._shares(step), -self._debt[source])
            self._debt[source] = 0

    def _pack(self, documents: list[Drawn], length: int) -> list[list[Drawn]]:
        """Pack by best-fit decreasing: the longest first, each into the fullest row with room. Then shuffle the rows.

        grain's BestFitPackIterDataset cannot change its length, and its state depends on that length.
        """
        rows, room = [], []
        for document in sorted(documents, key=lambda d: -len(d.ids)):
            n = min(len(document.ids) - 1, length)
            fitting = (i for i, left in enumerate(room) if left >= n)
            row = min(fitting, key=lambda i: room[i], default=len(rows))
            if row == len(rows):
                rows.append([])
                room.append(length)
            rows[row].append(document)
            room[row] -= n
        return [rows[i] for i in np.random.default_rng([sum(self._counts["documents"]), length]).permutation(len(rows))]

    def _position(self, step: int) -> dict:
        cursors = [self._open[i][0] if i in self._open else r.cursor() for i, r in enumerate(self._readers)]
        places = {"readers": cursors, "credit": self._credit, "step": step}  # `_draw` replaces the credit, so no copy
        long = {"used": list(self._used), "debt": list(self._debt)} if any(self._used) or any(self._debt) else {}
        return {key: list(values) for key, values in self._counts.items()} | places | long

    def _draw(self, step: int) -> tuple[dict, Drawn] | None:
        """Return (position before it, next document or piece of one), or None at the end of sources that may end."""
        shares = self._shares(step)
        while (source := self._furthest_behind(self._credit, shares)) is not None:
            if source not in self._open and not self._open_document(source):
                continue
            before, drawn = self._position(step), self._open[source][1]
            if self._piece and not self._chats and len(drawn.ids) > LONG * self._piece:
                drawn = self._next_piece(drawn, shares)
            self._credit = self._charged(source, shares, len(drawn.ids))
            self._counts["tokens"][source] += len(drawn.ids)
            if drawn.is_end:
                self._counts["documents"][source] += 1
                del self._open[source]
            return before, drawn
        return None

    def _next_piece(self, document: Drawn, shares: tuple[float, ...]) -> Drawn:
        """Return as many pieces of an open document as the shares allow; the next begins with their last token."""
        ids, said, source, (low, high), _ = document
        start, size, n = self._used[source], len(ids), self._piece
        while start + n < size and self._furthest_behind(self._charged(source, shares, n), shares) == source:
            n += self._piece
        stop = min(start + n, size)
        is_end, said = stop == size, said[start:stop].copy()
        said[0] &= start == 0  # the piece before it was trained on this token
        self._used[source] = 0 if is_end else stop - 1
        epochs = low + (high - low) * start / size, high if is_end else low + (high - low) * stop / size
        return Drawn(ids[start:stop], said, source, epochs, is_end)

    def _open_document(self, source: int) -> bool:
        """Read and encode a source's next document; return whether it has one."""
        reader = self._readers[source]
        low = reader.epochs()
        while True:
            cursor = reader.cursor()
            if (document := reader.next()) is None:
                return False
            try:
                ids, said = encode_document(self._tokenizer, document, self._chats)
            except UsageError as e:  # the chat template does not take it
                self._counts["refused"][source] += reader.refuse(str(e))
                continue
            if "messages" in document and reader.endless:  # not of the held-out part, which is told of in training
                reader.limit.report_unused(chat.unused(self._tokenizer, document))
            self._open[source] = cursor, Drawn(ids, said, source, (low, reader.epochs()))
            return True

    def _furthest_behind(self, credit: list[float], shares: tuple[float, ...]) -> int | None:
        """Return the source to draw from, or None at the end; raises UsageError for an endless one that has nothing."""
        furthest, most = None, -math.inf
        for i, (r, share) in enumerate(zip(self._readers, shares)):
            if share and r.exhausted and r.endless:
                bad = f"; the last unusable record: {r.limit.last}" if r.limit.last else ""
                raise UsageError(f"source {r.limit.name}: a whole epoch has no document to train on{bad}")
            if share and not r.exhausted and credit[i] + share > most:
                furthest, most = i, credit[i] + share
        return furthest

    def _charged(self, source: int, shares: tuple[float, ...], tokens: int) -> list[float]:
        credit = [credit + share * tokens for credit, share in zip(self._credit, shares)]
        credit[source] -= tokens
        return credit


def show(batch: Batch, tokenizer: Tokenizer, marks: tuple[str, str], tokens: int) -> str:
    """Return the first `tokens` of a batch's first row as text, with `marks` around what is trained."""
    names = {i: name for name, i in tokenizer.specials.items()}
    row = {key: array[0][:tokens] for key, array in batch.items()}
    used = int((row["segments"] > 0).sum())
    ids, learnt = [row["tokens"][0], *row["targets"][:used]], [False, *(row["weights"][:used] > 0)]
    text, kind = "", lambda token: (token[1], names.get(int(token[0])))
    for (is_learnt, name), tokens_of_kind in itertools.groupby(zip(ids, learnt), kind):
        stretch = [i for i, _ in tokens_of_kind]  # decoded as one: a character may take several ids
        part = name * len(stretch) if name else tokenizer.decode(stretch)
        text += marks[0] + part + marks[1] if is_learnt else part
    return text.replace(marks[1] + marks[0], "")
