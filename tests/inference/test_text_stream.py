"""The pieces of a text stream are the whole text, and never half a character or half a stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_jax.inference.text_stream import StopString, Writer

TEXTS = st.text(
    st.sampled_from("abc. \n") | st.sampled_from("äß漢字🙂👩‍👩‍👧é\ufffd") | st.characters(codec="utf-8"), max_size=60
)


def cut(ids: list[int], sizes: list[int]) -> list[list[int]]:
    parts, at = [], 0
    for size in sizes:
        parts.append(ids[at : at + size])
        at += size
    return [*parts, ids[at:]]


@given(TEXTS, st.lists(st.integers(0, 5), max_size=40))
def test_pieces_are_the_whole_text_and_never_half_a_character(tok, text, sizes):
    ids = tok.encode(text)
    writer = Writer(tok)
    pieces = [writer.add(part) for part in cut(ids, sizes)]
    whole = tok.decode(ids)
    done = ""
    for piece in pieces:
        done += piece
        assert whole.startswith(done)
    assert done + writer.end() == whole and not writer.stopped


@given(st.text("ab#\n é🙂", max_size=60), st.lists(st.text("ab#\n", min_size=1, max_size=4), max_size=3), st.data())
def test_it_ends_before_the_first_stop_string_wherever_ids_are_cut(tok, text, stops, data):
    ids = tok.encode(text)
    whole = tok.decode(ids)
    ends = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    writer = Writer(tok, stops)
    done = ""
    for part in cut(ids, data.draw(st.lists(st.integers(0, 3), max_size=30))):
        done += writer.add(part)
        assert whole.startswith(done) and not any(stop in done for stop in stops)
    assert done + writer.end() == (whole[: min(ends)[1]] if ends else whole)
    assert writer.stopped == bool(ends)


@pytest.mark.parametrize("stop, text", [("aab", "aaab"), ("abac", "ababac"), ("##a", "b####a")])
def test_a_stop_string_is_found_behind_a_part_of_itself(stop, text):
    assert StopString(stop).ends_at(text) == len(text)
    assert [end for end in map(StopString(stop).ends_at, text) if end] == [1]


def test_of_two_stop_strings_in_one_piece_the_one_that_ends_first_counts(tok):
    for stops in (["fo", "ce"], ["ce", "fo"]):
        assert Writer(tok, stops).add(tok.encode("ba ce di fo gu")) == "ba "


def test_long_texts_do_not_take_longer_with_every_id(tok):
    text = "Ba ce di 漢字 fo. " * 400
    ids, decoded = tok.encode(text), []

    class Counting:
        def decode(self, ids):
            decoded.append(len(ids))
            return tok.decode(ids)

    writer = Writer(Counting())
    assert "".join(writer.add([i]) for i in ids) + writer.end() == tok.decode(ids)
    assert max(decoded) < 100 and sum(decoded) < 60 * len(ids)


@pytest.mark.parametrize("rest", [[], ["end"]])
def test_symbols_are_not_text(tok, rest):
    writer = Writer(tok)
    assert writer.add([tok.bos, *tok.encode("ba ce"), tok.eos]) + writer.end() == "ba ce"


def test_a_text_that_is_continued_keeps_the_space_that_its_tokenizer_leaves_out_at_a_beginning():
    class Stripping:
        def decode(self, ids):
            return "".join([" one", " two", " three"][i] for i in ids).removeprefix(" ")

    assert Writer(Stripping()).add([1]) == "two"
    assert Writer(Stripping(), before=[0]).add([1]) == " two"
