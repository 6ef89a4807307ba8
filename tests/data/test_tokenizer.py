"""The tokenizer: ids give back exactly the text they came from, and no text ever becomes a control symbol."""

import errno
import io
import pathlib
import random
import re
import string

import pytest
import sentencepiece as spm
from hypothesis import example, given
from hypothesis import strategies as st

from lowrank_jax.config import UsageError
from lowrank_jax.data import tokenizer
from lowrank_jax.data.tokenizer import BOS, EOS, PAD, TURN_END, TURN_START, UNK

LOOK_ALIKES = (PAD, BOS, EOS, UNK, TURN_START, TURN_END, "<|im_", "<0x0A>", "<0x41>", "\u2581", "\u2581<s>", "\u2047")
ODD = (*LOOK_ALIKES, "\0", "\r\n", "\r", "\n", "  ", "\t", "\x1b", "\x7f", "\x85", "\u2028", "\ufeff", "\ufdd0")
ODD += ("\ufffd", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\u6f22\u5b57", "e\u0301", "\u00e9", "ba", " ce")
TEXTS = st.one_of(st.text(), st.lists(st.one_of(st.text(max_size=5), st.sampled_from(ODD))).map("".join))


@pytest.fixture(scope="module")
def raw(tok) -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(model_proto=tok.model)


def foreign(**options) -> bytes:
    """A model as other trainers make it, with the control symbols this project needs."""
    model = io.BytesIO()
    options = {"control_symbols": [TURN_START, TURN_END], "vocab_size": 290, "byte_fallback": True} | options
    sentences = iter(["the cat sat on the mat and the dog ran after it all day long"] * 50)
    writer = {"sentence_iterator": sentences, "model_writer": model, "minloglevel": 2}
    spm.SentencePieceTrainer.train(model_type="bpe", **writer, **options)
    return model.getvalue()


# ---------------------------------------------------------------------------------------------------- text to ids


@given(TEXTS)
@example(" leading and trailing ")
@example("\n\n \n")
@example("\u2581\n\u2581 \u2581\u2581")
def test_decoding_gives_back_the_text(tok, text):
    assert tok.decode(tok.encode(text)) == text


@given(TEXTS)
def test_no_text_becomes_a_control_symbol(tok, raw, text):
    assert not [i for i in tok.encode(text) if raw.is_control(i) or raw.is_unknown(i)]


@pytest.mark.parametrize("look_alike", LOOK_ALIKES)
def test_text_that_looks_like_a_symbol_stays_text(tok, look_alike):
    ids = tok.encode(look_alike)
    assert len(ids) > 1 and tok.decode(ids) == look_alike


@given(TEXTS.map(lambda text: text.replace("\u2581", "").replace("\0", "")))
@example("ba ce\n\n di  \n\r\nfo")
def test_encoding_line_by_line_gives_the_ids_of_the_whole_string(tok, raw, text):
    assert tok.encode(text) == raw.encode(text)


@given(TEXTS)
def test_byte_lengths_add_up_to_the_bytes_of_the_text(tok, text):
    assert tok.byte_lengths()[tok.encode(text)].sum() == len(text.encode())


def test_byte_lengths_count_bytes_and_not_characters():
    text = "déjà vu 漢字 déjà 漢字"
    wide = tokenizer.train([f"{text} {i % 7}" for i in range(99)], 372)
    ids = wide.encode(text)
    assert len(ids) < len(text) and wide.byte_lengths()[ids].sum() == len(text.encode()) == len(text) + 12


def test_byte_lengths_has_an_entry_for_every_id_and_none_for_control_symbols(tok):
    lengths = tok.byte_lengths()
    assert lengths.shape == (tok.vocab_size,)
    assert [i for i in range(tok.vocab_size) if lengths[i] == 0] == sorted(
        [
            *(tok.special(piece) for piece in (PAD, BOS, EOS, TURN_START, TURN_END)),
            3,  # <unk>, which byte fallback never needs
        ]
    )


def test_control_symbols_leave_no_text_behind(tok):
    ids = tok.encode("ba ce")
    symbols = [tok.special(piece) for piece in (BOS, TURN_START, TURN_END, EOS)]
    assert tok.decode([symbols[0], symbols[1], *ids, symbols[2], symbols[3]]) == "ba ce"


@pytest.mark.parametrize("piece", ["ba", UNK, "<|system|>", "<0x41>", ""])
def test_only_control_symbols_are_special(tok, piece):
    with pytest.raises(UsageError, match="the tokenizer has no control symbol"):
        tok.special(piece)


# -------------------------------------------------------------------------------------------------------- training


def test_the_vocabulary_has_exactly_the_requested_size(tok, make):
    assert tok.vocab_size == 521
    assert tokenizer.train([make.prose(500)], 400).vocab_size == 400


def test_common_text_becomes_far_fewer_tokens_than_characters(tok, make):
    text = make.prose(200, seed=9)
    assert len(tok.encode(text)) < 0.6 * len(text)


def test_printable_ascii_is_never_spelled_in_bytes(make):
    model = tokenizer.train([make.prose(500)], 400)
    raw = spm.SentencePieceProcessor(model_proto=model.model)
    for character in string.printable[:95]:
        assert not [i for i in model.encode(character) if raw.is_byte(i)], character


def test_a_vocabulary_without_room_for_a_single_word_is_refused():
    with pytest.raises(UsageError, match=f"tokenizer.vocab_size=358 must exceed {tokenizer.FIXED_PIECES}"):
        tokenizer.train(["ba ce"], 358)


def test_the_smallest_vocabulary_that_is_not_refused_works(make):
    model = tokenizer.train([make.prose(100)], tokenizer.FIXED_PIECES + 1)
    assert model.vocab_size == tokenizer.FIXED_PIECES + 1 and model.decode(model.encode("ba \u6f22")) == "ba \u6f22"


def test_a_vocabulary_too_large_for_the_text_is_refused_in_one_line(make):
    with pytest.raises(UsageError, match=r"tokenizer.vocab_size=9000 cannot be learnt .*value <= \d+") as e:
        tokenizer.train([make.prose(100)], 9000)
    assert "\n" not in str(e.value)
    advised = int(re.search(r"value <= (\d+)", str(e.value))[1])
    assert tokenizer.train([make.prose(100)], advised).vocab_size == advised


def test_no_vocabulary_is_advised_where_the_text_is_too_short_for_any():
    with pytest.raises(UsageError, match="cannot be learnt from these sources: there is too little text in them$"):
        tokenizer.train(["ba"], 9000)


@pytest.mark.parametrize("texts", [[], [""], [" \n\n\t"]])
def test_nothing_to_learn_from_is_refused_with_the_reason(texts):
    with pytest.raises(UsageError, match="cannot be learnt from these sources: there is no text in them"):
        tokenizer.train(texts, 400)


def test_text_with_zero_characters_and_marks_can_be_learnt_from(make):
    text = make.prose(300).replace(" ba", " \0ba").replace(" ce", " \u2581ce")
    model = tokenizer.train([text], 400)
    assert model.decode(model.encode(text)) == text


# ----------------------------------------------------------------------------------------------------------- files


def test_a_saved_tokenizer_gives_the_same_ids(tok, tmp_path):
    tok.save(tmp_path / "tokenizer")
    text = "ba ce\n\u6f22 <s> \u2581 unseen words"
    for path in (tmp_path / "tokenizer", tmp_path / "tokenizer" / tokenizer.MODEL_FILE):
        again = tokenizer.load(str(path))
        assert again.encode(text) == tok.encode(text) and again.vocab_size == tok.vocab_size


def test_the_hash_of_the_files_is_that_of_any_copy_and_of_no_changed_one(tok, tmp_path):
    for name in ("a", "b"):
        tok.save(tmp_path / name)
        assert (
            tokenizer.folder_sha256(tmp_path / name)
            == tok.files_sha256
            == tokenizer.load(str(tmp_path / name)).files_sha256
        )
    for path in sorted((tmp_path / "a").iterdir()):
        content = path.read_bytes()
        for changed in (content[:-1], content.replace(b"e", b"f", 1), b""):
            path.write_bytes(changed)
            assert tokenizer.folder_sha256(tmp_path / "a") != tok.files_sha256
        path.write_bytes(content)
    (tmp_path / "a" / tokenizer.TEMPLATE_FILE).unlink()
    assert tokenizer.folder_sha256(tmp_path / "a") != tok.files_sha256


def test_a_read_that_fails_once_is_tried_again_and_one_that_goes_on_failing_is_one_line(tok, tmp_path, monkeypatch):
    tok.save(tmp_path)
    errors, read = [OSError(errno.EIO, "Input/output error")], pathlib.Path.read_bytes
    monkeypatch.setattr(tokenizer.storage, "PAUSES", (0.0,))
    monkeypatch.setattr(
        pathlib.Path, "read_bytes", lambda p: read(p) if not errors else (_ for _ in ()).throw(errors.pop())
    )
    assert tokenizer.load(str(tmp_path)).sha256 == tok.sha256
    errors += [OSError(errno.EIO, "Input/output error")] * 2
    with pytest.raises(OSError, match=f"^tokenizer {tmp_path}: cannot be read: .*Input/output error"):
        tokenizer.load(str(tmp_path))
    errors += [OSError(errno.EINVAL, "Invalid argument")]
    with pytest.raises(UsageError, match=f"^tokenizer {tmp_path}: cannot be read: Invalid argument"):
        tokenizer.load(str(tmp_path))


def test_a_missing_file_is_refused_by_name(tmp_path):
    for path in (tmp_path, tmp_path / "none.model"):
        with pytest.raises(UsageError, match=f"^tokenizer {path}: no such file$"):
            tokenizer.load(str(path))


@pytest.mark.parametrize("content", [b"", b"garbage", b"\0" * 5000, bytes(range(256)) * 20])
def test_a_file_that_is_no_model_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.model").write_bytes(content)
    with pytest.raises(UsageError, match=f"^tokenizer {tmp_path}/a.model: not a SentencePiece model$"):
        tokenizer.load(str(tmp_path / "a.model"))


def test_a_damaged_model_is_refused_in_one_line_or_works(tok, tmp_path):
    draw, refused = random.Random(0), 0
    for _ in range(300):
        i, kind = draw.randrange(len(tok.model)), draw.randrange(3)
        middle = (bytes([tok.model[i] ^ 1 << draw.randrange(8)]), b"", b"\0" * 9)[kind]
        (tmp_path / "a.model").write_bytes(tok.model[:i] + middle + tok.model[i + len(middle) :] * (kind != 1))
        try:
            damaged = tokenizer.load(str(tmp_path / "a.model"))
            damaged.byte_lengths()
        except UsageError as e:
            refused += 1
            assert "\n" not in str(e)
    assert refused > 100


def test_a_foreign_model_that_keeps_text_as_it_is_can_be_used(tmp_path):
    options = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
    (tmp_path / "a.model").write_bytes(foreign(**options, user_defined_symbols=["\n"]))
    model = tokenizer.load(str(tmp_path / "a.model"))
    assert model.decode(model.encode(" the\n\n  cat")) == " the\n\n  cat"


def test_a_foreign_model_that_loses_spaces_and_line_feeds_is_refused(tmp_path):
    (tmp_path / "a.model").write_bytes(foreign())
    with pytest.raises(UsageError, match=f"^tokenizer {tmp_path}/a.model: its ids do not decode to the same text"):
        tokenizer.load(str(tmp_path / "a.model"))


def test_a_foreign_model_without_chat_tags_is_refused_before_any_training(tmp_path):
    (tmp_path / "a.model").write_bytes(foreign(control_symbols=[]))
    with pytest.raises(UsageError, match=r"no control symbol <\|im_start\|>"):
        tokenizer.load(str(tmp_path / "a.model"))
