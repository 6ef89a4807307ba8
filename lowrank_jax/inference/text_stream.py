"""Text from token ids as they arrive, cut before the first stop string."""

import functools
from collections.abc import Sequence

from lowrank_jax.data.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # ends a decoded text whose last character lacks bytes


class StopString:
    """A stop string, searched in a text that arrives in pieces, in time linear in the text.

    The search is Knuth, Morris and Pratt's (1977). pyahocorasick searches for many strings at once, but does not say
    how much of one the text may have begun.
    """

    def __init__(self, letters: str):
        self.letters, self.matched = letters, 0  # the text so far ends with so many letters of it
        self._shorter = _shorter(letters)

    def ends_at(self, text: str) -> int | None:
        """Return how many letters of `text`, which follows the text so far, complete the string; None if they do not.

        After a match no more text may follow.
        """
        for count, letter in enumerate(text, 1):
            self.matched = _longer(self.letters, self._shorter, self.matched, letter)
            if self.matched == len(self.letters):
                return count
        return None


@functools.lru_cache(maxsize=16)  # the answers of one request have the same stop strings
def _shorter(letters: str) -> list[int]:
    """Return the longest shorter match that also holds, per number of matched letters less one."""
    shorter = [0]
    for letter in letters[1:]:
        shorter.append(_longer(letters, shorter, shorter[-1], letter))
    return shorter


def _longer(letters: str, shorter: list[int], matched: int, letter: str) -> int:
    while matched and letters[matched] != letter:
        matched = shorter[matched - 1]
    return matched + (letters[matched] == letter)


class Writer:
    """Writes text as ids arrive: the pieces of `add` and `end`, joined, are the text of all ids.

    It holds back text that may change: a character without all its bytes, or the beginning of a stop string. Once a
    stop string is complete, neither it nor later text is written, and `stopped` is true.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), before: Sequence[int] = ()):
        self._tokenizer, self._stops = tokenizer, [StopString(letters) for letters in filter(None, stop)]
        self._ids = list(before[-8:])  # already written; some tokenizers leave out a space where a text begins
        self._from = 0  # ids before this one no longer affect the text to come
        self._done = tokenizer.decode(self._ids)  # the decoded text of the ids from `_from` on
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
        text = self._pending + new
        ends = [(end, -len(stop.letters)) for stop in self._stops if (end := stop.ends_at(new)) is not None]
        if ends:  # the stop string that is complete first counts, however the ids are cut into pieces
            self.stopped, (end, back) = True, min(ends)
            return text[: len(self._pending) + end + back]
        longest = max((stop.matched for stop in self._stops), default=0)
        self._pending = text[len(text) - longest :]
        return text[: len(text) - longest]
