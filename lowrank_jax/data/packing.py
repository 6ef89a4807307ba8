"""Packs documents into rows; the next one comes from the source that is furthest behind its share of the tokens."""

import hashlib
import itertools
from collections.abc import Callable

import numpy as np

from lowrank_jax.config import UsageError
from lowrank_jax.data import chat
from lowrank_jax.data.blocks import BadRecord, Document
from lowrank_jax.data.reader import Reader
from lowrank_jax.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]
"""tokens, targets (int32), weights (float32, 0: not learnt), segments (int32, from 1; 0: padding), all [rows, length].

targets[t] is the token after tokens[t].
"""

# Conversations are packed into about this many rows at once. The last row stays half empty, which is 1.6% of the room.
WINDOW_ROWS = 32
COUNTS = ("documents", "tokens", "cut", "unanswered", "refused")  # of each source
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


class Lane:
    """Rows from one reader of each source; a `cursor` continues them exactly.

    `shares(step)` gives each source's share of the tokens; `sha256` is the start of the hash of all batches.
    """

    def __init__(self, readers: list[Reader], tokenizer: Tokenizer, chats: bool, shares: Callable, cursor, sha256: str):
        self._readers, self._tokenizer, self._chats, self._shares = readers, tokenizer, chats, shares
        start = cursor or {"step": 0, "offset": 0, "packed": [], "sha256": sha256}
        self._credit = list(start.get("credit", [0.0] * len(readers)))  # tokens that each source is behind its share
        self._counts = {key: list(start.get(key, [0] * len(readers))) for key in COUNTS}
        self._offset, self._packed, self._sha256 = start["offset"], [list(p) for p in start["packed"]], start["sha256"]
        self._buffer: list[tuple] = []  # (position before it, ids, said) of documents not used up yet
        self._draw_step = start["step"]  # at which the cursor's document was drawn: shares may depend on it
        self._resumed = cursor is not None  # the first document to draw was then drawn before
        self._window_start, self._rows = None, []
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
        else:
            position, drawn = self._buffer[0][0] if self._buffer else self._position(self._draw_step), None
        packed = [list(p) for p in self._packed]
        return position | {"offset": self._offset, "packed": packed, "drawn": drawn, "sha256": self._sha256}

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
        have = sum(len(ids) for _, ids, _ in self._buffer) - self._offset
        while have < need:
            drawn = self._draw(self._draw_step if self._resumed else step)
            self._resumed = False
            if drawn is None:
                return None
            self._buffer.append(drawn)
            have += len(drawn[1])
        ids = np.concatenate([ids for _, ids, _ in self._buffer])[self._offset :][:need]
        learnt = np.concatenate([said for _, _, said in self._buffer])[self._offset :][1:need]
        lengths = [len(ids) for _, ids, _ in self._buffer]
        document = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[self._offset :][: need - 1]
        self._offset += rows * length
        while self._offset >= len(self._buffer[0][1]):
            self._offset -= len(self._buffer.pop(0)[1])
        segments = document.reshape(rows, length)
        return {
            "tokens": ids[:-1].reshape(rows, length),
            "targets": ids[1:].reshape(rows, length),
            "weights": learnt.reshape(rows, length).astype(np.float32),  # BOS has none: no target crosses documents
            "segments": segments - segments[:, :1] + 1,
        }

    def _next_whole(self, rows: int, length: int, step: int) -> Batch | None:
        """Return rows of whole conversations; one that is longer than a row is cut."""
        batch = {key: np.zeros((rows, length), np.int32) for key in ("tokens", "targets", "segments")}
        batch["weights"] = np.zeros((rows, length), np.float32)
        for row in range(rows):
            start = 0
            for segment, (ids, said) in enumerate(self._take_row(length, step), 1):
                n = min(len(ids) - 1, length)
                span = (row, slice(start, start + n))
                batch["tokens"][span], batch["targets"][span] = ids[:n], ids[1 : n + 1]
                batch["weights"][span], batch["segments"][span] = said[1 : n + 1], segment
                start += n
        return batch if batch["segments"].any() else None

    def _take_row(self, length: int, step: int) -> list[tuple[np.ndarray, np.ndarray]]:
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

    def _draw_window(self, length: int, step: int) -> list[tuple[np.ndarray, np.ndarray]]:
        window, size, unanswered = [], 0, 0
        while size < WINDOW_ROWS * length and (drawn := self._draw(step)) is not None:
            _, ids, said = drawn
            self._counts["cut"][self._source] += len(ids) - 1 > length
            if said[1 : length + 1].any():
                window.append((ids, said))
                size, unanswered = size + min(len(ids) - 1, length), 0
                continue
            self._counts["unanswered"][self._source] += 1  # nothing in it can be learnt in a row of this length
            unanswered += 1
            if unanswered == PATIENCE:
                where = f"in {PATIENCE:,} conversations in a row the assistant"
                raise UsageError(f"{where} does not speak within the first {length} tokens; raise config.sft.block")
        return window

    def _pack(self, documents: list[tuple], length: int) -> list[list[tuple]]:
        """Pack by best-fit decreasing: the longest first, each into the fullest row with room. Then shuffle the rows.

        grain's BestFitPackIterDataset cannot change its length, and its state depends on that length.
        """
        rows, room = [], []
        for document in sorted(documents, key=lambda d: -len(d[0])):
            n = min(len(document[0]) - 1, length)
            fitting = (i for i, left in enumerate(room) if left >= n)
            row = min(fitting, key=lambda i: room[i], default=len(rows))
            if row == len(rows):
                rows.append([])
                room.append(length)
            rows[row].append(document)
            room[row] -= n
        return [rows[i] for i in np.random.default_rng([sum(self._counts["documents"]), length]).permutation(len(rows))]

    def _position(self, step: int) -> dict:
        places = {"readers": [r.cursor() for r in self._readers], "credit": list(self._credit), "step": step}
        return {key: list(values) for key, values in self._counts.items()} | places

    def _draw(self, step: int) -> tuple[dict, np.ndarray, np.ndarray] | None:
        """Return (position before it, ids, said) of the next document, or None at the end of sources that may end."""
        shares = self._shares(step)
        while True:
            before = self._position(step)
            able = [share if not r.exhausted else 0.0 for share, r in zip(shares, self._readers)]
            if not any(able):
                if not any(r.endless for r in self._readers):
                    return None
                bad = [f"; the last unusable record: {r.limit.last}" for r in self._readers if r.limit.last]
                raise UsageError("a whole epoch of every source has no document to train on" + "".join(bad[-1:]))
            source = max((i for i, share in enumerate(able) if share), key=lambda i: self._credit[i] + able[i])
            document = self._readers[source].next()
            if document is None:
                continue
            try:
                ids, said = encode_document(self._tokenizer, document, self._chats)
                if "messages" in document and self._readers[source].endless:  # training, not the held-out part
                    self._readers[source].limit.report_unused(chat.unused(self._tokenizer, document))
                break
            except UsageError as e:  # the chat template does not take it
                limit = self._readers[source].limit
                self._counts["refused"][source] += 1
                limit.skip(BadRecord(f"source {limit.name}", str(e)))
        self._credit = [credit + share * len(ids) for credit, share in zip(self._credit, shares)]
        self._credit[source] -= len(ids)
        self._counts["documents"][source] += 1
        self._counts["tokens"][source] += len(ids)
        self._source = source
        return before, ids, said


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
