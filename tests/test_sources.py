"""Sources: every document of real files comes back, and every mistake in them is one line that says where."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lowrank_jax.config import SourceConfig, UsageError
from lowrank_jax.data import sources

SPACES = " \t\n\r\x0b\x0c"


def opened(spec: str, text_key: str = "text", messages_key: str = "messages") -> list[dict]:
    return list(sources.open_source(SourceConfig(str(spec), 1.0, text_key, messages_key)))


def texts(spec: str) -> list[str]:
    return [document["text"] for document in opened(spec)]


def json_file(path, content) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return f"json:{path}"


# ------------------------------------------------------------------------------------------------------- text files


def test_a_glob_reads_every_matching_file_in_order_and_nothing_else(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "c.md", "deep/d.txt"):
        (tmp_path / name).write_text(f"this is {name}\n")
    assert texts(f"text:{tmp_path}/*.txt") == ["this is a.txt", "this is b.txt"]
    assert texts(f"text:{tmp_path}/**/*.txt") == ["this is a.txt", "this is b.txt", "this is deep/d.txt"]
    assert texts(f"text:{tmp_path}/c.md") == ["this is c.md"]


@pytest.mark.parametrize("end, count", [("\n\n", 200), ("\n", 300), (" ", 1500)], ids=["paragraph", "line", "space"])
def test_pieces_end_at_the_widest_break_there_is(tmp_path, end, count):
    inner = {"\n\n": "\n", "\n": " ", " ": "-"}[end]
    parts = [inner.join([f"begin{i}", *(["middle"] * (i % 5)), "end"]) for i in range(count)]
    (tmp_path / "a.txt").write_text(end.join(parts))
    pieces = texts(f"text:{tmp_path}/a.txt")
    assert len(pieces) > 2
    assert [part for piece in pieces for part in piece.strip(end).split(end)] == parts


@pytest.mark.parametrize("character", ["x", "\u00e9", "\u6f22", "\U0001f600"])
def test_text_without_any_break_is_cut_between_characters(tmp_path, character):
    text = "abc"[: len(character.encode()) - 1] + character * 5000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    pieces = texts(f"text:{tmp_path}/a.txt")
    assert len(pieces) > 2 and "".join(pieces) == text


BREAKS = st.sampled_from(["\n", "\n\n", "\r\n", "\r\n\r\n", " ", "  ", "\t", "\u3000", "\n \n"])
WORDS = st.text(alphabet="ab\u00e9\u6f22\U0001f600\u0301", min_size=1, max_size=12)


@given(st.one_of(st.text(), st.lists(st.one_of(BREAKS, WORDS)).map("".join)))
@example("\u6f22" * 100)
@example("one\r\ntwo\r\n\r\nthree\r\n" * 10)
@example("a" + " " * 100 + "b" + "\n" * 100)
def test_the_pieces_are_the_file_but_for_whitespace_between_them(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "MIN_PIECE", 8)
        if not text.strip(SPACES):
            with pytest.raises(UsageError, match="no text"):
                texts(f"text:{path}")
            return
        pieces = texts(f"text:{path}")
    at = 0
    for piece in pieces:
        found = text.index(piece, at)
        assert text[at:found].strip(SPACES) == ""
        assert len(piece.encode()) <= 8 + 8 + 3
        at = found + len(piece)
    assert text[at:].strip(SPACES) == ""


@pytest.mark.parametrize("content", ["", " ", "\n\n\n", " \r\n\t\n" * 2000])
@pytest.mark.parametrize("kind", ["text", "json"])
def test_a_source_without_text_is_refused_by_name(tmp_path, kind, content):
    (tmp_path / "blank").write_text(content)
    with pytest.raises(UsageError, match=f"^source {kind}:{tmp_path}/blank: there is no text in it$"):
        opened(f"{kind}:{tmp_path}/blank")


@pytest.mark.parametrize("kind", ["text", "json"])
def test_a_pattern_without_a_file_is_refused_by_name(tmp_path, kind):
    (tmp_path / "folder").mkdir()
    for location in (f"{tmp_path}/none*.txt", f"{tmp_path}/folder"):
        with pytest.raises(UsageError, match="no such file") as e:
            opened(f"{kind}:{location}")
        assert f"source {kind}:{location}" in str(e.value)


def test_text_that_is_not_utf8_is_refused_with_its_file_and_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab cd\n" * 1000 + b"caf\xe9 " + b"ab cd\n" * 1000)
    with pytest.raises(UsageError, match=f"^{tmp_path}/a.txt: not UTF-8 text at byte 6003$"):
        texts(f"text:{tmp_path}/a.txt")


@pytest.mark.parametrize("kind", ["text", "json"])
@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz", ".zip"])
def test_a_compressed_file_is_refused(tmp_path, kind, suffix):
    (tmp_path / "a.txt").write_text("{}\n")
    (tmp_path / f"b.txt{suffix}").write_bytes(b"\x1f\x8b")
    with pytest.raises(UsageError, match=f"b.txt{suffix} is compressed"):
        opened(f"{kind}:{tmp_path}/*")


# ------------------------------------------------------------------------------------------------------- JSON files


def test_json_lines_are_read_around_blank_lines(tmp_path):
    spec = json_file(tmp_path / "a.jsonl", '\n{"text": "one"}\n\n  \n{"text": "tw\\u00f6\\n"}\r\n{"text": "three"}')
    assert opened(spec) == [{"text": "one"}, {"text": "tw\u00f6\n"}, {"text": "three"}]


def test_a_json_array_holds_one_record_an_item(tmp_path):
    spec = json_file(tmp_path / "a.json", ' \n[\n {"text": "one", "id": 1},\n {"text": "two"}\n]\n')
    assert opened(spec) == [{"text": "one"}, {"text": "two"}]


def test_several_files_are_one_source_in_order(tmp_path):
    json_file(tmp_path / "b.json", '[{"text": "3"}]')
    json_file(tmp_path / "a.json", '{"text": "1"}\n{"text": "2"}\n')
    assert texts(f"json:{tmp_path}/*.json") == ["1", "2", "3"]


@given(st.lists(st.text(), min_size=1, max_size=8), st.booleans(), st.booleans())
def test_any_text_survives_json(tmp_path_factory, rows, ascii_only, as_array):
    records = [{"text": row} for row in rows]
    path = tmp_path_factory.getbasetemp() / "any.json"
    lines = [json.dumps(r, ensure_ascii=ascii_only) for r in records]
    assert opened(json_file(path, json.dumps(records) if as_array else "\n".join(lines))) == records


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path):
    chat = '{"messages": [{"role": "user", "content": "\\udc00"}, {"role": "assistant", "content": "x\\ud83d"}]}'
    documents = opened(json_file(tmp_path / "a.jsonl", '{"text": "a\\ud83d b \\ud83d\\ude00"}\n' + chat))
    assert documents[0] == {"text": "a? b \U0001f600"}
    assert [m["content"] for m in documents[1]["messages"]] == ["?", "x?"]


def test_the_keys_of_a_record_can_be_named(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows = [{"body": "one", "text": 0}, {"talk": turns, "body": "ignored"}]
    spec = json_file(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert opened(spec, "body", "talk") == [{"text": "one"}, {"messages": turns}]


@pytest.mark.parametrize("record", ["{", '{"text": "a"} b', "nonsense", "[1", "\x00"])
def test_a_broken_line_is_refused_with_its_file_and_number(tmp_path, record):
    spec = json_file(tmp_path / "a.jsonl", f'{{"text": "one"}}\n\n{record}\n{{"text": "two"}}\n')
    with pytest.raises(UsageError, match=f"^{tmp_path}/a.jsonl, record 3: not JSON: "):
        opened(spec)


@pytest.mark.parametrize("content", [b'{"text": "caf\xe9"}\n', b'{"text": ' + b"[" * 100_000, b"[1, 2", b"[1]\n[2]\n"])
def test_what_is_not_json_at_all_is_refused_with_its_file(tmp_path, content):
    with pytest.raises(UsageError, match=f"^{tmp_path}/a.jsonl.*: not JSON: "):
        opened(json_file(tmp_path / "a.jsonl", content))


WRONG = ["1", "null", '"text"', "{}", '{"text": null}', '{"text": ["a"]}', '{"Text": "a"}']
WRONG += ['{"messages": null}', '{"messages": "hi"}', '{"messages": {}}', '{"messages": ["hi"]}']
WRONG += ['{"messages": [{"role": "assistant"}]}', '{"messages": [{"role": 1, "content": "a"}]}']
WRONG += ['{"messages": [{"role": "assistant", "content": null}]}', '{"messages": []}']
WRONG += ['{"messages": [{"role": "user", "content": "hi"}]}', '{"messages": [{"role": "assistant", "content": ""}]}']


@pytest.mark.parametrize("record", WRONG)
@pytest.mark.parametrize("layout", ['{"text": "one"}\n%s\n', '[{"text": "one"}, %s]'], ids=["lines", "array"])
def test_a_record_of_the_wrong_type_is_refused_with_its_file_and_number(tmp_path, record, layout):
    with pytest.raises(UsageError, match=f"^{tmp_path}/a.json, record 2(:|,) ") as e:
        opened(json_file(tmp_path / "a.json", layout % record))
    assert "\n" not in str(e.value)


def test_a_conversation_without_an_answer_says_so(tmp_path):
    spec = json_file(tmp_path / "a.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}')
    with pytest.raises(UsageError, match="'messages' has no assistant turn"):
        opened(spec)


def test_an_empty_array_is_a_source_without_text(tmp_path):
    with pytest.raises(UsageError, match="a.json: there is no text in it"):
        opened(json_file(tmp_path / "a.json", "[]"))


# ------------------------------------------------------------------------------------------------ kinds and the split


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="source csv:a.csv: kind 'csv' is not one of text, json, builtin"):
        opened("csv:a.csv")


def test_an_unknown_builtin_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="builtin:novels is not one of builtin:plays, .*builtin:quickchat"):
        opened("builtin:novels")


@given(st.integers(0, 400), st.floats(0, 0.5))
@example(3, 0.5)
@example(7, 0.5)
@example(1, 0.5)
@example(2, 0.0)
def test_the_held_out_and_the_training_part_are_disjoint_and_together_everything(n, fraction):
    held_out, training = (sources.Subset(range(n), fraction, part) for part in (True, False))
    assert sorted([*held_out, *training]) == list(range(n))
    assert len(held_out) == len(list(held_out)) and len(training) == len(list(training))
    assert len(training) >= min(n, 1)
    assert abs(len(held_out) - n * fraction) <= 1 and (len(held_out) > 0) == (fraction > 0 and n > 1)
    for part in (held_out, training):
        for i in (-1, len(part)):
            with pytest.raises(IndexError):
                part[i]


def test_the_held_out_part_is_spread_over_the_whole_source():
    assert list(sources.Subset(range(100), 0.04, held_out=True)) == [0, 25, 50, 75]
