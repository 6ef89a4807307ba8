"""The token stream: nothing lost, nothing repeated, nothing learnt across documents, and every cursor exact."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lowrank_jax.config import UsageError
from lowrank_jax.data import chat, stream

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

    def open_stream(sources, seed=0, chats=False, cursor=None, held_out=False, **changes):
        return stream.open_phase(make.phase(sources, **changes), tok, seed, chats, held_out, cursor)

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
    """What every document that begins in `batches` says."""
    tokens = joined(batches, "tokens")
    return [tok.decode(ids) for ids in np.split(tokens, np.flatnonzero(tokens == tok.bos))[1:]]


def same(one: list[stream.Batch], other: list[stream.Batch]) -> bool:
    keys = ("tokens", "targets", "weights", "segments")
    alike = [set(a) == set(b) == {*keys} and all(np.array_equal(a[k], b[k]) for k in keys) for a, b in zip(one, other)]
    return len(one) == len(other) and all(alike)


def chain(batches: list[stream.Batch]) -> str:
    digest = ""
    for batch in batches:
        digest = stream.chain_sha256(digest, batch)
    return digest


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


def test_a_stream_that_is_read_once_ends_where_no_full_batch_is_left(corpus, tok, read_once):
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
        here, document = document[: rows * length].reshape(rows, length), document[rows * length :]
        assert (batch["segments"][:, 0] == 1).all()
        assert np.array_equal(np.diff(batch["segments"]), np.diff(here))


def test_arrays_have_the_types_that_training_is_compiled_for(corpus, open_stream):
    for chats, source in ((False, corpus["many"]), (True, corpus["chats"])):
        batch = open_stream(source, chats=chats).next(2, 64)
        kinds = {key: array.dtype.name for key, array in batch.items()}
        assert kinds == {"tokens": "int32", "targets": "int32", "weights": "float32", "segments": "int32"}


def test_every_epoch_reads_every_document_once_in_an_order_of_its_own(corpus, tok, open_stream):
    read = texts(tok, take(open_stream(corpus["many"]), [(1, 4000)]))
    expected = sorted(row["text"] for row in corpus["rows"]["many"])
    first, second = read[:60], read[60:120]
    assert sorted(first) == sorted(second) == expected
    assert first != second and first != [row["text"] for row in corpus["rows"]["many"]]


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
    drawn = zip(documents.cursor()["drawn"], names)
    assert any(n > len(corpus["rows"][name]) for n, (name, _) in drawn), "it must cross an epoch's end"
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
    assert same(parts, batches) and chain(parts) == chain(batches)


def test_a_cursor_is_small_and_stays_small(corpus, open_stream):
    documents = open_stream(corpus["many"])
    first = len(json.dumps(documents.cursor()))
    take(documents, [(4, 64)] * 20)
    assert len(json.dumps(documents.cursor())) < first + 20


def test_a_cursor_of_other_sources_is_refused(corpus, open_stream):
    cursor = open_stream([corpus["few"], corpus["many"]]).cursor()
    for names in ([corpus["few"]], [corpus["many"], corpus["few"]], [corpus["few"], corpus["gaps"]]):
        with pytest.raises(UsageError, match="the run .*many.jsonl.* but the config now names .*workdir"):
            open_stream(names, cursor=cursor)


def test_the_chained_hash_sees_every_array_and_the_order(corpus, open_stream):
    one, two = take(open_stream(corpus["many"]), [(2, 16)] * 2)
    hashes = {chain([one, two]), chain([two, one]), chain([one]), chain([])}
    for key in one:
        changed = one[key].copy()
        changed[-1, -1] += 1
        hashes.add(chain([one | {key: changed}, two]))
    assert len(hashes) == 8


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
def test_what_is_held_out_is_never_trained_on(corpus, tok, open_stream, fraction):
    held_out, trained = (
        texts(tok, take(open_stream(corpus["many"], held_out=part, eval_fraction=fraction), shapes))
        for part, shapes in ((True, [(1, 1)] * 9999), (False, [(1, 8000)]))
    )
    everything = {row["text"] for row in corpus["rows"]["many"]}
    assert len(held_out) == round(60 * fraction)
    assert set(trained[:-1]) == everything - set(held_out)  # the last one is cut


def test_the_held_out_part_of_every_source_is_read(corpus, tok, open_stream):
    sources = [corpus["few"], corpus["many"]]
    read = texts(tok, take(open_stream(sources, held_out=True, eval_fraction=0.2), [(1, 1)] * 9999))
    assert sorted(text[:3] for text in read) == ["few"] + ["man"] * 12


def test_a_source_with_nothing_held_out_has_an_empty_held_out_stream(corpus, open_stream):
    documents = open_stream(corpus["few"], held_out=True, eval_fraction=0.0)
    assert documents.next(1, 1) is None
    assert open_stream(corpus["chats"], held_out=True, chats=True).next(1, 1) is None


# ----------------------------------------------------------------------------------------------------- conversations


def packed(batches: list[stream.Batch]) -> list[tuple[list[int], list[int], list[float]]]:
    """(tokens, targets, weights) of every segment of every row."""
    found = []
    for batch in batches:
        for row in range(len(batch["segments"])):
            segments = batch["segments"][row]
            for segment in range(1, segments.max() + 1):
                at = np.flatnonzero(segments == segment)
                assert np.array_equal(at, np.arange(at[0], at[-1] + 1)), "a segment is one stretch"
                found.append(tuple(batch[key][row, at].tolist() for key in ("tokens", "targets", "weights")))
    return found


def as_packed(tok, messages: list[dict], length: int) -> tuple[list[int], list[int], list[float]]:
    ids, said = chat.encode(tok, messages)
    ids = [tok.bos, *ids, tok.eos]
    weights = [float(w) for w in [*said, False]]
    return ids[:-1][:length], ids[1:][:length], weights[:length]


@pytest.mark.parametrize("shape", [(1, 300), (3, 120), (8, 64), (2, 20)])
def test_every_conversation_is_one_segment_and_cut_only_if_longer_than_a_row(corpus, tok, open_stream, shape):
    expected = [as_packed(tok, row["messages"], shape[1]) for row in corpus["rows"]["chats"]]
    segments = packed(take(open_stream(corpus["chats"], chats=True), [shape] * 60))
    assert len(segments) > 60
    for epoch in (segments[:30], segments[30:60]):
        assert sorted(epoch) == sorted(expected)


def test_padding_has_no_weight_and_no_segment_and_ends_its_row(corpus, open_stream):
    batches = take(open_stream(corpus["chats"], chats=True), [(3, 100)] * 10)
    assert any((batch["segments"] == 0).any() for batch in batches)
    for batch in batches:
        padding = batch["segments"] == 0
        assert not batch["weights"][padding].any() and not batch["tokens"][padding].any()
        assert (np.diff(padding.astype(int)) >= 0).all()


def test_rows_are_filled_as_far_as_the_next_conversation_allows(corpus, tok, open_stream):
    for shape in ((2, 150), (4, 100)):
        batches = take(open_stream(corpus["chats"], chats=True), [shape] * 10)
        for batch, after in itertools.pairwise(batches):
            room = (batch["segments"] == 0).sum(axis=1).max()
            assert room < (after["segments"][0] == 1).sum(), "the conversation that comes next would have fitted"


def test_a_conversation_goes_into_the_fullest_row_that_takes_it(make, tok, tmp_path, open_stream):
    middle, long, short = ([{"role": "assistant", "content": make.prose(words)}] for words in (20, 40, 2))
    rows = [{"messages": messages} for messages in (middle, middle, long, long, short, short)]  # half is held out
    source = make.write_jsonl(tmp_path / "a.jsonl", rows)
    n_long, n_short = (len(as_packed(tok, messages, 9999)[0]) for messages in (long, short))
    batch = open_stream(source, chats=True, held_out=True, eval_fraction=0.5).next(3, n_long + n_short)
    assert batch["segments"].max(axis=1).tolist() == [1, 2, 0]


def test_the_rest_of_the_held_out_conversations_is_a_batch_too(corpus, open_stream):
    batches = take(open_stream(corpus["chats"], chats=True, held_out=True, eval_fraction=0.5), [(2, 100)] * 100)
    assert 1 < len(batches) < 100 and len(packed(batches)) == 15


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


def test_a_mistake_in_any_of_the_first_records_is_found_before_training(make, tok, tmp_path, corpus):
    stream.check(make.phase(corpus["many"]), tok, chats=False)
    stream.check(make.phase(corpus["chats"]), tok, chats=True)
    text, talk = {"text": "ba"}, {"messages": make.chat(2)}
    for rows, chats in (([text, {"texts": "ce"}], False), ([talk, text], True)):
        phase = make.phase([corpus["chats"], make.write_jsonl(tmp_path / "a.jsonl", rows)])
        with pytest.raises(UsageError, match="a.jsonl"):
            stream.check(phase, tok, chats)


def test_records_without_any_text_are_refused_before_training(make, tok, tmp_path):
    source = make.write_jsonl(tmp_path / "a.jsonl", [{"text": " "}, {"text": "\n"}, {"text": ""}])
    with pytest.raises(UsageError, match=f"^source {source}: there is no text in it$"):
        stream.check(make.phase(source), tok, chats=False)


def test_a_tokenizer_learns_from_the_training_parts_of_all_phases_only(make, corpus):
    phases = [make.phase(corpus[name], eval_fraction=0.2) for name in ("many", "chats")]
    learnt = set(stream.texts(phases, 1_000_000))
    held_out = {row["text"] for row in corpus["rows"]["many"][::5]}
    said = {"\n".join(m["content"] for m in row["messages"]) for row in corpus["rows"]["chats"]}
    assert learnt & held_out == set() and len(learnt & said) == 24
    assert learnt - said == {row["text"] for row in corpus["rows"]["many"]} - held_out


def test_a_tokenizer_learns_from_no_more_text_than_asked_for(make, corpus):
    phases = [make.phase([corpus["many"], corpus["few"]]), make.phase(corpus["chats"])]
    learnt = list(stream.texts(phases, 800))
    sizes = [sum(len(text) for text in learnt if name in text) for name in ("many", "few")]
    sizes.append(sum(map(len, learnt)) - sum(sizes))
    longest = max(map(len, learnt))
    for size, share in zip(sizes, (200, 200, 400)):
        assert share <= size <= share + longest
