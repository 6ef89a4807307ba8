"""Files as people have them: any encoding with a mark is read, and any other kind of file is named for what it is."""

import bz2
import gzip
import io
import json
import lzma
import os
import socket
import tarfile
import zipfile

import pytest
from backports import zstd

from lowrank_jax.config import UsageError, read_sources
from lowrank_jax.data import blocks, encodings, files, sources
from lowrank_jax.data.blocks import BadRecord

TEXTS = [f"Zeile {i}: Größe, 漢字, 😀, Привет\u2028 und Brot" for i in range(80)]
RECORDS = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\r\n" for t in TEXTS)
ARRAY = json.dumps([{"text": t} for t in TEXTS], ensure_ascii=False, indent=1)
MARKS = {"utf-8-sig": b"", "utf-16": b"", "utf-16-be": b"\xfe\xff", "utf-32": b"", "utf-32-be": b"\0\0\xfe\xff"}
PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": zstd.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def read(spec: str) -> tuple[list[dict], list[str]]:
    """The documents of a source, and its bad records."""
    source, documents, bad = sources.open_source(read_sources([{"spec": str(spec)}], "sources")[0]), [], []
    for block in range(source.blocks):
        try:
            for row in source.rows(block):
                try:
                    documents.append(source.document(row))
                except BadRecord as e:
                    bad.append(str(e))
        except BadRecord as e:
            bad.append(str(e))
    return documents, bad


def refusal(spec: str) -> str:
    with pytest.raises(UsageError) as e:
        read(spec)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("encoding", MARKS)
def test_a_file_with_a_byte_order_mark_is_read_in_its_encoding(tmp_path, encoding, suffix):
    for name, content in (("lines.jsonl", RECORDS), ("array.json", ARRAY), ("a.txt", "\r\n\r\n".join(TEXTS))):
        raw = MARKS[encoding] + content.encode(encoding)
        (tmp_path / f"{name}{suffix}").write_bytes(PACKERS[suffix](raw))
    for name in ("lines.jsonl", "array.json"):
        assert read(f"json:{tmp_path}/{name}{suffix}") == ([{"text": t} for t in TEXTS], [])
    pieces, bad = read(f"text:{tmp_path}/a.txt{suffix}")
    assert not bad and len(pieces) > 2 and "\r\n\r\n".join(p["text"] for p in pieces) == "\r\n\r\n".join(TEXTS)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    "encoding, letters",
    [("latin-1", "Größe für jede Straße"), ("cp1252", "“Café”"), ("cp1251", "Привет, мир"), ("gbk", "你好，世界")]
    + [("utf-16-le", "plain"), ("utf-16-be", "Größe"), ("utf-32-le", "plain"), ("utf-16-le", "Привет, мир и хлеб")],
)  # fmt: skip
def test_a_file_that_is_neither_utf8_nor_marked_is_one_line(tmp_path, encoding, letters, suffix):
    for kind, line in (
        ("text", f"and {letters} again\n"),
        ("json", json.dumps({"text": letters}, ensure_ascii=False) + "\n"),
    ):
        raw = ("{}\n" + line * 50).encode(encoding)
        path = tmp_path / f"a.{kind}{suffix}"
        path.write_bytes(PACKERS[suffix](raw))
        reason = refusal(f"{kind}:{path}")
        first = next(i for i in range(len(raw)) if raw[i] == 0 or raw[i] > 127)
        assert str(path) in reason and f"byte {first} " in reason and "iconv -f" in reason
        assert ("NUL" in reason) == encoding.startswith("utf-")
        assert suffix == "" or f"`zcat {path} | iconv -f " in reason  # iconv does not unpack
        assert not encoding.startswith("utf-16") or encoding.upper().replace("-", "") in reason.replace("-", "")


def test_bad_bytes_in_a_file_that_is_utf8_cost_their_records_alone(tmp_path):
    lines = [json.dumps({"text": t}, ensure_ascii=False).encode() + b"\n" for t in TEXTS]
    lines[5], lines[40] = b'{"text": "caf\xe9"}\n', b'{"text": "\xff\xfe \0 \x80"}\n'
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    documents, bad = read(f"json:{tmp_path}/a.jsonl")
    assert len(documents) == 78 and [line.split(":")[0] for line in bad] == [
        f"{tmp_path}/a.jsonl, record {i}" for i in (6, 41)
    ]
    (tmp_path / "ascii.txt").write_bytes(b"plain words\n" * 3000 + b"caf\xe9\n" + b"plain words\n" * 3000)
    pieces, bad = read(f"text:{tmp_path}/ascii.txt")
    assert len(pieces) > 20 and bad == [f"{tmp_path}/ascii.txt: not UTF-8 text at byte 36003"]
    (tmp_path / "head.jsonl").write_bytes(b'{"text": "caf\xe9"}\n' + b'{"text": "plain"}\n' * 50)
    documents, bad = read(f"json:{tmp_path}/head.jsonl")
    assert len(documents) == 50 and len(bad) == 1 and "head.jsonl, record 1: " in bad[0]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_text_in_another_encoding_that_was_appended_is_no_document(tmp_path, suffix):
    """`>>` of PowerShell appends UTF-16 to a file in UTF-8."""
    raw = b"plain words\n\n" * 3000 + "other words\n\n".encode("utf-16-le") * 300
    (tmp_path / f"a.txt{suffix}").write_bytes(PACKERS[suffix](raw))
    pieces, bad = read(f"text:{tmp_path}/a.txt{suffix}")
    assert bad and all("a.txt" in line and "NUL bytes, from byte 390" in line for line in bad[:1])
    assert len(pieces) > 15 and all(piece["text"].count("\0") <= len(piece["text"]) // 100 for piece in pieces)


def test_a_line_never_decides_the_encoding(tmp_path):
    """A JSON parser that is given bytes takes a line with a NUL in the second place for UTF-16."""
    utf16 = json.dumps({"text": "another encoding"}).encode("utf-16-le")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "%s"}\n' % (b"word " * 900) + utf16 + b'\n{"text": "two"}\n')
    documents, bad = read(f"json:{tmp_path}/a.jsonl")
    assert len(documents) == 2 and len(bad) == 1 and "record 2: not JSON" in bad[0]


def test_a_marked_file_that_is_cut_short_is_damaged_from_there_on(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(RECORDS.encode("utf-16")[:-5] + b"\n")
    documents, bad = read(f"json:{tmp_path}/a.jsonl")
    assert len(documents) == 79 and len(bad) == 1 and "a.jsonl, record 80" in bad[0]
    half = '{"text": "a\ud83d b"}\n{"text": "next"}\n'.encode("utf-16", "surrogatepass")
    (tmp_path / "b.jsonl").write_bytes(half)
    assert read(f"json:{tmp_path}/b.jsonl") == ([{"text": "a? b"}, {"text": "next"}], [])


def archive(kind: str, content: bytes) -> bytes:
    raw = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(raw, "w") as z:
            z.writestr("a.txt", content)
    else:
        with tarfile.open(fileobj=raw, mode="w") as t:
            facts = tarfile.TarInfo("a.txt")
            facts.size = len(content)
            t.addfile(facts, io.BytesIO(content))
    return raw.getvalue()


def test_archives_and_other_kinds_of_files_are_named_with_the_remedy(tmp_path):
    text = b"some plain text\n" * 2000
    cases = {"a.tar": (archive("tar", text), "a tar archive"), "a.zip": (archive("zip", text), "a zip archive")}
    cases |= {f"a.tar{end}": (PACKERS[end](archive("tar", text)), "a tar archive") for end in PACKERS if end}
    cases |= {f"hidden{end[1:]}": (PACKERS[end](text), f"ends in {end}") for end in PACKERS if end}
    cases |= {"a.txt": (b"%PDF-1.7\n" + text, "a PDF file"), "b.txt": (b"PAR1\x15\x04" + bytes(99), "parquet:")}
    cases |= {"c.txt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "`git lfs pull`")}
    cases |= {"a.png": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "a PNG image")}
    cases |= {"a.jsonl.lz4": (b"\x04\x22\x4d\x18" + text, "compressed by lz4")}
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        for kind in ("text", "json"):
            assert reason in (line := refusal(f"{kind}:{tmp_path}/{name}")) and name in line


@pytest.mark.parametrize("name", ["link", "loop", "pipe.txt", "socket", "/dev/null"])
@pytest.mark.parametrize("kind", ["text", "json", "parquet", "arrayrecord"])
def test_what_is_no_file_is_named_for_what_it_is_at_once(tmp_path, kind, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink("nowhere", "link")
    os.symlink("loop", "loop")
    os.mkfifo("pipe.txt")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind("socket")
        what = {"link": "a broken link to nowhere", "loop": "a broken link to loop", "pipe.txt": "a named pipe"}
        what |= {"socket": "a socket", "/dev/null": "a device"}
        assert f"{name} is {what[name]}" in refusal(f"{kind}:{name}")
    (tmp_path / "good.txt").write_text("text")
    if name == "pipe.txt":
        assert "pipe.txt is a named pipe" in refusal(f"{kind}:*.txt")  # not left out without a word


def test_a_file_that_goes_away_while_a_source_is_opened_is_named(tmp_path, monkeypatch):
    for kind in ("text", "json", "parquet"):
        monkeypatch.setattr(files, "find", lambda *_: [f"{tmp_path}/gone"])
        assert f"{tmp_path}/gone is gone since its folder was listed" in refusal(f"{kind}:{tmp_path}/*")


def test_a_name_with_the_letters_of_a_pattern_is_a_name(tmp_path, monkeypatch):
    (tmp_path / "a[1].txt").write_text("text")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("text:~/a[1].txt") == ([{"text": "text"}], [])


def test_a_window_of_two_gigabytes_is_read(tmp_path):
    """`zstd --long=31` writes 0xa8 as the window of a frame, and the default refuses more than 0x88."""
    packer = zstd.ZstdCompressor()
    raw = bytearray(packer.compress(RECORDS.encode()) + packer.flush())
    assert raw[4] & 0x20 == 0  # not a single segment: the next byte is the window
    raw[5] = 0xA8
    (tmp_path / "a.jsonl.zst").write_bytes(raw)
    assert read(f"json:{tmp_path}/a.jsonl.zst") == ([{"text": t} for t in TEXTS], [])


@pytest.mark.parametrize("end", ["\r\n", "\r"], ids=["CRLF", "CR"])
def test_text_is_cut_at_blank_lines_whatever_ends_a_line(tmp_path, end):
    paragraphs = [f"Paragraph {i} begins.{end}" + f"A line of it.{end}" * (i % 9) for i in range(300)]
    for suffix in ("", ".gz"):
        (tmp_path / f"a.txt{suffix}").write_bytes(PACKERS[suffix](end.join(paragraphs).encode()))
        pieces = [document["text"] for document in read(f"text:{tmp_path}/a.txt{suffix}")[0]]
        assert len(pieces) > 5 and all(piece.startswith("Paragraph") for piece in pieces)
        assert (end * 2).join(pieces) == end.join(paragraphs).rstrip()


DEEP = ["[" * 10**5, '{"text": ' + "[" * 10**5 + "]" * 10**5 + "}", '{"a":' * 10**5 + "1" + "}" * 10**5]
HUGE = ['{"text": "a", "n": ' + "1" * 10_000 + "}", '{"text": "a", "n": -' + "9" * 10**6 + "}"]


@pytest.mark.parametrize("record", DEEP + HUGE, ids=["open", "array", "object", "digits", "negative"])
def test_a_record_that_no_parser_can_take_is_one_bad_record(tmp_path, record):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "one"}}\n{record}\n{{"text": "two"}}\n')
    documents, bad = read(f"json:{tmp_path}/a.jsonl")
    assert len(documents) == 2 and len(bad) == 1 and "record 2: not JSON: " in bad[0] and len(bad[0]) < 500


def test_the_place_and_reason_of_a_bad_record_can_be_written_and_shown(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9\x1b[31m.jsonl"
    with open(path, "w") as f:
        f.write('{"text": "one"}\n{"\\ud800": 1}\nnot json\n')
    for spec in (f"json:{tmp_path}/*.jsonl", f"json:{os.fsdecode(path)}"):
        documents, bad = read(spec)
        assert documents == [{"text": "one"}] and len(bad) == 2
        assert all(blocks.printable(line) == line and line.encode() and "caf??[31m.jsonl" in line for line in bad)


# ------------------------------------------------------------------------------------------------------- fingerprints


def fingerprint(spec: str) -> str:
    return sources.open_source(read_sources([{"spec": str(spec)}], "sources")[0]).fingerprint


@pytest.mark.parametrize("lines", [10, 10_000], ids=["small", "large"])
def test_a_file_of_other_contents_is_noticed_and_another_name_is_not(tmp_path, lines):
    content = b"".join(b'{"text": "row %05d"}\n' % i for i in range(lines))
    (tmp_path / "a.jsonl").write_bytes(content)
    first = fingerprint(f"json:{tmp_path}/a.jsonl")
    os.rename(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert fingerprint(f"json:{tmp_path}/b.jsonl") == first != fingerprint(f"text:{tmp_path}/b.jsonl")
    for place in (11, len(content) // 2 + 11, len(content) - 5):  # the head, the middle and the tail
        changed = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        (tmp_path / "c.jsonl").write_bytes(changed)
        assert fingerprint(f"json:{tmp_path}/c.jsonl") != first


def test_a_large_file_costs_a_few_reads(tmp_path, monkeypatch):
    with open(tmp_path / "a.txt", "wb") as f:
        f.truncate(1 << 34)
    monkeypatch.setattr(encodings, "detect", lambda *_: "utf-8")  # it is NUL bytes alone
    fingerprint(f"text:{tmp_path}/a.txt")


@pytest.mark.parametrize("location", ["s3://bucket/x", "foo://x", "hf://datasets/x", "https://localhost:1/*.jsonl"])
@pytest.mark.parametrize("kind", ["text", "json", "parquet", "hf", "arrayrecord", "tfds"])
def test_a_location_that_cannot_be_read_is_one_line_that_names_it(kind, location):
    assert refusal(f"{kind}:{location}").startswith(f"source {kind}:{location}: ")
