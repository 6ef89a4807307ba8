"""SentencePiece BPE with byte fallback: text -> ids -> exactly the same text.

What it takes for ids to round-trip, and for user text to stay text:
- identity normalisation, no dummy prefix, no whitespace removal;
- a line feed is a piece of its own, so a text may be encoded line by line: the same ids, several times faster than
  as one string;
- chat tags are control symbols, which no text can ever encode to: only `special` yields their ids;
- a literal U+2581, SentencePiece's own mark for a space, is encoded as its three UTF-8 bytes.
"""

import io
import os
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece as spm

from lowrank_jax.config import UsageError

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
SPACE_MARK = "\u2581"
LONGEST_LINE = 1 << 16  # characters of a line that a tokenizer learns from in one piece
MODEL_FILE, TEMPLATE_FILE = "sentencepiece.model", "chat_template.jinja"
# ChatML, the chat template of every new tokenizer. What stands inside {% generation %} carries weight: the answer and
# the tag that ends it. The blank line after it is the line feed that ends the turn: the first one after a block tag is
# trimmed.
CHATML = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}

{% else %}{{ message.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

PROBE = "  Two spaces,\n\n\ta tab,\r\nand \u00e9\u6f22\U0001f600. "  # what a foreign model tends to lose
# Every character of these is a piece even where it is too rare for the 99.95% coverage.
ASCII = "".join(map(chr, range(33, 127)))
FIXED_PIECES = 256 + 4 + 2 + 1 + len(ASCII) + 1  # bytes, specials, chat tags, line feed, ASCII, space


class Tokenizer:
    """Encodes and decodes with a SentencePiece model (its serialised bytes)."""

    def __init__(self, model: bytes, chat_template: str = CHATML):
        self.model, self.chat_template = model, chat_template
        self._sp = spm.SentencePieceProcessor()
        self._sp.LoadFromSerializedProto(model)  # unlike the constructor, this refuses an empty model
        self.vocab_size: int = self._sp.get_piece_size()
        self.bos, self.eos = self.special(BOS), self.special(EOS)
        self._line_feed = self._sp.piece_to_id("\n")
        self._space_mark = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone: no BOS, no EOS, and never a control symbol. A lone surrogate is read as a ?."""
        text = text.encode("utf-8", "replace").decode("utf-8")
        lines = [line.split(SPACE_MARK) for line in text.split("\n")]
        encoded = iter(self._sp.encode([part for line in lines for part in line]))
        ids = []
        for i, line in enumerate(lines):
            for j in range(len(line)):
                ids += self._space_mark if j else [self._line_feed] if i else []
                ids += next(encoded)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; control symbols leave nothing behind."""
        return self._sp.decode([int(i) for i in ids])

    def special(self, piece: str) -> int:
        """Id of a control symbol; raises UsageError where the model has none of that name."""
        i = self._sp.piece_to_id(piece)
        if self._sp.id_to_piece(i) != piece or not self._sp.is_control(i):
            raise UsageError(f"the tokenizer has no control symbol {piece}; train one with scripts/train_tokenizer.py")
        return i

    def byte_lengths(self) -> np.ndarray:
        """[V] UTF-8 bytes that each id stands for (0 for control symbols): the denominator of bits per byte."""
        return np.asarray([self._byte_length(i) for i in range(self.vocab_size)], np.int32)

    def save(self, folder: str) -> None:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, MODEL_FILE), "wb") as f:
            f.write(self.model)
        with open(os.path.join(folder, TEMPLATE_FILE), "w", encoding="utf-8") as f:
            f.write(self.chat_template)

    def _byte_length(self, i: int) -> int:
        if self._sp.is_control(i) or self._sp.is_unknown(i):
            return 0
        return 1 if self._sp.is_byte(i) else len(self._sp.id_to_piece(i).replace(SPACE_MARK, " ").encode())


def load(path: str) -> Tokenizer:
    """A tokenizer from a SentencePiece model file, or with its chat template from a folder that `save` wrote."""
    file, template = path, CHATML
    if os.path.isdir(path):
        file, home = os.path.join(path, MODEL_FILE), os.path.join(path, TEMPLATE_FILE)
        if os.path.isfile(home):
            with open(home, encoding="utf-8") as f:
                template = f.read()
    try:
        with open(file, "rb") as f:
            tokenizer = Tokenizer(f.read(), template)
    except FileNotFoundError:
        raise UsageError(f"tokenizer {path}: no such file") from None
    except RuntimeError:
        raise UsageError(f"tokenizer {path}: not a SentencePiece model") from None
    for tag in (TURN_START, TURN_END):
        tokenizer.special(tag)
    if tokenizer.decode(tokenizer.encode(PROBE)) != PROBE:
        raise UsageError(f"tokenizer {path}: text does not survive it; train one with scripts/train_tokenizer.py")
    return tokenizer


def _lines(texts: Iterable[str], mistakes: list[Exception]):
    try:
        for text in texts:
            for line in text.replace("\0", " ").split("\n"):
                for start in range(0, len(line), LONGEST_LINE):
                    part = line[start : start + LONGEST_LINE]
                    if part.strip():
                        yield part
    except UsageError as e:
        mistakes.append(e)
        raise


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns `vocab_size` BPE pieces from the lines of `texts`; raises UsageError where the size cannot be met."""
    if vocab_size <= FIXED_PIECES:
        raise UsageError(f"tokenizer.vocab_size={vocab_size} must exceed {FIXED_PIECES} (bytes, ASCII and specials)")
    model = io.BytesIO()
    mistakes = []  # SentencePiece would bury the message of an error in the texts in one of its own
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts, mistakes),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            required_chars=ASCII,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * LONGEST_LINE,  # bytes; longer ones would be dropped in silence
            user_defined_symbols=["\n"],
            control_symbols=[TURN_START, TURN_END],
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            minloglevel=2,
        )
    except RuntimeError as e:
        if mistakes:
            raise mistakes[0] from None
        reason = str(e).rsplit("] ", 1)[-1].strip() or "there is no text in them"
        raise UsageError(f"tokenizer.vocab_size={vocab_size} cannot be learnt from these sources: {reason}") from None
    return Tokenizer(model.getvalue())
