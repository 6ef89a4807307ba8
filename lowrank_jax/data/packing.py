"""One reader's part of every batch: mixes the sources, and cuts their documents into rows.

Mixing is deterministic: the next document comes from the source that is furthest behind its share of the tokens.
"""

import hashlib
from collections.abc import Callable

import numpy as np

from lowrank_jax.config import UsageError
from lowrank_jax.data import chat
from lowrank_jax.data.reader import Reader, describe
from lowrank_jax.data.records import BadRecord, Document
from lowrank_jax.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]
"""tokens, targets (int32), weights (float32: 0 where a target is not to be learnt), segments (int32: from 1; 0 pads).

All are [rows, length]; targets[t] is the token after tokens[t].
"""

# Conversations are packed from about this many rows at a time, of which the last stays half empty: 1.6% of the room.
WINDOW_ROWS = 32
COUNTS = ("documents", "tokens", "cut", "unanswered", "refused")  # kept for each source
PATIENCE = 10_000  # conversations in a row in which the assistant does not speak, before the run is stopped


def encode_document(tokenizer: Tokenizer, document: Document, chats: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ids (int32) of a document between BOS and EOS, and which of them carry weight as targets (bool).

    In SFT (`chats`) only what the assistant says; in pretraining everything but BOS.
    """
    if "ids" in document:
        return document["ids"], document["said"]
    said = True
    if "messages" in document:
        ids, said_in_chat = chat.encode(tokenizer, document["messages"])
        said = said_in_chat if chats else True
    else:
        ids = tokenizer.encode(document["text"])
    whole, learnt = np.empty(len(ids) + 2, np.int32), np.empty(len(ids) + 2, bool)
    whole[0], whole[1:-1], whole[-1] = tokenizer.bos, ids, tokenizer.eos
    learnt[0], learnt[1:-1], learnt[-1] = False, said, not chats
    return whole, learnt


class Lane:
    """Rows from one reader of each source; `cursor()` and the constructor's `cursor` continue them exactly.

    `shares(step)` gives each source's share of the tokens; `sha256` is where the hash of all batches starts.
    """

    def __init__(self, readers: list[Reader], tokenizer: Tokenizer, chats: bool, shares: Callable, cursor, sha256: str):
        self._readers, self._tokenizer, self._chats, self._shares = readers, tokenizer, chats, shares
        zeros = [0] * len(readers)
        at = cursor or {"step": 0, "offset": 0, "packed": [], "sha256": sha256}
        self._credit = list(at.get("credit", [0.0] * len(readers)))  # tokens that each source is behind its share
        self._counts = {key: list(at.get(key, zeros)) for key in COUNTS}
        self._offset, self._packed, self._sha256 = at["offset"], [list(p) for p in at["packed"]], at["sha256"]
        self._buffer: list[tuple] = []  # (position before it, ids, said): documents not yet used up
        self._drawn_at = at["step"]  # the step at which the document at the cursor was drawn, when shares may differ
        self._resumed = cursor is not None  # the first document to be drawn is then one that was drawn before
        self._window_at, self._rows = None, []
        if self._packed:
            self._restore_window(at["step"])

    def cursor(self) -> dict:
        """Where the next row begins, as JSON values."""
        at = self._window_at if self._packed else self._buffer[0][0] if self._buffer else self._position(self._drawn_at)
        drawn = {key: list(values) for key, values in self._counts.items()} if self._packed else None  # for `summary`
        packed = [list(p) for p in self._packed]
        return at | {"offset": self._offset, "packed": packed, "drawn": drawn, "sha256": self._sha256}

    def next(self, rows: int, length: int, step: int) -> Batch | None:
        """The next rows, or None where the sources are exhausted."""
        batch = self._next_whole(rows, length, step) if self._chats else self._next_exact(rows, length, step)
        if batch is not None:
            digest = hashlib.sha256(f"{self._sha256} {rows} {length}".encode())
            for key in sorted(batch):
                digest.update(batch[key])
            self._sha256 = digest.hexdigest()
        return batch

    def _next_exact(self, rows: int, length: int, step: int) -> Batch | None:
        """Cuts the token stream every `length` tokens. Concatenated inputs are the stream: nothing lost or repeated."""
        need = rows * length + 1  # the last target is looked at, not used up
        have = sum(len(ids) for _, ids, _ in self._buffer) - self._offset
        while have < need:
            drawn = self._draw(self._drawn_at if self._resumed else step)
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
            "weights": learnt.reshape(rows, length).astype(np.float32),  # no BOS is learnt: no target crosses documents
            "segments": segments - segments[:, :1] + 1,
        }

    def _next_whole(self, rows: int, length: int, step: int) -> Batch | None:
        """Rows of whole conversations; one that is longer than a row is cut to it."""
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
        """The conversations of the next row; none where the sources are exhausted.

        The cursor of a window of conversations is where it was drawn, and how many rows of which length were taken:
        `packed`, a list of [length, rows].
        """
        if not self._rows:
            self._window_at, self._packed = self._position(step), [[length, 0]]
            self._rows = self._pack(self._draw_window(length, step), length)
        elif self._packed[-1][0] != length:  # the length grew: the rest is packed anew
            self._packed.append([length, 0])
            self._rows = self._pack([document for row in self._rows for document in row], length)
        if not self._rows:
            self._packed = []
            return []
        row = self._rows.pop(0)
        self._packed[-1][1] += 1
        if not self._rows:
            self._packed = []
        return row

    def _restore_window(self, step: int) -> None:
        self._window_at, history = self._position(step), self._packed
        documents = self._draw_window(history[0][0], step)
        for length, taken in history:
            self._rows = self._pack(documents, length)[taken:]
            documents = [document for row in self._rows for document in row]

    def _draw_window(self, length: int, step: int) -> list[tuple[np.ndarray, np.ndarray]]:
        window, size, unanswered = [], 0, 0
        while size < WINDOW_ROWS * length and (drawn := self._draw(step)) is not None:
            _, ids, said = drawn
            self._counts["cut"][self._source] += len(ids) - 1 > length
            if said[1 : length + 1].any():
                window.append((ids, said))
                size += min(len(ids) - 1, length)
                unanswered = 0
                continue
            self._counts["unanswered"][self._source] += 1  # nothing of it could be learnt in a row of this length
            unanswered += 1
            if unanswered == PATIENCE:
                raise UsageError(
                    f"in {PATIENCE:,} conversations in a row the assistant does not speak within the first {length} "
                    "tokens; raise config.sft.block"
                )
        return window

    def _pack(self, documents: list[tuple], length: int) -> list[list[tuple]]:
        """Best-fit decreasing: the longest first, each into the fullest row that takes it. The rows are then shuffled.

        (grain's BestFitPackIterDataset has one length for good, and a state that is tied to it.)
        """
        rows, room = [], []
        for document in sorted(documents, key=lambda d: -len(d[0])):
            n = min(len(document[0]) - 1, length)
            fitting = [i for i, left in enumerate(room) if left >= n]
            if fitting:
                row = min(fitting, key=lambda i: room[i])
            else:
                row = len(rows)
                rows.append([])
                room.append(length)
            rows[row].append(document)
            room[row] -= n
        return [rows[i] for i in np.random.default_rng([sum(self._counts["documents"]), length]).permutation(len(rows))]

    def _position(self, step: int) -> dict:
        counts = {key: list(values) for key, values in self._counts.items()}
        return counts | {"readers": [r.cursor() for r in self._readers], "credit": list(self._credit), "step": step}

    def _draw(self, step: int) -> tuple[dict, np.ndarray, np.ndarray] | None:
        """(position before it, ids, said) of the next document; None where the sources are exhausted."""
        shares = self._shares(step)
        while True:
            before = self._position(step)
            able = [share if not r.exhausted else 0.0 for share, r in zip(shares, self._readers)]
            if not any(able):
                return self._end()
            source = max((i for i, share in enumerate(able) if share), key=lambda i: self._credit[i] + able[i])
            document = self._readers[source].next()
            if document is None:
                continue
            try:
                ids, said = encode_document(self._tokenizer, document, self._chats)
                break
            except UsageError as e:  # the chat template does not take it
                limit = self._readers[source].limit
                self._counts["refused"][source] += 1
                limit.skip(BadRecord(f"source {limit.name}", str(e)))
        for i, share in enumerate(shares):
            self._credit[i] += share * len(ids)
        self._credit[source] -= len(ids)
        self._counts["documents"][source] += 1
        self._counts["tokens"][source] += len(ids)
        self._source = source
        return before, ids, said

    def _end(self) -> None:
        if any(r.endless for r in self._readers):
            bad = [describe(r.limit.last) for r in self._readers if r.limit.last]
            why = f"; the last record that could not be used: {bad[-1]}" if bad else ""
            raise UsageError(f"a whole epoch of every source held no document to train on{why}")


def show(batch: Batch, tokenizer: Tokenizer, marks: tuple[str, str], tokens: int) -> str:
    """The first `tokens` of a batch's first row as text, with `marks` around what is trained."""
    names = {i: name for name, i in tokenizer.specials.items()}
    row = {key: array[0][:tokens] for key, array in batch.items()}
    used = int((row["segments"] > 0).sum())
    ids, learnt = [row["tokens"][0], *row["targets"][:used]], [False, *(row["weights"][:used] > 0)]
    text, start = "", 0
    for i in range(1, len(ids) + 1):  # stretches of equal kind: a character may take several ids
        kind = lambda k: (learnt[k], names.get(int(ids[k])))
        if i == len(ids) or kind(i) != kind(start) or kind(start)[1]:
            part = kind(start)[1] or tokenizer.decode(ids[start:i])
            text += marks[0] + part + marks[1] if learnt[start] else part
            start = i
    return text.replace(marks[1] + marks[0], "")
