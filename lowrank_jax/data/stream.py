"""Documents to batches: mix, pack, and a cursor that continues at the exact token.

The cursor is a small plain dict. It says where every source was before the oldest document that is still in use, and
how many of that document's tokens are spent; no token is ever stored. The shape of a batch is an argument of `next`,
so sequences may grow without a token lost or repeated.

Mixing is deterministic: the next document comes from the source that is furthest below its share of the tokens so far.
"""

import hashlib
from collections.abc import Sequence

import grain
import numpy as np

from lowrank_jax.config import PhaseConfig, SourceConfig, UsageError
from lowrank_jax.data import chat, sources
from lowrank_jax.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]
"""tokens, targets (int32), weights (float32: 0 where a target is not to be learnt), segments (int32: from 1; 0 pads).

All are [rows, length]; targets[t] is the token after tokens[t].
"""


def open_phase(p: PhaseConfig, tokenizer: Tokenizer, seed: int, chats: bool, held_out: bool, cursor=None) -> "Stream":
    """The stream of a phase's training part (endless, shuffled) or of its held-out part (once, in order)."""
    parts = [sources.Subset(sources.open_source(s), p.eval_fraction, held_out) for s in p.sources]
    used = [(s, part) for s, part in zip(p.sources, parts) if len(part)]
    names, documents = [s.spec for s, _ in used], [part for _, part in used]
    return Stream(names, documents, [s.weight for s, _ in used], tokenizer, seed, chats, not held_out, cursor)


def read_once(all_sources: Sequence[SourceConfig], tokenizer: Tokenizer) -> "Stream":
    """All of some sources, once and in order, with weight on every token."""
    names, weights = [s.spec for s in all_sources], [s.weight for s in all_sources]
    return Stream(names, [sources.open_source(s) for s in all_sources], weights, tokenizer, 0, False, False, None)


def check_records(p: PhaseConfig, limit: int = 100_000) -> None:
    """Reads the records of every JSON source (at most `limit`), so that a mistake is found before the first step."""
    for source in p.sources:
        documents = sources.open_source(source)
        for i in range(min(limit, len(documents)) if isinstance(documents, sources.JsonFiles) else 0):
            documents[i]


def check(p: PhaseConfig, tokenizer: Tokenizer, chats: bool, limit: int = 200) -> None:
    """Encodes the first documents of every source; raises UsageError where there would be nothing to learn from."""
    for source in p.sources:
        documents = sources.open_source(source)
        first = [_encode(tokenizer, documents[i], chats, source.spec) for i in range(min(limit, len(documents)))]
        if not any(ids for ids, _ in first):
            raise UsageError(f"source {source.spec}: there is no text in it")
        if chats and not any(any(said[1 : p.block + 1]) for _, said in first):
            raise UsageError(
                f"source {source.spec}: in no conversation does the assistant speak within the first {p.block} tokens; "
                "raise config.sft.block"
            )


def check_cursor(cursor: dict, names: list[str]) -> None:
    """Raises UsageError where a phase now names other sources than those that the cursor counts."""
    if cursor["sources"] != names:
        was, now = ", ".join(cursor["sources"]), ", ".join(names)
        raise UsageError(
            f"the run is reading {was}, but the config now names {now}; put them back, or use a new --workdir"
        )


def texts(phases: Sequence[PhaseConfig], max_bytes: int):
    """Texts of the training parts, every phase in equal parts, for a tokenizer to learn from."""
    for p in phases:
        parts = [sources.Subset(sources.open_source(s), p.eval_fraction, held_out=False) for s in p.sources]
        for part in parts:
            left = max_bytes // len(phases) // len(parts)
            for document in grain.MapDataset.source(part).seed(0).shuffle():
                text = "\n".join(m["content"] for m in document.get("messages", [])) or document.get("text", "")
                yield text
                left -= len(text.encode())
                if left <= 0:
                    break


class Stream:
    """Batches of packed tokens; `cursor()` and the constructor's `cursor` continue it exactly."""

    def __init__(self, names, documents, weights, tokenizer: Tokenizer, seed: int, chats: bool, endless: bool, cursor):
        self._lengths = [len(d) for d in documents]
        self._names, self._tokenizer, self._chats, self._endless = names, tokenizer, chats, endless
        self._documents = []
        for i, source in enumerate(documents):
            ordered = grain.MapDataset.source(source)
            self._documents.append(ordered.seed(seed + i).shuffle().repeat() if endless else ordered)
        self._weights = np.asarray(weights, np.float64) / max(sum(weights), 1e-9)
        if cursor is not None:
            check_cursor(cursor, names)
            for name, was, now in zip(names, cursor["documents"], self._lengths):
                if was != now:
                    raise UsageError(f"source {name} had {was} documents when the run stopped and has {now} now")
        self._drawn = list(cursor["drawn"]) if cursor else [0] * len(names)  # documents taken from each source
        self._tokens = list(cursor["tokens"]) if cursor else [0] * len(names)  # tokens taken from each source
        self._offset = cursor["offset"] if cursor else 0  # tokens already used of the oldest buffered document
        self._buffer: list[tuple[dict, list[int], list[bool]]] = []  # (position before it, ids, weights)

    def cursor(self) -> dict:
        """Where the next batch begins, as JSON values."""
        at = self._buffer[0][0] if self._buffer else self._position()
        return {"sources": self._names, "documents": self._lengths, "offset": self._offset} | at

    def next(self, rows: int, length: int) -> Batch | None:
        """The next batch, or None at the end of a stream that is not endless."""
        return self._next_whole(rows, length) if self._chats else self._next_exact(rows, length)

    def _next_exact(self, rows: int, length: int) -> Batch | None:
        """Cuts the token stream every `length` tokens. Concatenated inputs are the stream: nothing lost or repeated."""
        need = rows * length + 1  # the last target is looked at, not used up
        have = sum(len(ids) for _, ids, _ in self._buffer) - self._offset
        while have < need:
            if not self._draw():
                return None
            have += len(self._buffer[-1][1])
        ids = np.concatenate([np.asarray(ids, np.int32) for _, ids, _ in self._buffer])[self._offset :][:need]
        said = np.concatenate([np.asarray(said, bool) for _, _, said in self._buffer])[self._offset :][:need]
        lengths = [len(ids) for _, ids, _ in self._buffer]
        document = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[self._offset :][:need]
        self._offset += rows * length
        while self._offset >= len(self._buffer[0][1]):
            self._offset -= len(self._buffer.pop(0)[1])
        learnt = said[1:] & (document[1:] == document[:-1])  # nothing predicts the start of another document
        segments = document[:-1].reshape(rows, length)
        return {
            "tokens": ids[:-1].reshape(rows, length),
            "targets": ids[1:].reshape(rows, length),
            "weights": learnt.reshape(rows, length).astype(np.float32),
            "segments": segments - segments[:, :1] + 1,
        }

    def _next_whole(self, rows: int, length: int) -> Batch | None:
        """Packs whole conversations, each into the fullest row that takes it, until one fits in no row.

        That one starts the next batch. A conversation longer than a row is cut to it.
        """
        batch = {key: np.zeros((rows, length), np.int32) for key in ("tokens", "targets", "segments")}
        batch["weights"] = np.zeros((rows, length), np.float32)
        used, count = np.zeros(rows, int), np.zeros(rows, int)
        while self._buffer or self._draw():
            _, ids, said = self._buffer[0]
            n = min(len(ids) - 1, length)
            fitting = np.flatnonzero(used + n <= length)
            if not len(fitting):
                break
            row = fitting[np.argmax(used[fitting])]
            span = (row, slice(used[row], used[row] + n))
            used[row] += n
            count[row] += 1
            batch["tokens"][span], batch["targets"][span] = ids[:n], ids[1 : n + 1]
            batch["weights"][span], batch["segments"][span] = said[1 : n + 1], count[row]
            self._buffer.pop(0)
        return batch if used.any() else None

    def _position(self) -> dict:
        return {"drawn": list(self._drawn), "tokens": list(self._tokens)}

    def _draw(self) -> bool:
        """Buffers the next document that has tokens; False when the sources are exhausted."""
        for _ in range(1_000_000):
            left = [self._endless or n < len(d) for n, d in zip(self._drawn, self._documents)]
            if not any(left):
                return False
            behind = self._weights * (sum(self._tokens) + 1) - self._tokens
            source = int(np.argmax(np.where(left, behind, -np.inf)))
            before, document = self._position(), self._documents[source][self._drawn[source]]
            ids, said = _encode(self._tokenizer, document, self._chats, self._names[source])
            self._drawn[source] += 1
            self._tokens[source] += len(ids)
            if ids:
                self._buffer.append((before, ids, said))
                return True
        raise UsageError(f"source {self._names[source]}: a million documents in a row without any text")


def _encode(tokenizer: Tokenizer, document: dict, chats: bool, name: str) -> tuple[list[int], list[bool]]:
    """Ids of a document between BOS and EOS, and which of them carry weight as targets.

    In SFT (`chats`) only what the assistant says; in pretraining everything. A document without text has no ids.
    """
    if "messages" in document:
        ids, said = chat.encode(tokenizer, document["messages"])
        said = said if chats else [True] * len(ids)
    elif chats:
        raise UsageError(f"source {name}: a record has no messages, so SFT has no assistant turn to learn from")
    else:
        ids = tokenizer.encode(document["text"]) if document["text"].strip() else []
        said = [True] * len(ids)
    return ([tokenizer.bos, *ids, tokenizer.eos], [False, *said, not chats]) if ids else ([], [])


def chain_sha256(previous: str, batch: Batch) -> str:
    """Hash of every batch so far: two runs that agree here have trained on the same tokens in the same order."""
    digest = hashlib.sha256(previous.encode())
    for key in sorted(batch):
        digest.update(batch[key].tobytes())
    return digest.hexdigest()
