"""Text and JSON files: every document of real files comes back, and every mistake in them says where it is."""

import bz2
import errno
import gzip
import io
import itertools
import json
import lzma
import random

import fsspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lowrank_jax.config import UsageError, read_sources
from lowrank_jax.data import files, sources, stream
from lowrank_jax.data.files import zstd
from lowrank_jax.data.records import BadRecord
from lowrank_jax.machine import storage

SPACES = " \t\n\r\x0b\x0c"


def source(spec: str, chats: bool = False, **keys) -> sources.Source:
    return sources.open_source(read_sources([{"spec": str(spec)} | keys], "sources")[0], chats)


def opened(spec: str, **keys) -> list[dict]:
    """Every document of a source, block after block."""
    s = source(spec, **keys)
    return [s.document(row) for block in range(s.blocks) for row in s.rows(block)]


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
def test_pieces_end_at_the_widest_break(tmp_path, end, count):
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
        patch.setattr(files, "SMALLEST", 8)
        if not text.strip(SPACES):
            assert texts(f"text:{path}") == []
            return
        pieces = texts(f"text:{path}")
    end = 0
    for piece in pieces:
        start = text.index(piece, end)
        assert text[end:start].strip(SPACES) == ""
        assert len(piece.encode()) <= 8 + 8 + 3
        end = start + len(piece)
    assert text[end:].strip(SPACES) == ""


@pytest.mark.parametrize("content", ["", " ", "\n\n\n", " \r\n\t\n" * 2000])
@pytest.mark.parametrize("kind", ["text", "json"])
def test_a_file_without_text_has_no_documents(tmp_path, kind, content):
    (tmp_path / "blank").write_text(content)
    assert opened(f"{kind}:{tmp_path}/blank") == []


@pytest.mark.parametrize("kind", ["text", "json"])
def test_a_pattern_without_a_file_is_refused_by_name(tmp_path, kind):
    (tmp_path / "folder").mkdir()
    for location, reason in ((f"{tmp_path}/none*.txt", "no such file"), (f"{tmp_path}/folder", "is a folder")):
        with pytest.raises(UsageError, match=reason) as e:
            opened(f"{kind}:{location}")
        assert f"source {kind}:{location}" in str(e.value)


def test_text_that_is_not_utf8_is_refused_with_its_file_and_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab cd\n" * 1000 + b"caf\xe9 " + b"ab cd\n" * 1000)
    with pytest.raises(BadRecord, match=f"{tmp_path}/a.txt: not UTF-8 text at byte 6003$"):
        texts(f"text:{tmp_path}/a.txt")


# Without its checksum, zst does not notice what changed in the middle of incompressible data.
CHECKED = lambda b: zstd.compress(b, options={zstd.CompressionParameter.checksum_flag: 1})
PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": CHECKED}


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_compressed_file_holds_the_same_documents(tmp_path, suffix):
    text = "\n\n".join(f"paragraph {i} " + "word " * (i % 40) for i in range(3000))
    rows = "".join(json.dumps({"text": f"row {i}"}) + "\n\n" for i in range(500))
    for name, content in (("a.txt", text), ("a.jsonl", rows)):
        (tmp_path / f"{name}.{suffix}").write_bytes(PACKERS[suffix](content.encode()))
    assert texts(f"json:{tmp_path}/a.jsonl.{suffix}") == [f"row {i}" for i in range(500)]
    pieces = texts(f"text:{tmp_path}/a.txt.{suffix}")
    assert len(pieces) > 2
    assert "\n\n".join(pieces) == text.rstrip("\n")


def test_a_zst_file_of_several_frames_is_read_to_its_end(tmp_path):
    frames = [zstd.compress(json.dumps({"text": f"row {i}"}).encode() + b"\n") for i in range(5)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert texts(f"json:{tmp_path}/a.jsonl.zst") == [f"row {i}" for i in range(5)]


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("kind", ["text", "json"])
@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b[:100] + bytes(50) + b[150:]], ids=["cut", "zeros"]
)
def test_a_damaged_compressed_file_is_named_with_the_place(tmp_path, suffix, kind, damage):
    draw = random.Random(0)
    rows = "".join(json.dumps({"text": draw.randbytes(40).hex()}) + "\n" for _ in range(5000))
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(damage(PACKERS[suffix](rows.encode())))
    read, s = [], source(f"{kind}:{path}")
    with pytest.raises(BadRecord, match=f"{path}, (record|byte) .*damaged or cut short"):
        read += s.rows(0)
    assert len(read) < 5000


@pytest.mark.parametrize("suffix, compress", [(".gz", gzip.compress), (".bz2", bz2.compress)])
def test_a_read_that_may_work_again_is_no_damage(tmp_path, monkeypatch, suffix, compress):
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(b"some text"))
    text = source(f"text:{tmp_path}/a.txt{suffix}")

    class Away(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error"):
        patch.setattr(files, "open_file", lambda path: io.BufferedReader(Away()))
        list(text.rows(0))
    assert [text.document(row) for row in text.rows(0)] == [{"text": "some text"}]


def test_a_file_that_is_not_compressed_at_all_is_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_text('{"text": "plain"}')
    with pytest.raises(BadRecord, match="a.jsonl.gz, record 1: the file is damaged"):
        opened(f"json:{tmp_path}/a.jsonl.gz")


# ------------------------------------------------------------------------------------------------------- JSON files


def test_json_lines_are_read_around_blank_lines(tmp_path):
    spec = json_file(tmp_path / "a.jsonl", '\n{"text": "one"}\n\n  \n{"text": "tw\\u00f6\\n"}\r\n{"text": "three"}')
    assert opened(spec) == [{"text": "one"}, {"text": "tw\u00f6\n"}, {"text": "three"}]


def test_every_item_of_a_json_array_is_a_record(tmp_path):
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
    assert opened(spec, text_key="body", messages_key="talk") == [{"text": "one"}, {"messages": turns}]


@pytest.mark.parametrize("record", ["{", '{"text": "a"} b', "nonsense", "[1", "\x00"])
def test_a_broken_line_is_refused_with_its_file_and_number(tmp_path, record):
    spec = json_file(tmp_path / "a.jsonl", f'{{"text": "one"}}\n\n{record}\n{{"text": "two"}}\n')
    with pytest.raises(BadRecord, match=": not JSON: ") as e:
        opened(spec)
    assert e.value.exact() == f"{tmp_path}/a.jsonl, record 3"


@pytest.mark.parametrize("content", [b'{"text": "caf\xe9"}\n', b'{"text": ' + b"[" * 100_000, b"[1, 2", b"[1]\n[2]\n"])
def test_a_file_that_is_not_json_is_refused_by_name(tmp_path, content):
    with pytest.raises(BadRecord, match=f"{tmp_path}/a.jsonl.*: not JSON: "):
        opened(json_file(tmp_path / "a.jsonl", content))


WRONG = ["1", "null", '"text"', "{}", '{"text": null}', '{"text": ["a"]}', '{"Text": "a"}']
WRONG += ['{"messages": null}', '{"messages": "hi"}', '{"messages": {}}', '{"messages": ["hi"]}']
WRONG += ['{"messages": [{"role": "assistant"}]}', '{"messages": [{"role": 1, "content": "a"}]}']
WRONG += ['{"messages": [{"role": "assistant", "content": null}]}', '{"messages": []}']
WRONG += ['{"messages": [{"role": "user", "content": "hi"}]}', '{"messages": [{"role": "assistant", "content": ""}]}']


@pytest.mark.parametrize("record", WRONG)
@pytest.mark.parametrize("layout", ['{"text": "one"}\n%s\n', '[{"text": "one"}, %s]'], ids=["lines", "array"])
def test_a_record_of_the_wrong_type_is_refused_with_its_file_and_number(tmp_path, record, layout):
    with pytest.raises(BadRecord) as e:
        opened(json_file(tmp_path / "a.json", layout % record))
    where = e.value.exact() if e.value.exact else e.value.where
    assert where == f"{tmp_path}/a.json, record 2" and "\n" not in str(e.value)


def test_a_conversation_without_an_answer_says_so(tmp_path):
    spec = json_file(tmp_path / "a.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}')
    with pytest.raises(BadRecord, match="messages.*no assistant turn"):
        opened(spec)


def test_an_empty_array_has_no_documents(tmp_path):
    assert opened(json_file(tmp_path / "a.json", "[]")) == []


# ---------------------------------------------------------------------------------------------------------- blocks

LINES = st.lists(
    st.sampled_from(["", " ", '{"text": "a"}', '{"text": "%s"}' % ("b" * 60), '{"text": "\u00e9"}']), max_size=60
)


@given(LINES, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.integers(8, 200))
def test_every_line_belongs_to_exactly_one_block(tmp_path_factory, lines, end, final, size):
    path = tmp_path_factory.getbasetemp() / "blocks.jsonl"
    spec = json_file(path, "\ufeff" * (size % 2) + end.join(lines) + end * final)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "SMALLEST", size)
        s = source(spec)
        rows = [row for block in range(s.blocks) for row in s.rows(block)]
        assert [s.document(row)["text"] for row in rows] == [json.loads(x)["text"] for x in lines if x.strip()]
        for row in rows:
            offset = row[3]
            assert path.read_bytes()[offset:].removeprefix(files.BOM).startswith(row[2].rstrip())
        for block in range(s.blocks):
            whole = list(s.rows(block))
            assert all(list(s.rows(block, start)) == whole[start:] for start in range(len(whole) + 1))


def test_a_line_that_is_too_long_is_one_bad_record(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_LINE", 1 << 10)
    lines = ['{"text": "one"}', json.dumps({"text": "x" * 5000}), '{"text": "two"}', json.dumps({"text": "y" * 1000})]
    for name, content in (
        ("a.jsonl", "\n".join(lines).encode()),
        ("b.jsonl.gz", gzip.compress("\n".join(lines).encode())),
    ):
        s = source(json_file(tmp_path / name, content))
        rows = [row for block in range(s.blocks) for row in s.rows(block)]
        assert len(rows) == 4 and s.document(rows[2]) == {"text": "two"}
        with pytest.raises(BadRecord, match="longer than"):
            s.document(rows[1])


def test_the_fingerprint_follows_the_files_and_not_their_folder(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("some text")
    first, moved = (source(f"text:{tmp_path}/{folder}/*").fingerprint for folder in ("one", "two"))
    (tmp_path / "two" / "b.txt").write_text("more")
    added = source(f"text:{tmp_path}/two/*").fingerprint
    (tmp_path / "one" / "a.txt").write_text("some text!")
    assert first == moved and len({first, added, source(f"text:{tmp_path}/one/*").fingerprint}) == 3


def test_files_in_a_bucket_are_read_like_local_files(make):
    rows = [{"text": f"row {i} " + make.prose(50, i)} for i in range(200)]
    bucket = fsspec.filesystem("memory")
    for name in ("a.jsonl", "b.jsonl"):
        with bucket.open(f"/bucket/{name}", "wb") as f:
            f.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    assert opened("json:memory://bucket/*.jsonl") == rows + rows
    assert texts("text:memory://bucket/a.jsonl")[0].startswith('{"text": "row 0')
    with pytest.raises(UsageError, match="no such file"):
        opened("json:memory://bucket/*.txt")


# ------------------------------------------------------------------------------------------------ kinds and the split


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="source csv:a.csv: kind 'csv' is not one of text, json, parquet, hf, "):
        opened("csv:a.csv")


def test_an_unknown_builtin_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="builtin:novels is not one of builtin:plays, .*builtin:quickchat"):
        opened("builtin:novels")


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_failure_of_the_first_reads_of_a_source_may_pass(make, tok, tmp_path, monkeypatch, capfd, failing):
    """They open it, hash it, and count its records; readers come later."""
    spec, opens = make.write_jsonl(tmp_path / "a.jsonl", [{"text": "ba"}] * 20), itertools.count(1)

    def fails_once(path, *args, **kwargs):
        if str(path).endswith("a.jsonl") and next(opens) == failing:
            raise OSError(errno.EIO, "Input/output error", path)
        return open(path, *args, **kwargs)

    monkeypatch.setattr(files, "open", fails_once, raising=False)
    monkeypatch.setattr(storage, "PAUSES", (0.0,))
    files._digest.cache_clear()
    assert stream.open_phase(make.phase(spec, eval_fraction=0.1), tok, 0, False).next(1, 4, 0)
    assert f"retry in 0 s: [Errno 5] Input/output error: '{tmp_path}/a.jsonl'" in capfd.readouterr().err


def test_a_file_that_changes_while_it_is_read_is_said_once(tmp_path, capfd):
    """It then has other records than the run began with; appended ones are never read."""
    spec = json_file(tmp_path / "a.jsonl", '{"text": "one"}\n' * 500)
    source, path = sources.open_source(read_sources(spec, "sources")[0]), tmp_path / "a.jsonl"
    read = lambda: [row for block in range(source.blocks) for row in source.rows(block)]
    read(), path.touch(), read()
    assert capfd.readouterr().err == ""
    path.write_text('{"text": "one"}\n' * 499 + '{"text": "two"}\n')
    read(), read()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith(
        f"{path} has changed while it is read, so a resume of this run will refuse it until it is put back"
    )
