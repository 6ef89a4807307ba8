"""Token ids to text as they come."""

from collections.abc import Sequence

from lowrank_jax.data.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what a decoder makes of a character whose last bytes are still to come


class Writer:
    """The text of the ids given to `add`, piece by piece; all pieces and `end` joined are the text of all ids.

    What may still change is held back: a character without all its bytes, and what may become a stop string. Once one
    is whole, neither it nor anything behind it is written, and `stopped` is true.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(filter(None, stop))
        self._ids: list[int] = []
        self._from = 0  # ids before it are written and too far back to matter to what comes
        self._done = ""  # the text of the ids from there on that has been taken from the decoder
        self._held = ""  # taken, but it may become a stop string
        self.stopped = False

    def add(self, ids: Sequence[int]) -> str:
        self._ids += ids
        text = self._tokenizer.decode(self._ids[self._from :])
        if text.endswith(UNFINISHED) and len(self._ids) - self._from < 64:
            return ""
        new, self._done = text[len(self._done) :], text
        if len(self._ids) - self._from > 32:  # some ids stay: how one is written may depend on those before it
            self._from = len(self._ids) - 8
            self._done = self._tokenizer.decode(self._ids[self._from :])
        return self._release(new)

    def end(self) -> str:
        """The rest, when no ids will follow."""
        text = self._tokenizer.decode(self._ids[self._from :])[len(self._done) :]
        self._done += text
        new = self._release(text)
        if self.stopped:
            return new
        held, self._held = self._held, ""
        return new + held

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text, self._held = self._held + new, ""
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:  # what is whole first counts, so that it does not matter how ids are cut
            self.stopped = True
            return text[: min(found)[1]]
        longest = max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest]
