"""The pieces of a SentencePiece model, read from its bytes, which are a protocol buffer.

Field numbers and defaults are those of sentencepiece_model.proto (github.com/google/sentencepiece).
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from lowrank_jax.config import UsageError

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # kinds of pieces; GGUF numbers them alike
BPE = 2


class Piece(NamedTuple):
    text: str
    score: float
    kind: int


def read(model: bytes) -> list[Piece]:
    """The pieces by id; raises UsageError unless it is BPE that takes a text as it is, as tokenizer.train makes it."""
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(model):
        if number == 1:
            facts = dict(_fields(value))
            score = struct.unpack("<f", facts[2])[0] if 2 in facts else 0.0
            pieces.append(Piece(facts[1].decode(), score, facts.get(3, NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if trainer.get(3) != BPE:
        raise UsageError("only SentencePiece models of the kind BPE can be exported; this one is of another")
    if normalizer.get(2) or normalizer.get(3, 1) or normalizer.get(4, 1):  # a character map; prefix; fewer spaces
        raise UsageError("a SentencePiece model that changes the text (normalisation, dummy prefix) cannot be exported")
    return pieces


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) pairs of a message: whole numbers as int, anything else as its bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
        else:
            size, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = data[at : at + size], at + size
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number whose bytes of 7 bits begin at `at`, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at
