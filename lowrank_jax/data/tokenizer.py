"""Turns text into ids and back into the same text: SentencePiece (learnt or loaded) and Hugging Face tokenizers.

No text encodes to a control symbol, such as a chat tag: only `special` gives their ids. SentencePiece has a piece for a
line feed, so it encodes line by line: the same ids, faster than as one string. A literal U+2581, its own mark for a
space, is encoded as three UTF-8 bytes.
"""

import functools
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import re
import tomllib
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece as spm
import tokenizers

from lowrank_jax.config import UsageError
from lowrank_jax.data import panics, probes
from lowrank_jax.data.blocks import one_line
from lowrank_jax.machine import storage
from lowrank_jax.machine.console import say

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
SPACE_MARK = "\u2581"
LEARN = "learn one with `python -m lowrank_jax learn_tokenizer`"
LONGEST_LINE = 1 << 16  # characters; a tokenizer learns from a longer line in parts
MODEL_FILE, TEMPLATE_FILE = "sentencepiece.model", "chat_template.jinja"
JSON_FILE, CONFIG_FILE, NAMES_FILE = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
# ChatML, the chat template of every new tokenizer. The text inside {% generation %} carries weight: the answer and the
# tag that ends it. Jinja trims the first line feed after a block tag, so a blank line ends the turn.
CHATML = pathlib.Path(__file__).with_name("chatml.jinja").read_text("utf-8").removesuffix("\n")
LEARNING = tomllib.loads(pathlib.Path(__file__).with_name("sentencepiece.toml").read_text("utf-8"))
MOST_PIECES = 1 << 22  # the largest public vocabulary has 262,144
# The byte of each letter of a ByteLevel piece: GPT-2's table. `tokenizers` has the letters, but not their bytes.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_LETTERS = dict(zip(map(chr, [*PRINTABLE, *range(256, 324)]), [*PRINTABLE, *sorted({*range(256)} - {*PRINTABLE})]))
FEWEST_LEARNED, MOST_LEARNED = 512, 32_000  # pieces of a tokenizer whose size follows its corpus
# Each of these is a piece, even if it is too rare for the 99.95% coverage.
ASCII = "".join(map(chr, range(33, 127)))
FIXED_PIECES = 256 + 4 + 2 + 1 + len(ASCII) + 1  # bytes, specials, chat tags, line feed, ASCII, space


class Tokenizer:
    """The interface of every tokenizer; see `load` and `train`."""

    vocab_size: int
    bos: int
    eos: int
    names: dict[str, str]  # bos_token, eos_token, ...: the symbols' names in chat templates
    specials: dict[str, int]  # id of every control symbol by its name
    added: dict[int, str] = {}  # pieces for text that a file adds to its model, by id
    chat_template: str
    sha256: str  # differs between tokenizers whose ids differ
    files: dict[str, bytes]  # by name, what `load` needs to return the same tokenizer

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` without BOS, EOS or any control symbol; a lone surrogate is read as a ?."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, without control symbols."""

    def bytes_of(self, i: int) -> bytes:
        """Return the UTF-8 bytes that an id stands for, which may be part of a character; none for a control symbol."""

    def byte_lengths(self) -> np.ndarray:
        """Return [V] UTF-8 bytes of each id, 0 for control symbols: the denominator of bits per byte."""
        return np.asarray([len(self.bytes_of(i)) for i in range(self.vocab_size)], np.int32)

    def save(self, folder: str) -> None:
        os.makedirs(folder, exist_ok=True)
        for name, content in self.files.items():
            storage.replace(os.path.join(folder, name), content)

    @functools.cached_property
    def files_sha256(self) -> str:
        """Return a hash of everything that decides ids and rendered chats; after `save`, `folder_sha256` returns it."""
        return _files_sha256(self.files)

    def special(self, piece: str) -> int:
        """Return the id of a control symbol; raises UsageError if the tokenizer has none of that name."""
        if piece not in self.specials:
            raise UsageError(f"the tokenizer has no control symbol {piece}; {LEARN}")
        return self.specials[piece]


class SentencePiece(Tokenizer):
    """A SentencePiece model (its serialised bytes)."""

    def __init__(self, model: bytes, chat_template: str = CHATML):
        self.model, self.chat_template = model, chat_template
        self._sp = spm.SentencePieceProcessor()
        self._sp.LoadFromSerializedProto(model)  # unlike the constructor, this refuses an empty model
        self.vocab_size = self._sp.get_piece_size()
        pieces = range(self.vocab_size)
        self.specials = {self._sp.id_to_piece(i): i for i in pieces if self._sp.is_control(i)}
        self.bos, self.eos = self.special(BOS), self.special(EOS)
        self.names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNK}
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.files = {MODEL_FILE: model, TEMPLATE_FILE: chat_template.encode()}
        self._line_feed = self._sp.piece_to_id("\n")
        self._space_mark = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]

    def encode(self, text: str) -> list[int]:
        parts = [part.split("\n") for part in text.encode("utf-8", "replace").decode("utf-8").split(SPACE_MARK)]
        # One call, as each takes 40 us, and one thread: starting more takes 0.1 ms, as long as encoding a page, and
        # readers have threads of their own.
        encoded = iter(self._sp.encode([line for lines in parts for line in lines], num_threads=1))
        ids = []
        for lines in parts:
            for line in itertools.islice(encoded, len(lines)):
                ids += line
                ids.append(self._line_feed)
            ids[-1:] = self._space_mark  # in place of the last line feed
        return ids[: -len(self._space_mark)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._sp.decode([int(i) for i in ids])

    def bytes_of(self, i: int) -> bytes:
        piece = self._sp.id_to_piece(i)
        if self._sp.is_control(i) or self._sp.is_unknown(i):
            return b""
        return _byte(piece) if self._sp.is_byte(i) else piece.replace(SPACE_MARK, " ").encode()

    def proto(self):
        """Return the model as a message `ModelProto` of sentencepiece_model.proto: pieces and settings."""
        from sentencepiece import sentencepiece_model_pb2  # for exports alone

        return sentencepiece_model_pb2.ModelProto.FromString(self.model)


class HuggingFace(Tokenizer):
    """A tokenizer.json and its tokenizer_config.json; without a chat template it gets ChatML and its symbols."""

    def __init__(self, text: str, config: dict, chat_template: str | None):
        self._tok = _reversible(text)
        self.chat_template = chat_template or CHATML
        if not chat_template:
            tags = [tokenizers.AddedToken(tag, special=True, normalized=False) for tag in (TURN_START, TURN_END)]
            self._tok.add_special_tokens(tags)
        added = self._tok.get_added_tokens_decoder()
        self.specials = {token.content: i for i, token in added.items() if token.special}
        self.added = {i: token.content for i, token in added.items() if not token.special}
        ids = self._tok.get_vocab(with_added_tokens=True).values()
        if len(set(ids)) < len(ids):
            raise UsageError(f"two pieces of {JSON_FILE} have the same id")
        self.vocab_size = max(ids) + 1
        if self.vocab_size > MOST_PIECES:
            raise UsageError(f"{JSON_FILE} has an id of {max(ids):,}, and at most {MOST_PIECES:,} are allowed")
        named = {key: value for key, value in config.items() if key.endswith("_token") and value}
        named = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
        self.names = {key: name for key, name in named.items() if isinstance(name, str) and name in self.specials}
        if "eos_token" not in self.names:
            raise UsageError(f"{CONFIG_FILE} must name an eos_token that tokenizer.json has as a special token")
        self.names.setdefault("bos_token", self.names["eos_token"])  # GPT-2 and Qwen put it between documents
        self.bos, self.eos = self.special(self.names["bos_token"]), self.special(self.names["eos_token"])
        self.json = self._tok.to_str()
        self.files = {JSON_FILE: self.json.encode(), TEMPLATE_FILE: self.chat_template.encode()}
        self.files[CONFIG_FILE] = json.dumps(self.names, indent=2).encode()
        self._tok.encode_special_tokens = True  # text that looks like a special token is text
        self.sha256 = hashlib.sha256(f"{self.json} {self.bos} {self.eos}".encode()).hexdigest()
        names = "|".join(map(re.escape, filter(None, self.specials)))
        self._in_bytes = '"ByteLevel"' in json.dumps(json.loads(self.json)["decoder"])  # a piece's letters are bytes
        self._names, self._special_ids = re.compile(f"(?=(?:{names}))"), frozenset(self.specials.values())

    def encode(self, text: str) -> list[int]:
        text = text.encode("utf-8", "replace").decode("utf-8")
        try:
            ids = self._tok.encode(text, add_special_tokens=False).ids
        except BaseException as e:  # such as a piece for unknown characters that the model lacks
            if not panics.is_failure(e):
                raise
            raise UsageError(f"the tokenizer cannot encode a text: {one_line(e)}") from None
        if self._special_ids.isdisjoint(ids):
            return ids
        # The symbols' names are pieces of the model, as Unigram allows: cut the text so that no part has a whole name.
        cuts = [m.start() + 1 for m in self._names.finditer(text)]
        parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)])]
        return [i for part in parts for i in self._tok.encode(part, add_special_tokens=False).ids]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tok.decode([int(i) for i in ids], skip_special_tokens=True)

    def bytes_of(self, i: int) -> bytes:
        piece = self._tok.id_to_token(i)
        if piece is None or i in self._special_ids:
            return b""
        if i in self.added or not self._in_bytes:
            return _byte(piece) if re.fullmatch("<0x[0-9A-F]{2}>", piece) else piece.replace(SPACE_MARK, " ").encode()
        return bytes(BYTE_LETTERS.get(letter, ord("?")) for letter in piece)


def _reversible(text: str) -> tokenizers.Tokenizer:
    """Return a tokenizer.json's tokenizer without the settings that lose text or draw ids at random."""
    facts = json.loads(text)
    for token in facts.get("added_tokens", []):  # they would swallow the white space around them
        token |= {"lstrip": False, "rstrip": False}
    model = facts["model"]
    if "dropout" in model:  # it would give a text other ids each time
        model["dropout"] = None
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    prefix = model.get("continuing_subword_prefix") or ""
    if not all(right.startswith(prefix) for *_, right in merges):  # `tokenizers` would panic, and perhaps abort
        raise UsageError(f"a merge of {JSON_FILE} lacks the continuing_subword_prefix")
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(facts, ensure_ascii=False))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _byte(piece: str) -> bytes:
    return bytes([int(piece[1:-1], 16)])


def folder_sha256(folder: str) -> str:
    """Return a hash of a tokenizer's files in a folder, without loading them; the folder's name is not part of it."""
    paths = [pathlib.Path(folder, n) for n in (MODEL_FILE, JSON_FILE, CONFIG_FILE, NAMES_FILE, TEMPLATE_FILE)]
    return _files_sha256({path.name: path.read_bytes() for path in paths if path.is_file()})


def _files_sha256(files: dict[str, bytes]) -> str:
    hashes = [(name, hashlib.sha256(content).hexdigest()) for name, content in sorted(files.items())]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def load(path: str) -> Tokenizer:
    """Load a folder that `save` wrote, a SentencePiece model, a tokenizer.json or its folder, or a name on the hub.

    Raises UsageError if none exists, or if its ids do not decode to the same text.
    """
    try:
        tokenizer, change, composed = storage.again(lambda: _probed(path))
    except FileNotFoundError:
        raise UsageError(f"tokenizer {path}: no such file") from None
    except UsageError as e:
        raise UsageError(f"tokenizer {path}: {e}") from None
    except OSError as e:
        failure = OSError if storage.is_transient(e) else UsageError
        raise failure(f"tokenizer {path}: cannot be read: {e.strerror or one_line(e)}") from e
    except BaseException as e:
        if not panics.is_failure(e):
            raise
        raise UsageError(f"tokenizer {path}: not a {JSON_FILE if _is_json(path) else 'SentencePiece model'}") from None
    if change:
        raise UsageError(f"tokenizer {path}: its ids do not decode to the same text: {change}; {LEARN}")
    if composed:
        say(f"tokenizer {path} composes characters: {composed}, which Unicode calls equivalent")
    return tokenizer


def _probed(path: str) -> tuple[Tokenizer, str, str]:
    """Return a tokenizer, where it changes a text, and where it composes characters."""
    with panics.without_output():
        tokenizer = _load(path)
        tokenizer.byte_lengths()
        change = probes.change(tokenizer, [*probes.TEXTS, *probes.names(tokenizer)])
        change = change or probes.change(tokenizer, probes.EQUIVALENT, probes.composed)
        return tokenizer, change, probes.change(tokenizer, probes.EQUIVALENT)


def _load(path: str) -> Tokenizer:
    named = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) and not path.endswith((".model", ".json"))
    if named and not os.path.exists(path):
        path = _download(path)
    is_folder, is_json = os.path.isdir(path), _is_json(path)
    file = pathlib.Path(path, JSON_FILE if is_json else MODEL_FILE) if is_folder else pathlib.Path(path)
    content = file.read_bytes()
    beside = (file.with_name(name) for name in (TEMPLATE_FILE, NAMES_FILE, CONFIG_FILE))
    texts = {other.name: _text(other) for other in beside if other.is_file()}
    template = texts.get(TEMPLATE_FILE)
    if not is_json:
        tokenizer = SentencePiece(content, template if template and is_folder else CHATML)
        for tag in (TURN_START, TURN_END) if tokenizer.chat_template == CHATML else ():
            tokenizer.special(tag)
        return tokenizer
    config = _object(texts, NAMES_FILE) | _object(texts, CONFIG_FILE)
    return HuggingFace(content.decode("utf-8"), config, template or _template_of(config))


def _template_of(config: dict) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list) and all(isinstance(t, dict) for t in template):  # several, by name
        default = [t for t in template if t.get("name") == "default"]
        template = next((t.get("template") for t in default + template), None)
    if not isinstance(template, str | None):
        raise UsageError(f"{CONFIG_FILE} has a chat_template that is no text")
    return template


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as e:
        raise UsageError(f"{path.name} is not UTF-8 text at byte {e.start}") from None


def _object(texts: dict[str, str], name: str) -> dict:
    try:
        value = json.loads(texts.get(name) or "{}")
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{name} is not JSON: {one_line(e)}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{name} must hold a JSON object")
    return value


def _is_json(path: str) -> bool:
    return path.endswith(".json") or os.path.isfile(os.path.join(path, JSON_FILE))


def _download(name: str) -> str:
    """Return the local folder of a tokenizer's files from the hub."""
    try:
        import huggingface_hub

        files = [JSON_FILE, CONFIG_FILE, NAMES_FILE, TEMPLATE_FILE]
        folder = huggingface_hub.snapshot_download(name, allow_patterns=files)
    except Exception as e:  # from the network, the hub, or a missing package
        reason = f"the Hugging Face hub did not give one of that name: {one_line(e)}"
        raise UsageError(f"no such file, and {reason}") from None
    if not os.path.isfile(os.path.join(folder, JSON_FILE)):
        raise UsageError(f"the Hugging Face hub has no {JSON_FILE} of that name")
    return folder


def _lines(texts: Iterable[str], mistakes: list[Exception]):
    try:
        for text in texts:
            for line in text.replace("\0", " ").split("\n"):
                parts = (line[start : start + LONGEST_LINE] for start in range(0, len(line), LONGEST_LINE))
                yield from filter(str.strip, parts)
    except UsageError as e:
        mistakes.append(e)
        raise


def pieces_for(corpus_bytes: int) -> int:
    """Return how many pieces to learn from a corpus: the square root of its bytes, in steps of 64; all for 0 (unknown).

    The number of different words in a text grows like that (Heaps' law), and a piece that is seldom seen is not learned
    by the model. With this rule half of the learned pieces occur 250 times or more, at 1.2 MB of chats as at 5 MB of
    plays and 12 MB of speeches. 32,000 pieces over 1.2 MB would occur 15 times on average.
    """
    pieces = 64 * round(math.sqrt(corpus_bytes) / 64)
    return min(max(pieces, FEWEST_LEARNED), MOST_LEARNED) if corpus_bytes else MOST_LEARNED


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn `vocab_size` BPE pieces from the lines of `texts`; raises UsageError if the texts do not give as many."""
    if vocab_size <= FIXED_PIECES:
        raise UsageError(f"tokenizer.vocab_size={vocab_size} must exceed {FIXED_PIECES} (bytes, ASCII and specials)")
    model, mistakes = io.BytesIO(), []  # SentencePiece would hide an error in the texts behind one of its own
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts, mistakes),
            model_writer=model,
            vocab_size=vocab_size,
            required_chars=ASCII,
            max_sentence_length=4 * LONGEST_LINE,  # bytes; longer lines would be dropped silently
            control_symbols=[TURN_START, TURN_END],
            **LEARNING,
        )
    except RuntimeError as e:
        if mistakes:
            raise mistakes[0] from None
        reason = str(e).rsplit("] ", 1)[-1].strip() or "there is no text in them"
        if (most := re.search(r"value <= (\d+)", reason)) and int(most[1]) <= FIXED_PIECES:
            reason = "there is too little text in them"
        raise UsageError(f"tokenizer.vocab_size={vocab_size} cannot be learnt from these sources: {reason}") from None
    return SentencePiece(model.getvalue())
