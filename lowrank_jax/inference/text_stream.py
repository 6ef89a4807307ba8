"""Text of token ids, piece by piece."""

from collections.abc import Sequence

from lowrank_jax.data.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # a decoder's output for a character without its last bytes


class Writer:
    """Writes text as ids arrive: the pieces of `add` and `end`, joined, are the text of all ids.

    It holds back text that may change: a character without all its bytes, or the beginning of a stop string. Once a
    stop string is complete, neither it nor later text is written, and `stopped` is true.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(filter(None, stop))
        self._ids: list[int] = []
        self._from = 0  # ids before this one no longer affect the text to come
        self._done = ""  # the decoded text of the ids from `_from` on
        self._pending = ""  # decoded, but it may begin a stop string
        self.decoded = 0  # characters that are decoded, whether they are written or held back
        self.stopped = False

    def add(self, ids: Sequence[int]) -> str:
        self._ids += ids
        text = self._tokenizer.decode(self._ids[self._from :])
        if text.endswith(UNFINISHED) and len(self._ids) - self._from < 64:
            return ""
        new, self._done = text[len(self._done) :], text
        if len(self._ids) - self._from > 32:  # some ids stay, because the text of an id may depend on ids before it
            self._from = len(self._ids) - 8
            self._done = self._tokenizer.decode(self._ids[self._from :])
        return self._release(new)

    def end(self) -> str:
        """Return the rest of the text, when no more ids follow."""
        new = self._release(self._tokenizer.decode(self._ids[self._from :])[len(self._done) :])
        return new if self.stopped else new + self._pending

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        self.decoded += len(new)
        text, self._pending = self._pending + new, ""
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stop if stop in text]
        if ends:  # the stop string that is complete first counts, however the ids are cut into pieces
            self.stopped = True
            return text[: min(ends)[1]]
        longest = max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._pending = text[len(text) - longest :]
        return text[: len(text) - longest]
