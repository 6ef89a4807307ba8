"""Tables: any (block, row) is where a full read would have it, and damage and mistakes are named in one line."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_jax.config import UsageError, read_sources
from lowrank_jax.data import files, shards, tables
from lowrank_jax.data.records import BadRecord
from lowrank_jax.data.sources import open_source

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
KEYS = ("text", "messages", False)


def write_parquet(path, columns: dict, group: int = 100) -> str:
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return str(path)


def parquet(*paths, keys=KEYS) -> tables.Parquet:
    return tables.Parquet([str(p) for p in paths], *keys)


def documents(source, block: int, start: int = 0) -> list[dict]:
    return [source.document(row) for row in source.rows(block, start)]


def texts(source) -> list[str]:
    return [document["text"] for block in range(source.blocks) for document in documents(source, block)]


def assert_seeks_exactly(source) -> None:
    """From every tenth row of every block the same rows come as in a full read, in any order of the reads."""
    whole = [documents(source, block) for block in range(source.blocks)]
    starts = [
        (b, s) for b, rows in enumerate(whole) for s in {0, 1, len(rows) - 1, len(rows), *range(0, len(rows), 10)}
    ]
    for i in np.random.default_rng(0).permutation(len(starts)):
        block, start = starts[i]
        assert documents(source, block, start) == whole[block][start:]


# ------------------------------------------------------------------------------------------------------------ parquet


def test_parquet_blocks_are_row_groups_and_any_row_can_be_the_first(tmp_path):
    written = [f"document {i} " * (i % 7) for i in range(500)]
    a = write_parquet(tmp_path / "a.parquet", {"text": written[:230], "id": range(230)}, 100)
    b = write_parquet(tmp_path / "b.parquet", {"text": written[230:], "id": range(270)}, 150)
    source = parquet(a, b)
    assert source.blocks == 5 and texts(source) == written
    assert_seeks_exactly(source)


def test_parquet_reads_only_the_columns_that_matter(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": ["x"], "image": [b"y"], "prompt": ["z"]})
    ((*_, batch, _),) = parquet(path).rows(0)
    assert batch.schema.names == ["text", "prompt"]
    with pytest.raises(BadRecord, match="neither 'messages' nor 'body' in it; it has text, image, prompt"):
        documents(parquet(path, keys=("body", "messages", False)), 0)


def test_parquet_keys_may_be_nested_and_conversations_are_lists_of_structs(tmp_path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    path = write_parquet(tmp_path / "a.parquet", {"meta": [{"body": "in", "id": 1}], "chat": [{"turns": talk}]})
    assert documents(parquet(path, keys=("meta.body", "messages", False)), 0) == [{"text": "in"}]
    assert documents(parquet(path, keys=("text", "chat.turns", True)), 0) == [{"messages": talk, "unused": ["meta"]}]
    path = write_parquet(tmp_path / "b.parquet", {"meta.body": ["literal"], "meta": [{"body": "in"}]})
    assert documents(parquet(path, keys=("meta.body", "messages", False)), 0) == [{"text": "literal"}]


def test_parquet_fingerprints_follow_the_data_and_not_the_folder(tmp_path):
    (tmp_path / "moved").mkdir()
    first = parquet(write_parquet(tmp_path / "a.parquet", {"text": ["x"] * 10})).fingerprint
    assert parquet(write_parquet(tmp_path / "moved" / "a.parquet", {"text": ["x"] * 10})).fingerprint == first
    assert parquet(write_parquet(tmp_path / "b.parquet", {"text": ["x"] * 10})).fingerprint == first
    assert parquet(write_parquet(tmp_path / "a.parquet", {"text": ["y"] * 10})).fingerprint != first
    assert parquet(write_parquet(tmp_path / "a.parquet", {"text": ["x"] * 11})).fingerprint != first


def test_a_file_that_is_not_parquet_is_refused_by_name(tmp_path):
    raw = pathlib.Path(write_parquet(tmp_path / "good.parquet", {"text": ["x" * 100] * 1000})).read_bytes()
    for content in (b"", b"PAR1", b"garbage" * 99, raw[: len(raw) // 2], raw[:-1]):
        (tmp_path / "bad.parquet").write_bytes(content)
        with pytest.raises(UsageError, match="bad.parquet is not a Parquet file, or damaged") as e:
            parquet(tmp_path / "good.parquet", tmp_path / "bad.parquet")
        assert "\n" not in str(e.value)


def test_a_damaged_row_group_ends_early_and_the_others_are_read(tmp_path):
    written = [f"{i} " + os.urandom(200).hex() for i in range(400)]
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": written}), path, row_group_size=100, use_dictionary=False, write_page_checksum=True
    )
    group = pq.read_metadata(path).row_group(1).column(0)
    raw = bytearray(path.read_bytes())
    middle = group.data_page_offset + group.total_compressed_size // 2
    raw[middle : middle + 40] = bytes(40)
    path.write_bytes(raw)
    source = parquet(path)
    with pytest.raises(BadRecord, match=r"a.parquet, row group 1 from row \d+: damaged: "):
        documents(source, 1)
    assert [d["text"] for b in (0, 2, 3) for d in documents(source, b)] == written[:100] + written[200:]


def test_a_row_that_is_not_utf8_is_one_bad_record(tmp_path):
    column = pa.array([b"good", b"caf\xe9", b"fine"], pa.binary())
    broken = pa.StringArray.from_buffers(3, column.buffers()[1], column.buffers()[2])
    rows = list(parquet(write_parquet(tmp_path / "a.parquet", {"text": broken})).rows(0))
    source = parquet(tmp_path / "a.parquet")
    assert [source.document(rows[i]) for i in (0, 2)] == [{"text": "good"}, {"text": "fine"}]
    with pytest.raises(BadRecord, match="a.parquet, row group 0, row 1: not UTF-8"):
        source.document(rows[1])


def test_an_io_error_is_no_damage(tmp_path, monkeypatch):
    source = parquet(write_parquet(tmp_path / "a.parquet", {"text": ["x"] * 10}))

    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "open_file", fail)
    with pytest.raises(OSError, match="Input/output error"):
        documents(source, 0)


def test_a_large_row_group_is_never_in_memory_as_a_whole(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": [os.urandom(2000).hex() for _ in range(30_000)]}, 30_000)
    reader = (
        "import re, sys; from lowrank_jax.data import tables\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
        "source = tables.Parquet([sys.argv[1]], 'text', 'messages', False); next(source.rows(0)); before = peak()\n"
        "print(sum(1 for _ in source.rows(0, 1)), peak() - before, before)"
    )
    argv = [sys.executable, "-c", reader, path]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, cwd=ROOT)
    count, grown, before = map(int, done.stdout.split())  # the last two in KiB
    assert count == 29_999 and os.path.getsize(path) > 55e6
    assert before < 150_000 and grown < 20_000


def test_threads_share_a_source(tmp_path):
    source = parquet(write_parquet(tmp_path / "a.parquet", {"text": [str(i) for i in range(2000)]}, 250))
    whole, mistakes = [documents(source, b) for b in range(8)], []

    def work(seed):
        draw = np.random.default_rng(seed)
        for _ in range(30):
            block, start = draw.integers(8), draw.integers(250)
            if [source.document(row) for row, _ in zip(source.rows(block, start), range(9))] != whole[block][start:][
                :9
            ]:
                mistakes.append((block, start))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not mistakes


# ------------------------------------------------------------------------------------------------------- Hugging Face


def hugging_face(path, split="train", keys=KEYS) -> tables.HuggingFace:
    return tables.HuggingFace(str(path), "", split, *keys)


def write_arrow(path, written):
    table = pa.table({"text": written})
    with pa.OSFile(str(path), "wb") as f, pa.ipc.new_stream(f, table.schema) as writer:
        writer.write_table(table, max_chunksize=70)


def write_jsonl(path, written):
    path.write_text("".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(written)))


WRITERS = {
    ".jsonl": write_jsonl,
    ".csv": lambda path, written: path.write_text("id,text\n" + "".join(f"{i},{t}\n" for i, t in enumerate(written))),
    ".parquet": lambda path, written: write_parquet(path, {"text": written}, 150),
    ".arrow": write_arrow,
    ".txt": lambda path, written: path.write_text("".join(t + "\n" for t in written)),
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_file_of_any_format_can_be_read_from_any_row(tmp_path, suffix):
    written = [f"document {i} " + "word " * (i % 11) + "." for i in range(400)]
    WRITERS[suffix](tmp_path / f"a{suffix}", written)
    source = hugging_face(tmp_path / f"a{suffix}")
    assert source.blocks == (3 if suffix == ".parquet" else 1)
    assert texts(source) == written
    assert_seeks_exactly(source)


def test_a_deep_row_beyond_many_tables_is_exact(tmp_path):
    written = [f"{i} " + "x" * 300 for i in range(80_000)]  # 25 MB: three of the library's chunks
    write_jsonl(tmp_path / "a.jsonl", written)
    source = hugging_face(tmp_path / "a.jsonl")
    for start in (1, 31_999, 32_001, 50_000, 79_999):
        assert source.document(next(source.rows(0, start)))["text"] == written[start]
    assert list(source.rows(0, 80_000)) == []


def test_a_folder_of_several_files_with_row_groups(tmp_path, capfd):
    written = [f"document {i}" for i in range(500)]
    write_parquet(tmp_path / "train-0.parquet", {"text": written[:300]}, 100)
    write_parquet(tmp_path / "train-1.parquet", {"text": written[300:]}, 100)
    write_parquet(tmp_path / "test-0.parquet", {"text": ["held out"]})
    source = hugging_face(tmp_path)
    assert source.blocks == 5 and texts(source) == written
    assert texts(hugging_face(tmp_path, "test")) == ["held out"]
    assert_seeks_exactly(source)
    with pytest.raises(UsageError, match="there is no split 'validation' in it; it has (train, test|test, train)"):
        hugging_face(tmp_path, "validation")
    assert capfd.readouterr() == ("", "")


def test_files_that_belong_to_no_split_are_named_once(tmp_path, capfd):
    """`datasets` reads the most frequent format, and only files with a split's name if there are any."""
    for name in ("mixed", "splits", "unknown"):
        (tmp_path / name).mkdir()
    for name in "abc":
        WRITERS[".csv"](tmp_path / "mixed" / f"{name}.csv", [name])
    write_jsonl(tmp_path / "mixed" / "d.jsonl", ["lost"])
    for name in ("train", "more"):
        write_jsonl(tmp_path / "splits" / f"{name}.jsonl", [name])
    WRITERS[".csv"](tmp_path / "unknown" / "a.csv", ["a"])
    for name in (
        "b.xlsx",
        "c.ndjson",
        "README.md",
        ".gitattributes",
        "LICENSE",
        "d.py",
    ):  # a package, more data, no data
        (tmp_path / "unknown" / name).write_text("")
    left_outs = {"mixed": "3 files are read, as csv; left out: d.jsonl", "splits": "more.jsonl"}
    left_outs["unknown"] = "1 files are read, as csv; left out: b.xlsx, c.ndjson;"
    for folder, left_out in left_outs.items():
        for _ in range(2):
            source = tables.hugging_face(f"{tmp_path}/{folder}", "", "train", *KEYS)
        assert len(texts(source)) == (3 if folder == "mixed" else 1)
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"source hf:{tmp_path}/{folder}: ") and left_out in line


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 20)}]\n" for i in range(1, 8))
CARDS = {"bomb": BOMB + "configs: *a7", "deep": "configs: " + "[" * 10**5, "large": "license: mit\n" * 10**5}


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize("card", CARDS)
def test_a_card_that_grows_when_it_is_read_is_one_line_at_once(tmp_path, card, name):
    write_jsonl(tmp_path / "a.jsonl", ["text"])
    (tmp_path / name).write_text(CARDS[card] if name.endswith("yaml") else f"---\n{CARDS[card]}\n---\n# A corpus\n")
    started = time.thread_time()
    with pytest.raises(UsageError, match=f"{name}: its YAML may have 256 KiB, 50 levels and no aliases"):
        tables.hugging_face(str(tmp_path), "", "train", *KEYS)
    assert time.thread_time() - started < 1


def test_a_card_of_the_usual_kind_is_read(tmp_path):
    for name in ("one", "two"):
        write_jsonl(tmp_path / f"{name}.jsonl", [name])
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("one", "two"))
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\nconfigs:\n{configs}---\n# A corpus\n")
    assert texts(tables.hugging_face(str(tmp_path), "two", "train", *KEYS)) == ["two"]


@pytest.mark.parametrize("suffix", [".csv", ".txt"])
def test_a_table_that_is_not_utf8_is_one_line(tmp_path, suffix):
    written = [f"Größe {i}" for i in range(50)]
    WRITERS[suffix](tmp_path / f"a{suffix}", written)
    for encoding in ("utf-16", "latin-1"):
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / f"b{suffix}").write_bytes((tmp_path / f"a{suffix}").read_text().encode(encoding))
        for location in (tmp_path / "b", tmp_path / "b" / f"b{suffix}"):
            with pytest.raises(UsageError, match=f"b/b{suffix} is .*iconv -f"):
                tables.hugging_face(str(location), "", "train", *KEYS)


def test_a_path_that_is_no_file_is_named_for_what_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    os.symlink("nowhere", tmp_path / "link.csv")
    for name, kind in (("pipe.csv", "a named pipe"), ("link.csv", "a broken link to nowhere")):
        with pytest.raises(UsageError, match=f"^source hf:{tmp_path}/{name}: it is {kind}$"):
            tables.hugging_face(f"{tmp_path}/{name}", "", "train", *KEYS)


@pytest.mark.parametrize("column", [pa.timestamp("us"), pa.date32(), pa.duration("s")], ids=str)
def test_a_value_that_python_cannot_hold_is_one_bad_record(tmp_path, column):
    most = pa.array(
        [2 ** (31 if column == pa.date32() else 63) - 1], pa.int32() if column == pa.date32() else pa.int64()
    )
    source = parquet(write_parquet(tmp_path / "a.parquet", {"text": most.cast(column)}))
    with pytest.raises(BadRecord, match="a.parquet, row group 0, row 0: not readable: "):
        documents(source, 0)


def test_a_column_whose_name_is_not_utf8_is_one_line(tmp_path):
    raw = pathlib.Path(write_parquet(tmp_path / "a.parquet", {"title": ["x"]})).read_bytes()
    (tmp_path / "a.parquet").write_bytes(raw.replace(b"title", b"tit\xffe"))
    with pytest.raises(UsageError, match="a.parquet is not a Parquet file, or damaged: "):
        parquet(tmp_path / "a.parquet")


def test_two_columns_of_one_name_are_refused(tmp_path):
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "a.parquet")
    pq.write_table(pa.table([pa.array(["a"])] * 3, names=["text", "x", "x"]), tmp_path / "b.parquet")
    with pytest.raises(UsageError, match="a.parquet has more than one column 'text'; rename all but one"):
        parquet(tmp_path / "b.parquet", tmp_path / "a.parquet")
    assert texts(parquet(tmp_path / "b.parquet")) == ["a"]


def damaged(raw: bytes, seed: int) -> bytes:
    """Change bits, overwrite, insert or cut, by the seed."""
    place = int(np.random.default_rng(seed).integers(len(raw)))
    before, bit = raw[:place], bytes([raw[place] ^ 1 << seed % 8])
    return before + (b"\xfe\0x" + raw[place:], bit + raw[place + 1 :], bytes(30) + raw[place + 30 :], b"")[seed % 4]


@pytest.mark.parametrize("kind, name", [("parquet", "a.parquet"), *(("hf", f"a{suffix}") for suffix in WRITERS)])
def test_damage_of_any_kind_is_a_bad_record_or_one_line(tmp_path, kind, name):
    WRITERS[os.path.splitext(name)[1]](tmp_path / name, [f"document {i} " + "word " * (i % 7) for i in range(200)])
    raw = (tmp_path / name).read_bytes()
    for seed in range(12):
        (tmp_path / name).write_bytes(damaged(raw, seed))
        try:
            source = open_source(read_sources([f"{kind}:{tmp_path}/{name}"], "sources")[0])
        except UsageError as e:
            assert "\n" not in str(e) and len(str(e)) < 500 + len(str(tmp_path))
            continue
        for block in range(source.blocks):
            with contextlib.suppress(BadRecord):
                for row in source.rows(block):
                    with contextlib.suppress(BadRecord):
                        source.document(row)


def test_fields_of_mixed_types_are_read_as_they_are(tmp_path):
    user, parts = {"role": "user", "content": "Hi"}, [{"type": "text", "text": "Ho"}]
    lines = [{"messages": [user, {"role": "assistant", "content": c}]} for c in ("Ho", parts)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    talk = {"messages": [user, {"role": "assistant", "content": "Ho"}]}
    assert documents(hugging_face(tmp_path / "a.jsonl", keys=("text", "messages", True)), 0) == [talk, talk]


def test_other_columns_are_named_where_the_key_is_missing(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"title": ["x"], "prompt": ["y"]})
    with pytest.raises(BadRecord, match="shard 0, row 0: neither 'messages' nor 'text' in it; it has title, prompt"):
        documents(hugging_face(tmp_path / "a.parquet"), 0)


def test_fingerprints_of_folders_follow_the_data(tmp_path):
    for name, count in (("a", 10), ("b", 10), ("c", 11)):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "x.jsonl", ["text"] * count)
    a, b, c = (hugging_face(tmp_path / name).fingerprint for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("name", ["none.jsonl", "folder", "a.parquet", "a.weird", "none"])
def test_a_dataset_that_cannot_be_opened_is_refused_in_one_line(tmp_path, name):
    (tmp_path / "folder").mkdir()
    for file in ("a.parquet", "a.weird"):
        (tmp_path / file).write_text("garbage")
    with pytest.raises(UsageError, match=f"^source hf:{tmp_path}/{name}: ") as e:
        hugging_face(tmp_path / name)
    assert "\n" not in str(e.value)


def test_damage_further_on_ends_the_shard(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["x" * 300] * 50_000)
    with open(tmp_path / "a.jsonl", "a") as f:
        f.write('{"text": "cut sho')
    source, count = hugging_face(tmp_path / "a.jsonl"), 0
    with pytest.raises(BadRecord, match=r"shard 0 from row \d+: damaged: "):
        for _ in source.rows(0):
            count += 1
    assert count > 10_000


def test_errors_of_the_network_can_be_tried_again(tmp_path, monkeypatch):
    import huggingface_hub.errors

    write_jsonl(tmp_path / "a.jsonl", ["text"] * 10)
    source = hugging_face(tmp_path / "a.jsonl")
    source._local = False
    broken = type("ReadTimeout", (Exception,), {"__module__": "httpx._exceptions"})
    for error in (ConnectionError("gone"), broken("slow"), huggingface_hub.errors.HfHubHTTPError.__new__(
        huggingface_hub.errors.HfHubHTTPError
    )):  # fmt: skip

        class Data:
            def shard(self, *_, error=error):
                raise error

        monkeypatch.setattr(source, "_data", Data())
        with pytest.raises(OSError):
            list(source.rows(0))


def test_a_missing_package_is_named_with_the_way_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="pip install datasets"):
        hugging_face(tmp_path)


# --------------------------------------------------------------------------------------------------------------- TFDS

BUILDER = """
import pathlib, sys
import tensorflow_datasets as tfds

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = pathlib.Path(sys.argv[1])

    def _info(self):
        turns = tfds.features.Sequence({"role": tfds.features.Text(), "content": tfds.features.Text()})
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "messages": turns})
        )

    def _split_generators(self, dl_manager):
        return {"train": self.make(150), "test": self.make(3)}

    def _generate_examples(self):
        yield from ()

    def make(self, n):
        for i in range(n):
            turns = [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": f"caf\u00e9 {i}"}]
            yield i, {"text": f"document {i}", "messages": turns}

Tiny(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""
READER = """
import json, sys
from lowrank_jax.config import UsageError
from lowrank_jax.data import tables

out = {}
source = tables.TFDS("tiny:1.0.0", "train", "none", "messages", True)
read = lambda b, s=0: [source.document(row) for row in source.rows(b, s)]
whole = [read(b) for b in range(source.blocks)]
out["exact"] = all(read(b, s) == whole[b][s:] for b in range(source.blocks) for s in (0, 1, 21, 22, 63, 64))
out["blocks"], out["documents"] = [len(w) for w in whole], sorted(d["messages"][1]["content"] for w in whole for d in w)
text = tables.TFDS("tiny", "test", "text", "none", False)
out["test"] = sorted(text.document(row)["text"] for row in text.rows(0))
out["fingerprints"] = [text.fingerprint, source.fingerprint]
out["errors"] = []
for name, split in (("tiny", "validation"), ("nosuchset", "train"), ("tiny:9.9.9", "train")):
    try:
        tables.TFDS(name, split, "text", "messages", False)
    except UsageError as e:
        out["errors"].append(str(e))
out["tensorflow"] = "tensorflow" in sys.modules
print(json.dumps(out))
"""


def test_tfds_is_read_without_tensorflow(tmp_path):
    script = tmp_path / "build.py"
    script.write_text(BUILDER, encoding="utf-8")
    env = os.environ | {"TFDS_DATA_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, script, tmp_path], check=True, env=env, capture_output=True)
    done = subprocess.run([sys.executable, "-c", READER], check=True, env=env, capture_output=True, text=True)
    out = json.loads(done.stdout)  # and nothing else is printed there
    assert out["exact"] and out["blocks"] == [64, 64, 22] and not out["tensorflow"]
    assert out["documents"] == sorted(f"caf\u00e9 {i}" for i in range(150))
    assert out["test"] == [f"document {i}" for i in range(3)]
    assert len(set(out["fingerprints"])) == 2
    splits, unknown, version = out["errors"]
    assert "there is no split 'validation' in it; it has" in splits and "test" in splits and "train" in splits
    assert unknown.startswith("source tfds:nosuchset: cannot be opened: ") and "\n" not in unknown
    assert version.startswith("source tfds:tiny:9.9.9: cannot be opened: ") and "\n" not in version


# -------------------------------------------------------------------------------------------------------- ArrayRecord


@given(st.lists(st.tuples(st.sampled_from([0, 1, 255, 65_535, 65_536, 2**31 - 1]), st.booleans()), max_size=70))
def test_records_of_tokens_round_trip(tokens):
    ids, said = np.array([i for i, _ in tokens], np.int32), np.array([s for _, s in tokens], bool)
    for mask in (said, np.arange(len(ids)) > 0):
        raw = shards.encode_record(ids, mask)
        back, back_said = shards.decode_record(raw)
        assert back.dtype == np.int32 and back.tolist() == ids.tolist()
        assert back_said.dtype == bool and back_said.tolist() == mask.tolist()
    assert len(raw) == len(ids) * (4 if ids.max(initial=0) > 65_535 else 2) + 1


@given(st.binary(max_size=40))
def test_any_other_bytes_are_tokens_or_a_value_error(raw):
    try:
        ids, said = shards.decode_record(raw)
        assert len(ids) == len(said)
    except ValueError:
        pass


def write_shards(folder, counts=(130, 0, 64), **changes) -> str:
    folder.mkdir()
    names, at = [f"part-{i}.array_record" for i in range(len(counts))], 0
    for name, count in zip(names, counts):
        writer = shards.open_writer(str(folder / name))
        for _ in range(count):
            ids = np.arange(at, at + 5)
            writer.write(shards.encode_record(ids, np.arange(5) % 2 == at % 2))
            at += 1
        writer.close()
    meta = {"format": 1, "tokenizer_sha256": "t", "vocab_size": 300, "chats": True, "documents": at, "tokens": 5 * at}
    meta |= {"shards": len(counts), "records": dict(zip(names, counts))} | changes
    (folder / "meta.json").write_text(json.dumps(meta))
    return str(folder)


def test_shards_are_read_from_any_row(tmp_path):
    source = shards.ArrayRecord(write_shards(tmp_path / "a"))
    assert source.blocks == 4 and (source.tokenizer_sha256, source.chats) == ("t", True)
    plain = lambda b, s=0: [(d["ids"].tolist(), d["said"].tolist()) for d in documents(source, b, s)]
    whole = [plain(b) for b in range(4)]
    assert [ids[0] for rows in whole for ids, _ in rows] == list(range(194))
    assert all(said == [i % 2 == ids[0] % 2 for i in range(5)] for rows in whole for ids, said in rows)
    for b in range(4):
        for s in (0, 1, 2, 3, 63, 64, 65):
            assert plain(b, s) == whole[b][s:]
    assert shards.ArrayRecord(f"{tmp_path}/a/part-0.*").blocks == 3
    assert shards.ArrayRecord(write_shards(tmp_path / "b")).fingerprint == source.fingerprint
    assert shards.ArrayRecord(write_shards(tmp_path / "c", (130, 64, 0))).fingerprint != source.fingerprint


def test_foreign_and_damaged_folders_are_refused(tmp_path):
    good = pathlib.Path(write_shards(tmp_path / "good"))

    def check(location, match):
        with pytest.raises(UsageError, match=match) as e:
            shards.ArrayRecord(str(location))
        assert "tokenize" in str(e.value) and "\n" not in str(e.value)

    check(tmp_path / "none", "no such file")
    check(tmp_path, "no such file")
    check(write_shards(tmp_path / "old", format=0), "is not from this version")
    check(write_shards(tmp_path / "foreign", records=None), "is not from this version")
    check(write_shards(tmp_path / "few", (3, 3), records={"part-0.array_record": 3}), "part-1.array_record is damaged")
    for broken in ("", "[]", "{", "[" * 10**5):
        (good / "meta.json").write_text(broken)
        check(good, "is not from this version")
    (good / "meta.json").unlink()
    check(good, "meta.json: no such file")
    cut = pathlib.Path(write_shards(tmp_path / "cut"))
    raw = (cut / "part-0.array_record").read_bytes()
    for content in (raw[: len(raw) // 2], b"garbage" * 99, b""):
        (cut / "part-0.array_record").write_bytes(content)
        check(cut, "part-0.array_record is damaged")
    missing = pathlib.Path(write_shards(tmp_path / "missing"))
    (missing / "part-1.array_record").unlink()
    with pytest.raises(UsageError, match="shards are missing"):
        shards.ArrayRecord(str(missing))


def test_a_damaged_block_is_one_bad_record(tmp_path):
    folder = write_shards(tmp_path / "a", (640,))
    path = tmp_path / "a" / "part-0.array_record"
    source = shards.ArrayRecord(folder)
    before = [[d["ids"].tolist() for d in documents(source, b)] for b in range(10)]
    raw = bytearray(path.read_bytes())
    at = next(i for i in range(300, len(raw)) if 0 not in raw[i : i + 8])  # there is much padding
    raw[at : at + 8] = bytes(8)
    path.write_bytes(raw)
    source, bad = shards.ArrayRecord(folder), 0
    for b in range(10):
        try:
            assert [d["ids"].tolist() for d in documents(source, b)] == before[b]
        except BadRecord as e:
            assert "part-0.array_record, record" in str(e)
            bad += 1
    assert 1 <= bad <= 2


def test_our_own_reader_reads_the_files_of_a_dataset_if_it_can_start_in_the_middle(tmp_path):
    """JSON lines are read in blocks of bytes, Parquet by row groups, and any other format by shards."""
    rows = [{"text": f"row {i}"} for i in range(300)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name, kind in (("json", files.JsonFiles), ("parquet", tables.Parquet), ("csv", tables.HuggingFace)):
        folder = tmp_path / name
        folder.mkdir()
        if name == "json":
            (folder / "train.jsonl").write_text(lines)
        elif name == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet", row_group_size=100)
        else:
            (folder / "train.csv").write_text("text\n" + "".join(f"row {i}\n" for i in range(300)))
        source = tables.hugging_face(str(folder), "", "train", "text", "messages", False)
        assert isinstance(source, kind) and (source.blocks > 1 or name == "csv")
        assert [source.document(row) for block in range(source.blocks) for row in source.rows(block)] == rows
