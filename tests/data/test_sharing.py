"""Readers share the records of a source, however few or long, keep the tokens' shares, and count what is trained."""

import collections
import itertools
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lowrank_jax.config import UsageError
from lowrank_jax.data import stream, tokenizer
from lowrank_jax.data.blocks import BadRecord
from lowrank_jax.data.packing import Lane
from lowrank_jax.data.reader import Limit, Part, Reader, Share
from lowrank_jax.training import phase, run_folder

TRAINING = Part(period=0, held_out=False, shuffled=True, endless=True)


class Blocks:
    """A source in memory: blocks of records, which are documents, None (no text) or errors."""

    fingerprint = "blocks"

    def __init__(self, *contents: list):
        self._contents, self.blocks = contents, len(contents)

    def rows(self, block: int, start: int = 0):
        return ((block, row, value) for row, value in list(enumerate(self._contents[block]))[start:])

    def document(self, row: tuple) -> dict:
        if isinstance(row[2], str):
            raise BadRecord(self.place(row), row[2])
        return {"text": ""} if row[2] is None else row[2]

    def place(self, row: tuple) -> str:
        return f"block {row[0]}, row {row[1]}"


def words(count: int, start: int = 0) -> list[dict]:
    return [{"text": f"document {start + i}"} for i in range(count)]


def numbered(sizes: list[int], good: set[int] | None = None) -> Blocks:
    """A source with so many records in each block; those that are not `good` have no text."""
    counter = itertools.count()
    number = lambda: next(counter)
    contents = [
        [{"text": str(k)} if good is None or k in good else None for k in (number() for _ in range(n))] for n in sizes
    ]
    return Blocks(*contents)


def readers(source, count: int, by_blocks: bool, part: Part = TRAINING) -> list[Reader]:
    limit = Limit("memory", 1000)
    return [Reader(source, part, limit, False, 0, Share(i, count, by_blocks)) for i in range(count)]


def of_epoch(reader: Reader, epochs: int) -> list[list[str]]:
    """The texts that a reader gives in each of its first epochs."""
    read = [[] for _ in range(epochs)]
    while (document := reader.next()) is not None and reader.cursor()["epoch"] <= epochs:
        epoch = reader._start["epoch"]
        if epoch >= epochs:
            break
        read[epoch].append(document["text"])
    return read


SOURCES = st.lists(st.integers(0, 5), min_size=1, max_size=30).filter(lambda sizes: sum(sizes) > 0)


@settings(max_examples=30, deadline=None)
@given(SOURCES, st.integers(1, 8), st.booleans(), st.integers(0, 9))
@example([1], 8, False, 0)
@example([1, 0, 0, 1, 0, 1], 8, False, 0)
@example([0] * 12 + [1], 8, True, 0)
@example([7] * 10, 8, False, 0)
def test_every_record_of_an_epoch_comes_once_over_all_readers(sizes, count, by_blocks, period):
    source = numbered(sizes)
    places = [(block, row) for block, n in enumerate(sizes) for row in range(n)]
    expected = sorted(str(k) for k, (block, row) in enumerate(places) if not period or (block + row) % period)
    if expected:
        part = TRAINING._replace(period=period)
        by_reader = [of_epoch(reader, 3) for reader in readers(source, count, by_blocks, part)]
        for epoch in range(3):
            assert sorted(text for read in by_reader for text in read[epoch]) == expected


@settings(max_examples=12, deadline=None)
@given(SOURCES, st.integers(2, 8))
def test_records_in_turn_are_equal_shares_and_every_reader_sees_all_of_them(sizes, count):
    """The order of blocks differs in every epoch, the order within a block does not."""
    by_reader = [of_epoch(reader, count) for reader in readers(numbered(sizes), count, by_blocks=False)]
    for epoch in range(count):
        shares = [len(read[epoch]) for read in by_reader]
        assert max(shares) - min(shares) <= 1
    for reader in readers(numbered([sum(sizes)]), count, by_blocks=False):
        assert len(set(itertools.chain(*of_epoch(reader, count)))) == sum(sizes)


@settings(max_examples=20, deadline=None)
@given(SOURCES, st.integers(1, 8), st.booleans(), st.integers(0, 40))
def test_a_reader_resumes_at_any_document(sizes, count, by_blocks, stop):
    source = numbered(sizes)
    for index in (0, count - 1):
        arguments = (source, TRAINING, Limit("", 0), False, 0, Share(index, count, by_blocks))
        reader = Reader(*arguments)
        for _ in range(stop):
            reader.next()
        again = Reader(*arguments, json.loads(json.dumps(reader.cursor())))
        assert again.epochs() == reader.epochs()
        assert [again.next() for _ in range(9)] == [reader.next() for _ in range(9)]


@pytest.mark.parametrize("by_blocks", [False, True])
@pytest.mark.parametrize("good", [{3}, {0, 39}, set()])
def test_a_source_is_given_up_only_if_no_record_of_it_is_of_use(by_blocks, good):
    for reader in readers(numbered([1] * 40, good), 3, by_blocks):
        seen = {reader.next()["text"] for _ in range(8)} if good else {reader.next()}
        assert seen == ({str(k) for k in good} or {None}) and reader.exhausted == (not good)


# ------------------------------------------------------------------------------------------------------------- shares


def tokens(size: int, start: int) -> dict:
    """A document of tokens that no other has: BOS (1), numbers from `start`, EOS (2)."""
    ids = np.arange(start, start + size, dtype=np.int32)
    ids[0], ids[-1] = 1, 2
    return {"ids": ids, "said": np.arange(size) > 0}


def lane_of(sizes: tuple[int, ...], weights: tuple[float, ...], piece: int, cursor=None, records: int = 5) -> Lane:
    """A lane over one source for each size of document."""
    contents = [[[tokens(n, 10 + i * 10**8 + k * n)] for k in range(records)] for i, n in enumerate(sizes)]
    part = TRAINING._replace(shuffled=False)  # to shuffle few blocks takes 0.2 s an epoch
    places = cursor["readers"] if cursor else [None] * len(sizes)
    own = [Reader(Blocks(*c), part, Limit("", 0), False, i, cursor=p) for i, (c, p) in enumerate(zip(contents, places))]
    return Lane(own, None, False, lambda step: weights, cursor, "", piece)


@settings(max_examples=10, deadline=None)
@given(st.integers(100, 120_000), st.integers(60, 3_000), st.sampled_from([0.5, 0.3, 0.9]))
@example(100_000, 60, 0.5)
@example(6_100, 60, 0.5)
@example(12_000, 3_000, 0.1)
def test_each_lane_holds_the_shares_within_a_percent_at_any_length_of_records(long, short, share):
    """150 steps of 32,768 tokens over 8 lanes."""
    lane = lane_of((long, short), (share, 1 - share), piece=4096)
    for step in range(150):
        lane.next(8, 512, step)
    trained = lane.cursor()["trained"]["tokens"]
    assert sum(trained) == 150 * 4096 and abs(trained[0] / sum(trained) - share) < 0.01


def test_a_document_in_pieces_trains_each_of_its_tokens_once_and_resumes_exactly(tok):
    lane, batches, cursors = lane_of((9_000, 60), (0.5, 0.5), piece=512), [], []
    for step in range(60):
        cursors.append(json.dumps(lane.cursor()))
        batches.append(lane.next(2, 256, step))
    joined = {key: np.concatenate([batch[key].ravel() for batch in batches]) for key in batches[0]}
    values, counts = np.unique(joined["targets"][joined["weights"] > 0], return_counts=True)
    assert set(counts[(values > 9) & (values < 10**8)]) == {1}
    assert set(range(11, 10 + 8_999)) < set(values.tolist()), "the first document is whole"
    assert sum(lane.cursor()["trained"]["documents"]) == (joined["tokens"] == 2).sum(), "each counts once, at its EOS"
    own = (joined["tokens"] > 9) & (joined["targets"] > 9) & (joined["weights"] > 0)
    assert (joined["targets"][own] == joined["tokens"][own] + 1).all(), "no token is learnt from another document"
    for stop in range(0, 60, 7):
        again = lane_of((9_000, 60), (0.5, 0.5), piece=512, cursor=json.loads(cursors[stop]))
        assert json.dumps(again.cursor()) == cursors[stop]
        for step, batch in enumerate(batches[stop:], stop):
            assert all(np.array_equal(array, batch[key]) for key, array in again.next(2, 256, step).items())


def test_a_long_document_without_another_source_stays_whole():
    lane = lane_of((9_000,), (1.0,), piece=512)
    assert lane.next(1, 8_000, 0)["segments"].max() == 1


@pytest.fixture(scope="module")
def books(make, tmp_path_factory):
    """`books(n)`: a source of n records that are longer than its blocks."""
    folder = tmp_path_factory.mktemp("books")
    return lambda n: make.write_jsonl(
        folder / f"{n}.jsonl", [{"text": f"b{i} " + make.prose(1500, i)} for i in range(n)]
    )


@pytest.mark.parametrize("count, lanes", [(1, 1), (3, 1), (20, 1), (70, 8)])
def test_few_long_records_are_all_trained_in_turn_beside_another_source(make, tok, tmp_path, books, count, lanes):
    web = make.write_jsonl(tmp_path / "web.jsonl", [{"text": f"w{i} " + make.prose(9, i)} for i in range(500)])
    p = make.phase([books(count), web], tokens_per_step=16_384, block=256)
    documents = stream.open_phase(p, tok, 0, False)
    batches = [documents.next(64, 256, step) for step in range(12)]
    own, other = stream.summary(documents.cursor())
    assert documents.cursor()["readers"] == lanes and own["tokens"] + other["tokens"] == 12 * 16_384
    assert abs(own["tokens"] / (12 * 16_384) - 0.5) < 0.75 / 12
    ids = np.concatenate([np.split(batch["tokens"], lanes)[lane].ravel() for lane in range(lanes) for batch in batches])
    starts = [tok.decode(ids[k : k + 9]) for k in np.flatnonzero(ids == tok.bos)]
    seen = collections.Counter(text.split()[0] for text in starts if text.startswith("b"))
    assert max(seen.values()) - min(seen.values()) <= 1 + (lanes > 1) and (len(seen) == count or own["epochs"] < 1)


def test_records_that_all_lie_where_rows_are_held_out_are_trained_on(make, tok, tmp_path):
    """Four records of equal length begin in blocks 0, 50, 100 and 150, and every 50th row is held out."""
    rows = [{"text": f"{i}" * 200_000} for i in range(4)]
    p = make.phase(make.write_jsonl(tmp_path / "a.jsonl", rows), eval_fraction=0.02)
    assert stream.open_held_out(p, tok, 0, False).next(1, 1) is None
    assert stream.open_phase(p, tok, 0, False).next(1, 64) is not None


def test_a_source_without_a_record_to_train_on_ends_the_run_by_its_name(make, tok, tmp_path):
    """Its only text is held out: the other source must not take its share in silence."""
    lonely = make.write_jsonl(tmp_path / "lonely.jsonl", [{"text": "ba"}, {"text": " "}])
    web = make.write_jsonl(tmp_path / "web.jsonl", [{"text": f"w{i}"} for i in range(9)])
    documents = stream.open_phase(make.phase([web, lonely], eval_fraction=0.5), tok, 0, False)
    with pytest.raises(UsageError, match="^source .*lonely.jsonl: a whole epoch has no document to train on$"):
        documents.next(1, 64)


# ------------------------------------------------------------------------------------------------- what was trained


def talk(user: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}


def test_a_short_sft_counts_the_conversations_in_its_batches_and_parts_of_an_epoch(make, tok, tmp_path):
    rows = [talk(f"ba {i}", "ce") for i in range(60)] + [{"messages": []}, {"messages": None}]
    documents = stream.open_phase(make.phase(make.write_jsonl(tmp_path / "a.jsonl", rows)), tok, 0, True)
    batches = [documents.next(2, 100, step) for step in range(2)]
    (read,) = stream.summary(documents.cursor())
    assert read["documents"] == sum(batch["segments"].max(1).sum() for batch in batches)
    assert read["tokens"] == sum((batch["segments"] > 0).sum() for batch in batches)
    assert read["epochs"] == round(read["documents"] / 60, 3) and 0 < read["epochs"] < 1
    counted = f"{read['documents']} documents, {read['tokens']} tokens, {read['epochs']} epochs, 2 skipped"
    assert stream.describe(read).endswith(counted), "of a window that is not used up"


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_conversations_are_mixed_by_their_tokens_in_the_rows(make, tok, tmp_path, share):
    """A long conversation is cut to a row, and one that answers too late is not trained at all."""
    long = [talk("ba", make.prose(900, i)) if i % 3 else talk(make.prose(80, i), "ce") for i in range(40)]
    short = [talk("ba", make.prose(4, i)) for i in range(40)]
    specs = [make.write_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in (("long", long), ("short", short))]
    sources = f"{specs[0]}@{share}, {specs[1]}@{1 - share}"
    documents = stream.open_phase(make.phase(sources), tok, 0, True)
    for step in range(60):
        documents.next(8, 128, step)
    own, other = stream.summary(documents.cursor())
    assert own["cut"] == own["documents"] > 0 and 10 <= own["unanswered"] <= 14
    assert abs(own["tokens"] / (own["tokens"] + other["tokens"]) - share) < 0.03


def without(cursor: dict, *keys: str) -> dict:
    """A cursor as older versions wrote it."""
    drop = lambda lane: {k: v for k, v in lane.items() if k not in keys}
    lanes = {name: drop(lane) | {"cut": [0]} for name, lane in cursor["lanes"].items()}
    for lane in lanes.values():
        lane["readers"] = [{k: v for k, v in r.items() if k not in keys} for r in lane["readers"]]
    return cursor | {"lanes": lanes}


def test_a_cursor_of_an_older_version_goes_on_with_the_order_of_that_version(make, tok, tmp_path, books):
    """Also one with 8 readers of a source that is too small for so many, and through a second resume."""
    p = make.phase(books(20), tokens_per_step=4096, block=64, readers=8)
    lanes = {}
    for i in range(8):
        place = {"epoch": 0, "block": i, "row": 0, "taken": 0, "skipped": 0, "empty": 0, "met": [0, 0]}
        counts = {key: [0] for key in ("documents", "tokens", "cut", "unanswered", "refused")}
        facts = {"readers": [place], "credit": [0.0], "step": 0, "offset": 0, "packed": [], "drawn": None, "sha256": ""}
        lanes[str(i)] = counts | facts
    new = stream.open_phase(p, tok, 0, False).cursor()
    old = {key: new[key] for key in ("sources", "fingerprints")} | {"readers": 8, "lanes": lanes}
    first = stream.open_phase(p, tok, 0, False, (old, ""))
    batches = [first.next(64, 64, step) for step in range(8)]
    assert all(reader._by_blocks for lane in first._lanes for reader in lane._readers)
    second = stream.open_phase(p, tok, 0, False, (old, ""))
    for step in range(4):
        second.next(64, 64, step)
    third = stream.open_phase(p, tok, 0, False, (json.loads(json.dumps(second.cursor())), ""))
    for step in range(4, 8):
        assert np.array_equal(third.next(64, 64, step)["tokens"], batches[step]["tokens"])
    assert third.cursor() == first.cursor() and stream.summary(old)[0]["documents"] == 0


# ------------------------------------------------------------------------------------------------- refused records


@pytest.fixture(scope="module")
def strict(tok) -> tokenizer.Tokenizer:
    """A tokenizer whose template takes no system turn."""
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    return tokenizer.SentencePiece(tok.model, refusing + tokenizer.CHATML)


@pytest.mark.parametrize("blocks", [1, 30])
def test_a_refused_conversation_is_skipped_counted_and_named_once(make, strict, tmp_path, blocks):
    """It comes first, the stream reads it in every epoch, and a resume reads its window again."""
    system = {"messages": [{"role": "system", "content": "ba"}, *talk("ba", "ce")["messages"]]}
    rows = [system, *(talk("ba", make.prose(blocks * 4, i)) for i in range(30))]
    p = make.phase(make.write_jsonl(tmp_path / "a.jsonl", rows), max_skipped=1)
    stream.check(p, strict, True)
    folder = tmp_path / "run"
    folder.mkdir()
    note = phase.note_to(str(folder), lambda: 0)
    documents = stream.open_phase(p, strict, 0, True, note=note)
    for step in range(12):
        documents.next(4, 256, step)
    again = stream.open_phase(p, strict, 0, True, (documents.cursor(), ""), note=phase.note_to(str(folder), lambda: 0))
    for step in range(12, 40):
        again.next(4, 256, step)
    (read,) = stream.summary(again.cursor())
    assert read["refused"] == 1 and read["epochs"] > 2
    (event,) = run_folder.read_rows(str(folder), "events.jsonl")
    assert event["event"] == "skip" and event["where"] == f"{tmp_path}/a.jsonl, record 1"
    assert "no system turn" in event["reason"]


def test_a_source_that_the_template_refuses_whole_is_named_before_training_and_ends_a_stream(make, strict, tmp_path):
    rows = [{"messages": [{"role": "system", "content": f"{i}"}, *talk("ba", "ce")["messages"]]} for i in range(9)]
    p = make.phase(make.write_jsonl(tmp_path / "a.jsonl", rows), max_skipped=100)
    with pytest.raises(
        UsageError, match="there is no text in it; the last unusable record: .*a.jsonl, record 9: .*system"
    ):
        stream.check(p, strict, True)
    with pytest.raises(
        UsageError, match="a whole epoch has no document to train on; the last unusable record: .*system"
    ):
        stream.open_phase(p, strict, 0, True).next(1, 64)


def test_a_source_that_gives_fewer_documents_than_were_read_is_named(make, tok, tmp_path):
    spec = make.write_jsonl(tmp_path / "a.jsonl", [{"text": make.prose(9, i)} for i in range(60)])
    documents = stream.open_phase(make.phase(spec), tok, 0, False)
    documents.next(8, 64, 0)
    other = make.phase([{"spec": spec, "text_key": "body"}], max_skipped=60)
    with pytest.raises(UsageError, match=f"source {spec} has fewer documents at its place than were read before"):
        stream.open_phase(other, tok, 0, False, (documents.cursor(), "")).next(8, 64, 1)
