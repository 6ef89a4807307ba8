"""Texts that a tokenizer must give back as they are, and where one does not."""

import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator

PROBE = "  Two spaces,\n\n\ta tab,\r\nand \u00e9\u6f22\U0001f600. "  # text that other models tend to lose
# White space and line ends, letters of many scripts, wide and control characters, emoji of several characters, and
# forms that Unicode calls compatible.
TEXTS = [PROBE, "Two  spaces \n and a line end\n", "\r", "\0\x01\x1b[0m\x7f\x85\u2028\u2029\x0b\x0c"]
TEXTS += (
    "I\u0130\u00df\u1e9e|\u00c5na\u00efve|\uff21\uff11\u3000\uff0c|\uff76\uff9e|\ufb01|\u00b2\u2460\u2122\u2026\u00a0\u00bd|"
    "\u201cq\u201d\u2018q\u2019\u2014|a\u200bb\u200d\u00ad\u2060|\ufeffa\ufffd|\ue000\U000f0000|\ufe0f\u20e3|\U00020000|"
    "\U0001f44d\U0001f3fd\U0001f1e9|\U0001f469\u200d\U0001f467|\u0645\u064f\u0640\ufefb|\u0e01\u0e33|\u0915\u094d\u0937|"
    "\ud55c\uae00|``x'' n't|##a @@ </w>"
).split("|")
# Texts of which Unicode says that they are the same as their composed forms; models with NFC, as Qwen's, compose them.
EQUIVALENT = ["e\u0301", "q\u0307\u0323", "\u1112\u1161\u11ab", "\u212b\u2126", "\u0958"]


def composed(text: str) -> str:
    """Return the form that all equivalent texts have in common."""
    return unicodedata.normalize("NFC", text)


def change(tokenizer, texts: Iterable[str], form: Callable[[str], str] = str) -> str:
    """Return where `tokenizer` first changes the `form` of a text and what that becomes, in ASCII, or nothing."""
    for text in texts:
        for part in (text, text.strip()):
            if form(other := tokenizer.decode(tokenizer.encode(part))) != form(part):
                place = max(0, len(os.path.commonprefix([part, other])) - 3)
                return " becomes ".join(ascii(t[place : place + 20]) for t in (part, other))
    return ""


def names(tokenizer) -> Iterator[str]:
    """Yield texts with the names of the symbols, and of pieces that were added to a model, between letters."""
    every = [*tokenizer.specials, *tokenizer.added.values()]
    for start in range(0, len(every), 100):
        yield "".join(f"a{name} b {name}" for name in every[start : start + 100])
