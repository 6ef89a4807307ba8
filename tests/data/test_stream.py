"""The token stream loses and repeats nothing, learns nothing across documents, and resumes exactly at a cursor."""

import collections
import contextlib
import gzip
import itertools
import json
import threading
import time
import types

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lowrank_jax.config import UsageError
from lowrank_jax.data import blocks, chat, files, packing, reader, stream, tokenizer
from lowrank_jax.data.packing import WINDOW_ROWS
from lowrank_jax.machine.interrupt import Interrupted

SHAPES = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 40)), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def corpus(make, tmp_path_factory) -> dict:
    """Sources of documents that no two have in common, and the documents themselves."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = {
        "few": [{"text": f"few{i} " + make.prose(3 + 5 * i, i)} for i in range(5)],
        "many": [{"text": f"many{i} " + make.prose(1 + i % 23, 50 + i)} for i in range(60)],
        "gaps": [{"text": " \n" if i % 3 else f"gaps{i} " + make.prose(i, 200 + i)} for i in range(20)],
        "chats": [{"messages": make.chat(2 * (1 + i % 3), i)} for i in range(30)],
    }
    sources = {name: make.write_jsonl(folder / f"{name}.jsonl", rows[name]) for name in rows}
    return {"rows": rows} | sources


@pytest.fixture(scope="module")
def open_stream(make, tok):
    """A stream of a phase's training part, endless and shuffled."""

    def open_stream(sources, seed=0, chats=False, cursor=None, held_out=False, share=(0, 1), **changes):
        phase = make.phase(sources, **changes)
        if held_out:
            return stream.open_held_out(phase, tok, seed, chats)
        return stream.open_phase(phase, tok, seed, chats, (cursor, ""), share)

    return open_stream


@pytest.fixture(scope="module")
def read_once(make, tok):
    return lambda source: stream.read_once(make.phase(source).sources, tok)


def flat(tok, rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of documents one after another, and which document each belongs to."""
    encoded = [[tok.bos, *tok.encode(row["text"]), tok.eos] for row in rows if row["text"].strip()]
    return np.concatenate(encoded), np.repeat(np.arange(len(encoded)), [len(ids) for ids in encoded])


def take(documents: stream.Stream, shapes) -> list[stream.Batch]:
    """Batches of these shapes, up to the end of the stream."""
    return list(itertools.takewhile(lambda batch: batch is not None, (documents.next(*shape) for shape in shapes)))


def joined(batches: list[stream.Batch], key: str) -> np.ndarray:
    return np.concatenate([batch[key].ravel() for batch in batches]) if batches else np.zeros(0, int)


def texts(tok, batches: list[stream.Batch]) -> list[str]:
    """Return the text of every document that begins in `batches`."""
    tokens = joined(batches, "tokens")
    return [tok.decode(ids) for ids in np.split(tokens, np.flatnonzero(tokens == tok.bos))[1:]]


def same(one: list[stream.Batch], other: list[stream.Batch]) -> bool:
    keys = ("tokens", "targets", "weights", "segments")
    alike = [set(a) == set(b) == {*keys} and all(np.array_equal(a[k], b[k]) for k in keys) for a, b in zip(one, other)]
    return len(one) == len(other) and all(alike)


# ---------------------------------------------------------------------------------------------------- exact packing


@settings(max_examples=40)
@given(SHAPES)
@example([(1, 1)] * 12)
@example([(2, 8), (1, 16), (4, 4), (1, 3), (5, 40)])
def test_batches_of_any_shapes_are_the_flat_stream(corpus, tok, read_once, shapes):
    tokens, document = flat(tok, corpus["rows"]["many"])
    batches = take(read_once(corpus["many"]), shapes)
    n = sum(rows * length for rows, length in shapes[: len(batches)])
    assert [batch["tokens"].shape for batch in batches] == shapes[: len(batches)]
    assert np.array_equal(joined(batches, "tokens"), tokens[:n])
    assert np.array_equal(joined(batches, "targets"), tokens[1 : n + 1])
    assert np.array_equal(joined(batches, "weights"), document[1 : n + 1] == document[:n])


def test_a_stream_that_is_read_once_ends_when_no_full_batch_is_left(corpus, tok, read_once):
    tokens, _ = flat(tok, corpus["rows"]["few"])
    documents = read_once(corpus["few"])
    batches = take(documents, [(2, 10)] * 1000)
    assert len(batches) == (len(tokens) - 1) // 20
    rest = len(tokens) - 1 - 20 * len(batches)
    assert documents.next(2, 10) is None
    assert documents.next(1, rest)["targets"][0, -1] == tok.eos and documents.next(1, 1) is None


@settings(max_examples=40)
@given(SHAPES)
def test_segments_change_exactly_between_documents_and_start_at_1_in_every_row(corpus, tok, read_once, shapes):
    document = flat(tok, corpus["rows"]["many"])[1]
    for batch in take(read_once(corpus["many"]), shapes):
        rows, length = batch["segments"].shape
        expected, document = document[: rows * length].reshape(rows, length), document[rows * length :]
        assert (batch["segments"][:, 0] == 1).all()
        assert np.array_equal(np.diff(batch["segments"]), np.diff(expected))


def test_arrays_have_the_types_that_training_is_compiled_for(corpus, open_stream):
    for chats, source in ((False, corpus["many"]), (True, corpus["chats"])):
        batch = open_stream(source, chats=chats).next(2, 64)
        kinds = {key: array.dtype.name for key, array in batch.items()}
        assert kinds == {"tokens": "int32", "targets": "int32", "weights": "float32", "segments": "int32"}


@pytest.mark.parametrize("packed", [False, True])
def test_every_epoch_reads_every_document_once_in_an_order_of_its_own(corpus, tok, tmp_path, open_stream, packed):
    """A packed file is one block, so that only the order within it can differ."""
    source, written = corpus["many"], [row["text"] for row in corpus["rows"]["many"]]
    if packed:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in written)
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        source = f"json:{tmp_path}/a.jsonl.gz"
    read = texts(tok, take(open_stream(source), [(1, 4000)]))
    first, second = read[:60], read[60:120]
    assert sorted(first) == sorted(second) == sorted(written)
    assert first != second and written not in (first, second)


def test_documents_without_text_are_skipped(corpus, tok, read_once, open_stream):
    tokens, _ = flat(tok, corpus["rows"]["gaps"])
    assert np.array_equal(joined(take(read_once(corpus["gaps"]), [(1, 1)] * 9999), "tokens"), tokens[:-1])
    endless = joined(take(open_stream(corpus["gaps"]), [(1, 3 * len(tokens))]), "tokens")
    assert (np.diff(np.flatnonzero(endless == tok.bos)) > 2).all()


# ----------------------------------------------------------------------------------------------------------- cursors

GROWING = [(4, 8), (4, 8), (2, 16), (2, 16), (1, 33), (3, 5), (1, 64), (8, 4)] * 2
WHOLE = [(2, 64), (2, 64), (1, 200), (3, 40), (4, 64), (1, 30)] * 3
CASES = {
    "one source": ([("few", 1.0)], False, GROWING),
    "weighted sources": ([("few", 3.0), ("many", 1.0), ("gaps", 0.5)], False, GROWING),
    "conversations": ([("chats", 1.0)], True, WHOLE),
    "conversations pretrained on": ([("chats", 1.0), ("few", 2.0)], False, GROWING),
    "two sources of conversations": ([("chats", 1.0), ("chats", 9.0)], True, WHOLE),
}


@pytest.fixture(scope="module", params=CASES)
def straight(request, corpus, open_stream):
    """(how to open a stream of this case, its shapes, its uninterrupted batches, the cursor before each)"""
    names, chats, shapes = CASES[request.param]
    sources = [{"spec": corpus[name], "weight": weight} for name, weight in names]
    documents, batches, cursors = open_stream(sources, chats=chats), [], []
    for shape in shapes:
        cursors.append(json.dumps(documents.cursor()))
        batches.append(documents.next(*shape))
    assert any(source["epochs"] > 1 for source in stream.summary(documents.cursor())), "it must cross an epoch's end"
    return lambda cursor: open_stream(sources, chats=chats, cursor=cursor), shapes, batches, cursors


def test_a_cursor_gives_bitwise_the_rest_of_the_stream_at_every_step(straight):
    resume, shapes, batches, cursors = straight
    for k, cursor in enumerate(cursors):
        resumed = resume(json.loads(cursor))
        assert json.dumps(resumed.cursor()) == cursor
        assert same(take(resumed, shapes[k:]), batches[k:])


@settings(max_examples=6)
@given(cuts=st.lists(st.integers(0, 16), min_size=3, max_size=3).map(sorted))
@example(cuts=[5, 5, 6])
def test_a_stream_resumed_three_times_in_a_row_is_the_same_stream(straight, cuts):
    resume, shapes, batches, _ = straight
    parts, cursor = [], None
    for start, stop in itertools.pairwise([0, *cuts, len(shapes)]):
        documents = resume(cursor)
        parts += take(documents, shapes[start:stop])
        cursor = json.loads(json.dumps(documents.cursor()))
    assert same(parts, batches)


def test_a_cursor_is_small_and_stays_small(corpus, open_stream):
    documents = open_stream(corpus["many"])
    first = len(json.dumps(documents.cursor()))
    take(documents, [(4, 64)] * 20)
    assert len(json.dumps(documents.cursor())) < first + 60


def test_a_cursor_of_other_sources_is_refused(corpus, open_stream):
    cursor = open_stream([corpus["few"], corpus["many"]]).cursor()
    for names in ([corpus["few"]], [corpus["many"], corpus["few"]], [corpus["few"], corpus["gaps"]]):
        with pytest.raises(UsageError, match="the run .*many.jsonl.* but the config now names .*workdir"):
            open_stream(names, cursor=cursor)


def test_a_cursor_of_sources_that_changed_is_refused(make, tmp_path, open_stream):
    source = make.write_jsonl(tmp_path / "a.jsonl", [{"text": f"row {i}"} for i in range(9)])
    cursor = open_stream(source).cursor()
    make.write_jsonl(tmp_path / "a.jsonl", [{"text": f"row {i}"} for i in range(10)])
    with pytest.raises(UsageError, match="a.jsonl has changed since the run stopped"):
        open_stream(source, cursor=cursor)


@pytest.fixture
def three_files(make, tmp_path):
    """Three files of as many bytes, read by a glob."""
    for name in "abc":
        make.write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i:03d} some text"} for i in range(40)])
    return tmp_path


def test_files_may_move_and_have_other_names_within_a_run(three_files, open_stream):
    shapes = [(8, 16)] * 9
    documents = open_stream(f"json:{three_files}/*.jsonl")
    take(documents, shapes[:4])
    cursor, rest = json.loads(json.dumps(documents.cursor())), take(documents, shapes[4:])
    (three_files / "moved").mkdir()
    for old, new in (("a", "a1"), ("b", "b1"), ("c", "z")):
        (three_files / f"{old}.jsonl").rename(three_files / "moved" / f"{new}.json")
    assert same(take(open_stream(f"json:{three_files}/moved/*", cursor=cursor), shapes[4:]), rest)
    (three_files / "moved" / "a1.json").rename(three_files / "moved" / "n.json")
    with pytest.raises(UsageError, match="/moved/. has the same files, but their names now sort in another order"):
        open_stream(f"json:{three_files}/moved/*", cursor=cursor)
    with pytest.raises(UsageError, match="the run is reading json:.* but the config now names text:"):
        open_stream(f"text:{three_files}/moved/*", cursor=cursor)


def test_a_file_replaced_by_another_of_as_many_bytes_is_refused(three_files, open_stream):
    cursor = open_stream(f"json:{three_files}/*").cursor()
    (three_files / "b.jsonl").write_text((three_files / "b.jsonl").read_text().replace("017 some", "017 same"))
    with pytest.raises(UsageError, match=r"has changed since the run stopped \(its files' contents\); put it back"):
        open_stream(f"json:{three_files}/*", cursor=cursor)


def test_a_cursor_of_an_older_version_compares_names_and_sizes(three_files, open_stream):
    shapes, spec = [(8, 16)] * 6, f"json:{three_files}/*"
    names_and_sizes = [(f"{name}.jsonl", (three_files / f"{name}.jsonl").stat().st_size) for name in "abc"]
    documents = open_stream(spec)
    take(documents, shapes[:3])
    old = documents.cursor() | {"fingerprints": [blocks.fingerprint(names_and_sizes)]}
    assert same(take(open_stream(spec, cursor=old), shapes[3:]), take(documents, shapes[3:]))
    (three_files / "a.jsonl").rename(three_files / "aa.jsonl")
    with pytest.raises(UsageError, match=r"has changed since the run stopped \(its files' names or sizes\)"):
        open_stream(spec, cursor=old)


def test_equal_hashes_mean_equal_batches_in_equal_order(corpus, open_stream):
    def digest(shapes, **changes):
        documents = open_stream(corpus["many"], **changes)
        take(documents, shapes)
        return stream.data_sha256(documents.cursor())

    shapes = [(2, 16)] * 3
    assert digest(shapes) == digest(shapes)
    others = [digest(shapes[:2]), digest(shapes, seed=1), digest([(1, 32)] * 3), digest([])]
    others.append(digest([(1, 32)] * 2 + shapes[2:]))  # the last batch is the same
    assert len({digest(shapes), *others}) == 6


# ---------------------------------------------------------------------------------------------- many readers and hosts


@pytest.fixture(scope="module")
def large(make, tmp_path_factory) -> list[dict]:
    """Sources large enough for several readers: one shared by blocks, one by rows, one whose share changes."""
    folder = tmp_path_factory.mktemp("large")
    rows = [{"text": f"big{i} " + make.prose(3 + i % 50, i)} for i in range(3000)]
    packed = "".join(json.dumps({"text": f"zip{i} " + make.prose(3 + i % 9, i)}) + "\n" for i in range(300))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(packed.encode()))
    (folder / "c.txt").write_text("\n\n".join(f"txt{i} " + make.prose(30, i) for i in range(2500)))
    return [
        {"spec": make.write_jsonl(folder / "a.jsonl", rows), "weight": {0: 1.0, 12: 0.1}},
        {"spec": f"json:{folder}/b.jsonl.gz", "weight": 0.5},
        {"spec": f"text:{folder}/c.txt", "weight": {0: 0.0, 8: 1.0}},
    ]


SHARED = {"tokens_per_step": 1024, "block": 64, "auto_grow": True, "grow_plan": "64,128"}
GROWS = [(16, 64)] * 10 + [(8, 128)] * 10


def read(documents: stream.Stream, shapes=GROWS, start=0) -> list[stream.Batch]:
    return [documents.next(*shape, step) for step, shape in enumerate(shapes[start:], start)]


def test_any_number_of_hosts_reads_the_same_global_batches_and_cursor(large, open_stream):
    one = open_stream(large, **SHARED)
    batches = read(one)
    assert one.cursor()["readers"] == 8
    for hosts in (2, 3, 4, 8, 16):
        shapes = GROWS if hosts < 16 else [(16, 64)] * 10  # 16 hosts need 16 rows
        streams = [open_stream(large, share=(host, hosts), **SHARED) for host in range(hosts)]
        parts = [read(documents, shapes) for documents in streams]
        merged = [{key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in zip(*parts)]
        assert same(merged, batches[: len(shapes)])
        if len(shapes) == len(GROWS):
            assert stream.merge([documents.cursor() for documents in streams]) == one.cursor()
        assert all(len(documents.cursor()["lanes"]) == -(-8 // hosts) for documents in streams if hosts != 3)


@pytest.mark.parametrize("before, after", [(1, 4), (4, 2), (2, 8), (8, 1)])
def test_a_run_resumes_on_another_number_of_hosts(large, open_stream, before, after):
    batches = read(open_stream(large, **SHARED))
    for stop in (3, 10, 12, 13):
        streams = [open_stream(large, share=(host, before), **SHARED) for host in range(before)]
        for documents in streams:
            read(documents, GROWS[:stop])
        cursor = json.loads(json.dumps(stream.merge([documents.cursor() for documents in streams])))
        parts = [
            read(open_stream(large, cursor=cursor, share=(host, after), **SHARED), start=stop) for host in range(after)
        ]
        merged = [{key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in zip(*parts)]
        assert same(merged, batches[stop:])


def test_readers_share_an_epoch_without_overlap(large, tok, open_stream):
    for source, documents, begins in ((large[0], 3000, "big"), (large[1], 300, "zip")):
        lanes = open_stream([source["spec"]], **SHARED)
        texts_of, ended = [[] for _ in range(8)], False
        while not ended:
            for lane in lanes._lanes:
                reader = lane._readers[0]
                if reader.cursor()["epoch"] == 0 and (document := reader.next()):
                    texts_of[lane._readers[0]._index].append(document["text"])
            ended = all(lane._readers[0].cursor()["epoch"] for lane in lanes._lanes)
        firsts = [text.split()[0] for some in texts_of for text in some]
        assert min(map(len, texts_of)) > documents / 16
        assert sorted(firsts) == sorted(f"{begins}{i}" for i in range(documents))


def test_a_reader_whose_epoch_has_no_document_goes_on_to_the_next_also_after_a_resume(make, tmp_path, open_stream):
    """The other source must not take its share: the reader of a block changes with the epoch."""
    rows = [{"text": make.prose(20, i) if i % 9 == 5 else " " * 1500} for i in range(90)]
    sparse = make.write_jsonl(tmp_path / "sparse.jsonl", rows)
    full = make.write_jsonl(tmp_path / "full.jsonl", [{"text": make.prose(20, 500 + i)} for i in range(90)])
    batches, cursors = [], []
    documents = open_stream([sparse, full], **SHARED)
    assert documents.cursor()["readers"] == 8
    for step in range(8):
        cursors.append(json.dumps(documents.cursor()))
        batches.append(documents.next(16, 64, step))
    own, other = stream.summary(documents.cursor())
    assert abs(own["tokens"] / (own["tokens"] + other["tokens"]) - 0.5) < 0.05 and own["epochs"] > 1
    for stop in (1, 6):
        resumed = open_stream([sparse, full], cursor=json.loads(cursors[stop]), **SHARED)
        assert same([resumed.next(16, 64, step) for step in range(stop, 8)], batches[stop:])


def test_a_reader_goes_on_in_the_file_where_its_last_window_ended(large, monkeypatch, make):
    """A compressed file can only be read from its start, and a window is a small part of it."""
    monkeypatch.setattr(reader, "WINDOW", 1 << 10)
    read, starts = files.JsonFiles.rows, []
    count = lambda self, block, start=0: starts.append(start) or read(self, block, start)
    monkeypatch.setattr(files.JsonFiles, "rows", count)
    learnt = list(stream.texts([make.phase(large[1]["spec"], eval_fraction=0.0)], 1_000_000))
    assert len(learnt) == 300 and starts == [0]


def test_a_small_source_has_one_reader(corpus, open_stream):
    assert open_stream(corpus["many"], **SHARED).cursor()["readers"] == 1


def test_another_number_of_readers_is_refused(large, open_stream, make):
    cursor = open_stream(large, **SHARED).cursor()
    with pytest.raises(UsageError, match="began with readers=8 and the config now gives 4"):
        open_stream(large, cursor=cursor, readers=4, **SHARED)
    with pytest.raises(UsageError, match="began with readers=8 and the config now gives 4"):  # before config.json is
        stream.check_sources(cursor, make.phase(large, readers=4, **SHARED), None, chats=False)


def spent(tok, batches: list[stream.Batch], lanes: int) -> list[list[tuple[str, int]]]:
    """Return (first word, size) of each document that ends in the batches, for every lane."""
    documents = []
    for lane in range(lanes):
        parts = [np.split(batch["tokens"], lanes)[lane].ravel() for batch in batches]
        whole = np.concatenate(parts) if parts else np.zeros(0, int)
        *ended, _ = np.split(whole, np.flatnonzero(whole == tok.eos) + 1)
        documents.append([(tok.decode(ids).split()[0], len(ids)) for ids in ended])
    return documents


def test_the_summary_counts_what_the_batches_hold_of_each_source(corpus, large, tok, open_stream):
    """Documents that end in the batches, every token, and parts of epochs."""
    cases = [([corpus["few"], corpus["many"]], ("few", "many"), (5, 60), 1), ([large[1]["spec"]], ("zip",), (300,), 8)]
    for specs, names, sizes, lanes in cases:
        documents, batches = open_stream(specs, **SHARED), []
        for step in range(12):
            read_of, summary = spent(tok, batches, lanes), stream.summary(documents.cursor())
            assert sum(said["tokens"] for said in summary) == step * 16 * 128
            for name, size, said in zip(names, sizes, summary):
                own = [[n for word, n in lane if word.startswith(name)] for lane in read_of]
                ended = sum(map(len, own))
                assert said["documents"] == ended and 0 <= said["tokens"] - sum(map(sum, own)) < lanes * 300
                assert ended / size - 0.01 <= said["epochs"] <= (ended + lanes) / size + 0.01
            batches.append(documents.next(16, 128, step))


def test_shares_follow_their_schedule(large, tok, open_stream):
    batches = read(open_stream(large, **SHARED), [(16, 64)] * 30)

    def share(batches, name):
        names = [text[:3] for text in texts(tok, batches)]
        return names.count(name) / len(names)

    assert share(batches[:7], "txt") == 0 and share(batches[12:], "txt") > 0
    assert share(batches[:7], "big") > 2 * share(batches[14:], "big") > 0


@pytest.mark.parametrize("rows, readers", [(1, 1), (6, 6), (7, 7), (8, 8), (9, 3), (11, 1), (16, 8), (30, 6)])
def test_the_most_readers_that_divide_the_rows_are_chosen_up_to_eight(make, rows, readers):
    size = {"block": 16, "tokens_per_step": 16 * rows}
    assert stream.readers(make.phase("text:x", **size)) == readers
    assert stream.readers(make.phase("text:x", readers=rows, **size)) == rows


def test_readers_divide_the_rows_of_every_length(make):
    growth = {"auto_grow": True, "block": 16, "grow_plan": (16, 32, 64), "tokens_per_step": 16 * 24}
    assert stream.readers(make.phase("text:x", **growth)) == 6  # of 24, 12 and 6 rows


# ------------------------------------------------------------------------------------------------------------ the feed


def test_the_feed_gives_every_batch_with_the_cursor_after_it(large, open_stream):
    batches = read(open_stream(large, **SHARED))
    for stop in (1, 7, 12):
        cursor, got = None, []
        for start, end in ((0, stop), (stop, 20)):
            shape_at = lambda step: (*GROWS[step], step)
            documents = open_stream(large, cursor=cursor, **SHARED)
            place = lambda step, batch: batch
            with contextlib.closing(stream.Feed(documents, range(start, 20), shape_at, place)) as prepared:
                for batch, after in itertools.islice(iter(prepared.take, None), end - start):
                    got.append(batch)
                    cursor = after
        assert same(got, batches)


def test_the_feed_works_ahead_and_places_every_batch(large, open_stream):
    placed = []
    documents = open_stream(large, **SHARED)
    batches = stream.Feed(
        documents, range(20), lambda step: (16, 64, step), lambda step, batch: placed.append(step) or step
    )
    with contextlib.closing(batches):
        assert batches.take()[0] == 0
        deadline = time.monotonic() + 20
        while len(placed) <= stream.AHEAD and time.monotonic() < deadline:
            time.sleep(0.01)
        assert placed[: stream.AHEAD + 1] == [0, 1, 2]
        assert [step for step, _ in iter(batches.take, None)] == list(range(1, 20))


def test_a_mistake_in_the_data_reaches_the_reader_of_the_batch(make, tmp_path, open_stream):
    rows = [{"text": make.prose(40, i)} for i in range(9)] + [{"texts": 0}]
    documents = open_stream(make.write_jsonl(tmp_path / "a.jsonl", rows), max_skipped=0)
    with pytest.raises(UsageError, match="a.jsonl, record 10"):
        list(iter(stream.Feed(documents, range(50), lambda step: (1, 64, step), lambda step, batch: batch).take, None))


def test_a_read_that_hangs_can_be_left(monkeypatch):
    monkeypatch.setattr(stream, "SIGNAL_POLL_SECONDS", 0.01)
    over = threading.Event()
    hanging = types.SimpleNamespace(next=lambda *_: over.wait(60), cursor=dict, close=lambda: None)
    batches = stream.Feed(hanging, range(9), lambda step: (), lambda step, batch: batch)
    with pytest.raises(Interrupted):
        batches.take(lambda: True)
    started = time.monotonic()
    batches.close()
    assert time.monotonic() - started < 5
    over.set()


def test_nothing_is_read_after_an_error():
    read = []

    def fail(step: int) -> None:
        read.append(step)
        raise OSError("the disk is away")

    broken = types.SimpleNamespace(next=fail, cursor=dict, close=lambda: None)
    batches = stream.Feed(broken, range(9), lambda step: (step,), lambda step, batch: batch)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is away"):
            batches.take()
    batches.close()
    assert read == [0]


# ----------------------------------------------------------------------------------------- seeds, mixing, the split


def test_the_seed_alone_decides_the_order(corpus, open_stream):
    first, again, other = (take(open_stream(corpus["many"], seed=seed), [(4, 32)] * 5) for seed in (7, 7, 8))
    assert same(first, again) and not same(first, other)


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.2, 1.8)])
def test_the_shares_of_the_tokens_approach_the_weights(corpus, tok, open_stream, weights):
    sources = [{"spec": corpus[name], "weight": weight} for name, weight in zip(("few", "many"), weights)]
    tokens = joined(take(open_stream(sources), [(4, 64)] * 30), "tokens")
    documents = np.split(tokens, np.flatnonzero(tokens == tok.bos))[1:-1]
    from_few = sum(len(ids) for ids in documents if tok.decode(ids).startswith("few"))
    from_many = sum(len(ids) for ids in documents if tok.decode(ids).startswith("many"))
    assert from_few + from_many == sum(map(len, documents))
    assert abs(from_few / (from_few + from_many) - weights[0] / sum(weights)) < 0.03


def test_every_source_appears_early(corpus, tok, open_stream):
    sources = [{"spec": corpus["few"], "weight": 1.0}, {"spec": corpus["many"], "weight": 1.0}]
    text = tok.decode(open_stream(sources).next(4, 64)["tokens"].ravel())
    assert "few" in text and "many" in text


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_held_out_documents_are_never_trained_on(corpus, tok, open_stream, fraction):
    held_out, trained = (
        texts(tok, take(open_stream(corpus["many"], held_out=part, eval_fraction=fraction), shapes))
        for part, shapes in ((True, [(1, 1)] * 9999), (False, [(1, 8000)]))
    )
    everything = {row["text"] for row in corpus["rows"]["many"]}
    assert abs(len(held_out) - 60 * fraction) <= 2
    assert set(trained[:-1]) == everything - set(held_out)  # the last one is cut


def test_the_held_out_part_of_every_source_is_read(corpus, tok, open_stream):
    sources = [corpus["few"], corpus["many"]]
    read = texts(tok, take(open_stream(sources, held_out=True, eval_fraction=0.2), [(1, 1)] * 9999))
    counts = collections.Counter(text[:3] for text in read)
    assert set(counts) == {"few", "man"} and counts["few"] == 1 and abs(counts["man"] - 12) <= 2


def test_the_only_row_of_a_source_is_trained_and_of_two_the_first_is_held_out(make, tok, open_stream, tmp_path):
    rows = [{"text": f"row {i} ba ce di"} for i in range(2)]
    for count, held_out, trained in ((1, set(), {0}), (2, {0}, {1})):
        source = make.write_jsonl(tmp_path / f"{count}.jsonl", rows[:count])
        for is_held_out, expected in ((True, held_out), (False, trained)):
            batches = take(open_stream(source, held_out=is_held_out, eval_fraction=0.5), [(1, 1)] * 40)
            assert {int(text.split()[1]) for text in texts(tok, batches) if text.startswith("row ")} == expected


def test_a_source_with_nothing_held_out_has_an_empty_held_out_stream(corpus, open_stream):
    documents = open_stream(corpus["few"], held_out=True, eval_fraction=0.0)
    assert documents.next(1, 1) is None
    assert open_stream(corpus["chats"], held_out=True, chats=True).next(1, 1) is None


# ----------------------------------------------------------------------------------------------------- conversations


def packed(batches: list[stream.Batch]) -> list[tuple[list[int], list[int], list[float]]]:
    """(tokens, targets, weights) of every segment of every row."""
    all_segments = []
    for batch in batches:
        for row in range(len(batch["segments"])):
            segments = batch["segments"][row]
            for segment in range(1, segments.max() + 1):
                place = np.flatnonzero(segments == segment)
                assert np.array_equal(place, np.arange(place[0], place[-1] + 1)), "a segment is one stretch"
                all_segments.append(tuple(batch[key][row, place].tolist() for key in ("tokens", "targets", "weights")))
    return all_segments


def as_packed(tok, messages: list[dict], length: int) -> tuple[list[int], list[int], list[float]]:
    ids, said = chat.encode(tok, messages)
    ids = [tok.bos, *ids, tok.eos]
    weights = [float(w) for w in [*said, False]]
    return ids[:-1][:length], ids[1:][:length], weights[:length]


@pytest.mark.parametrize("shape", [(1, 300), (3, 120), (8, 64), (2, 40)])
def test_every_conversation_is_one_segment_and_cut_only_if_longer_than_a_row(corpus, tok, open_stream, shape):
    """Every conversation from which something can be learnt comes once per epoch."""
    expected = [as_packed(tok, row["messages"], shape[1]) for row in corpus["rows"]["chats"]]
    expected = [str(packed) for packed in expected if any(packed[2])]
    documents = open_stream(corpus["chats"], chats=True)
    seen = collections.Counter(str(segment) for segment in packed(take(documents, [shape] * 60)))
    assert set(seen) == set(expected) and sum(seen.values()) > 60
    epochs = -(-WINDOW_ROWS * shape[1] // sum(len(eval(e)[0]) for e in expected)) + 1  # that a window may lie in
    assert max(seen.values()) - min(seen.values()) <= epochs


def test_padding_has_no_weight_and_no_segment_and_ends_its_row(corpus, open_stream):
    batches = take(open_stream(corpus["chats"], chats=True), [(3, 100)] * 10)
    assert any((batch["segments"] == 0).any() for batch in batches)
    for batch in batches:
        padding = batch["segments"] == 0
        assert not batch["weights"][padding].any() and not batch["tokens"][padding].any()
        assert (np.diff(padding.astype(int)) >= 0).all()


def test_rows_are_packed_tightly(make, tok, tmp_path, open_stream):
    rows = [{"messages": make.chat(2 * (1 + i % 4), i)} for i in range(400)]
    longest = max(len(as_packed(tok, row["messages"], 9999)[0]) for row in rows)
    documents = open_stream(make.write_jsonl(tmp_path / "a.jsonl", rows), chats=True)
    batches = take(documents, [(8, 3 * longest)] * 8)
    assert np.mean([(batch["segments"] > 0).mean() for batch in batches]) > 0.95


def test_a_short_conversation_fills_the_fullest_row_that_has_room(make, tok, tmp_path, open_stream):
    """The short one just fits beside the two middle ones; beside the long one it would leave room."""
    middle, long, short = ([{"role": "assistant", "content": make.prose(words)}] for words in (20, 30, 2))
    held_out = [{"messages": messages} for messages in (short, middle, long, middle)]  # every second row is
    rows = [row for pair in zip(held_out, held_out) for row in pair]
    source = make.write_jsonl(tmp_path / "a.jsonl", rows)
    n_middle, n_long, n_short = (len(as_packed(tok, messages, 9999)[0]) for messages in (middle, long, short))
    length = 2 * n_middle + n_short
    assert n_short < length - n_long < n_middle
    batch = open_stream(source, chats=True, held_out=True, eval_fraction=0.5).next(2, length)
    sizes = [[int((segments == i).sum()) for i in range(1, segments.max() + 1)] for segments in batch["segments"]]
    assert sorted(sizes) == sorted([[n_long], [n_middle, n_middle, n_short]])


def test_the_rest_of_the_held_out_conversations_is_a_batch_too(corpus, open_stream):
    batches = take(open_stream(corpus["chats"], chats=True, held_out=True, eval_fraction=0.5), [(2, 100)] * 100)
    assert 1 < len(batches) < 100 and len(packed(batches)) in (14, 15, 16)


def talk(user: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def picky(tok) -> tokenizer.Tokenizer:
    """A tokenizer whose template refuses a conversation that begins with `no`."""
    refusing = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('no') }}{% endif %}" + tokenizer.CHATML
    return tokenizer.SentencePiece(tok.model, refusing)


def test_keys_that_nothing_is_trained_from_are_told_once_per_source(make, tok, tmp_path):
    rows = [talk("ba", "ce") | {"id": i, "tools": []} for i in range(40)]
    rows[7]["messages"][1]["score"], rows[9]["messages"][0]["role"] = 1, "narrator"
    notes, source = [], make.write_jsonl(tmp_path / "a.jsonl", rows)
    phase = make.phase([source, {"spec": source, "weight": 1}], eval_fraction=0.1)
    note = lambda event, **facts: notes.append((event, facts["source"], facts["keys"]))
    take(stream.open_held_out(phase, tok, 0, True, note), [(2, 60)] * 9)
    assert not notes, "the training part tells"
    take(stream.open_phase(phase, tok, 0, True, note=note), [(8, 60)] * 20)
    keys = [key for event, name, keys in notes for key in keys.split(", ") if (event, name) == ("unused", source)]
    assert sorted(keys) == sorted(["id", "a turn's score", "the role 'narrator'"] * 2)


def test_conversations_that_are_cut_unanswered_refused_or_skipped_are_counted(make, tok, picky, tmp_path):
    whole, cut, unanswered, refused = (
        talk("ba", "ce"),
        talk("ba", make.prose(60)),
        talk(make.prose(60), "ce"),
        talk("no", "ce"),
    )
    held_out = [whole] * 5 + [cut] * 4 + [unanswered] * 3 + [refused] * 2 + [{"texts": "ba"}]
    rows = [row for pair in zip(held_out, held_out) for row in pair]  # every second row is held out
    phase = make.phase(make.write_jsonl(tmp_path / "a.jsonl", rows), eval_fraction=0.5, max_skipped=3)
    documents = stream.open_held_out(phase, picky, 0, True)
    size = lambda row: len(chat.encode(tok, row["messages"])[0]) + 2
    length = size(whole) - 1  # which just takes it: the last token is only a target
    while documents.next(2, length) is not None:
        pass
    (counts_read,) = stream.summary(documents.cursor())
    assert counts_read["tokens"] == (5 + 4) * length and counts_read["epochs"] > 0.9
    counts = {"documents": 9, "cut": 4, "unanswered": 3, "refused": 2, "skipped": 1, "empty": 0}
    assert {key: counts_read[key] for key in counts} == counts


def test_the_limit_remembers_after_a_resume_which_conversations_the_template_refused(make, picky, tmp_path):
    rows = [talk("ba", "ce")] * 8 + [talk("no", "ce")] * 8
    phase = make.phase(make.write_jsonl(tmp_path / "a.jsonl", rows), max_skipped=3)
    too_many = pytest.raises(UsageError, match="; 4 such records, and max_skipped=3$")
    documents, cursors = stream.open_phase(phase, picky, 0, False), []
    with too_many:
        for _ in range(99):
            cursors.append(json.dumps(documents.cursor()))
            documents.next(1, 8)
    assert stream.summary(json.loads(cursors[-1]))[0]["refused"] > 0
    for k, cursor in enumerate(cursors):  # each fails at the same batch
        resumed = stream.open_phase(phase, picky, 0, False, (json.loads(cursor), ""))
        assert len(take(resumed, [(1, 8)] * (len(cursors) - 1 - k))) == len(cursors) - 1 - k
        with too_many:
            resumed.next(1, 8)


def test_documents_without_text_are_counted(corpus, read_once):
    documents = read_once(corpus["gaps"])
    take(documents, [(1, 1)] * 9999)
    blank = sum(not row["text"].strip() for row in corpus["rows"]["gaps"])
    assert stream.summary(documents.cursor())[0]["empty"] == blank == 13


def test_trained_text_is_shown_between_marks(make, tok, tmp_path, open_stream):
    rows = [{"messages": [{"role": "user", "content": "ba ce"}, {"role": "assistant", "content": "di fo"}]}]
    batch = open_stream(make.write_jsonl(tmp_path / "a.jsonl", rows), chats=True).next(1, 60)
    one = "<|im_start|>user\nba ce<|im_end|>\n<|im_start|>assistant\n[[di fo<|im_end|>]]\n</s>"
    count = 60 // (len(chat.encode(tok, rows[0]["messages"])[0]) + 1)
    assert count > 1 and packing.show(batch, tok, ("[[", "]]"), 60) == "<s>" + count * one


def test_only_answers_carry_weight_in_sft_and_everything_in_pretraining(corpus, tok, open_stream):
    sft = open_stream(corpus["chats"], chats=True).next(4, 200)
    learnt = tok.decode(sft["targets"][sft["weights"] > 0])
    assert "user" not in learnt and "assistant" not in learnt and 0 < sft["weights"].mean() < 0.7
    pretraining = open_stream(corpus["chats"], chats=False).next(4, 200)
    assert np.array_equal(pretraining["weights"] == 0, pretraining["targets"] == tok.bos)


def test_sft_on_text_is_refused_by_the_name_of_its_source(corpus, open_stream):
    with pytest.raises(UsageError, match="few.jsonl: a record has no messages, so SFT has no assistant turn"):
        open_stream(corpus["few"], chats=True).next(1, 64)


# -------------------------------------------------------------------------------- before training: check and texts


@pytest.mark.parametrize("max_skipped", [0, 3])
def test_more_mistakes_than_may_be_skipped_are_found_before_training(make, tok, tmp_path, corpus, max_skipped):
    text, talk = {"text": "ba"}, {"messages": make.chat(2)}
    for rows, chats in (([text, {"texts": "ce"}], False), ([talk, text], True)):
        source = make.write_jsonl(tmp_path / "a.jsonl", [rows[0]] + [rows[1]] * (max_skipped + 1))
        phase = make.phase([corpus["chats"], source], max_skipped=max_skipped)
        with pytest.raises(UsageError, match="a.jsonl"):
            stream.check(phase, tok, chats)
        source = make.write_jsonl(tmp_path / "b.jsonl", [rows[0]] + [rows[1]] * max_skipped)
        facts = stream.check(make.phase([corpus["chats"], source], max_skipped=max_skipped), tok, chats)
        assert list(facts) == [corpus["chats"], source] and len(set(facts.values())) == 2  # to compare processes by


def test_skipped_records_are_reported_counted_and_the_same_after_a_resume(make, tok, tmp_path):
    rows = [{"text": make.prose(12, i)} if i % 10 else {"texts": i} for i in range(100)]
    phase = make.phase(make.write_jsonl(tmp_path / "a.jsonl", rows), max_skipped=10)
    notes = []
    note = lambda event, **facts: notes.append((event, facts["where"], facts["reason"]))
    documents = stream.open_phase(phase, tok, 0, False, note=note)
    batches = take(documents, [(8, 50)] * 20)
    (read,) = stream.summary(documents.cursor())
    assert read["skipped"] == 10 and read["epochs"] > 1
    assert len(notes) == len(set(notes)) == 10 and {event for event, *_ in notes} == {"skip"}
    assert all("a.jsonl, byte" in where and "texts" in reason for _, where, reason in notes)
    for stop in (0, 1, 8):
        documents = stream.open_phase(phase, tok, 0, False)
        take(documents, [(8, 50)] * stop)
        documents = stream.open_phase(phase, tok, 0, False, (documents.cursor(), ""))
        assert same(take(documents, [(8, 50)] * (20 - stop)), batches[stop:])
        assert stream.summary(documents.cursor())[0]["skipped"] == 10


def test_a_passing_error_is_retried_and_reported_and_no_record_counts_twice(make, tok, tmp_path, monkeypatch):
    monkeypatch.setattr(reader.storage, "PAUSES", (0, 0, 0, 0, 0))
    rows = [{"texts": i} if i in (0, 1, 5) else {"text": "ba ce"} for i in range(20)]
    source = make.write_jsonl(tmp_path / "a.jsonl", rows)
    phase, notes, failing = make.phase(source, readers=1, max_skipped=3), [], [3]
    expected = stream.open_phase(phase, tok, 0, False).next(2, 40)
    read = files.JsonFiles.rows

    def flaky(self, block, start=0):
        yield from itertools.islice(read(self, block, start), 2)
        if failing[0]:
            failing[0] -= 1
            raise OSError("the disk is away")
        yield from read(self, block, start + 2)

    note = lambda event, **facts: notes.append((event, facts["where"] if event == "skip" else facts["reason"]))
    documents = stream.open_phase(phase, tok, 0, False, note=note)
    broken = stream.open_phase(phase, tok, 0, False)
    monkeypatch.setattr(files.JsonFiles, "rows", flaky)
    assert same([documents.next(2, 40)], [expected])
    assert stream.summary(documents.cursor())[0]["skipped"] == 3
    *first, last = [f"{tmp_path}/a.jsonl, byte {sum(len(json.dumps(row)) + 1 for row in rows[:i])}" for i in (0, 1, 5)]
    skips, retries = [("skip", where) for where in first], [("retry", "the disk is away")] * 3
    assert notes == [*skips, *retries, ("skip", last)]
    failing[0] = 99
    with pytest.raises(OSError, match="source json:.*the disk is away .tried 6 times"):
        broken.next(2, 40)


def test_records_without_any_text_are_refused_before_training(make, tok, tmp_path):
    source = make.write_jsonl(tmp_path / "a.jsonl", [{"text": " "}, {"text": "\n"}, {"text": ""}])
    with pytest.raises(UsageError, match=f"^source {source}: there is no text in it$"):
        stream.check(make.phase(source), tok, chats=False)


def test_a_tokenizer_learns_from_the_training_parts_of_all_phases_only(make, tok, corpus, open_stream):
    phases = [make.phase(corpus[name], eval_fraction=0.2) for name in ("many", "chats")]
    learnt = set(stream.texts(phases, 1_000_000))
    held_out = set(texts(tok, take(open_stream(corpus["many"], held_out=True, eval_fraction=0.2), [(1, 1)] * 9999)))
    said = {"\n".join(m["content"] for m in row["messages"]) for row in corpus["rows"]["chats"]}
    assert learnt & held_out == set() and held_out and 22 <= len(learnt & said) <= 26
    assert learnt - said == {row["text"] for row in corpus["rows"]["many"]} - held_out


def test_a_tokenizer_learns_from_no_more_text_than_the_limit(make, corpus):
    phases = [make.phase([corpus["many"], corpus["few"]]), make.phase(corpus["chats"])]
    learnt = list(stream.texts(phases, 800))
    sizes = [sum(len(text) for text in learnt if name in text) for name in ("many", "few")]
    sizes.append(sum(map(len, learnt)) - sum(sizes))
    longest = max(map(len, learnt))
    for size, share in zip(sizes, (200, 200, 400)):
        assert share <= size <= share + longest
