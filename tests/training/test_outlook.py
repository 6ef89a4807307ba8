"""The outlook of a run: time to its end, passes over its data, warnings, and the lines in a log file."""

import contextlib
import types

import numpy as np
import pytest
from conftest import prose, run_config, write_jsonl

from lowrank_jax.data import stream, tokenizer
from lowrank_jax.training import metrics, outlook
from lowrank_jax.training.plan import Progress, stage_at, stages_of, unchanged

GROWING = {"pretrain__auto_grow": True, "pretrain__grow_plan": "64,128", "pretrain__block": 64}
GROWING |= {"pretrain__grow_every_steps": 60, "pretrain__tokens_per_step": 128, "pretrain__steps": 100}
GROWING |= {"sft__steps": 20, "sft__block": 128, "sft__tokens_per_step": 256, "track": ""}


def config_of(**changes):
    return run_config(**GROWING | changes)


# ---------------------------------------------------------------------------------------------------------------- time


def test_the_time_left_follows_the_flops_of_every_later_stage():
    config = config_of()
    stages = stages_of(config)
    per_flop = 1 / outlook.step_flops(config, stages[0])  # a step of the first stage takes a second
    flops = [outlook.step_flops(config, s) for s in stages]
    left = outlook.seconds_left(config, stages, 10, per_flop)
    assert left["pretrain"] == pytest.approx(50 + 40 * flops[1] / flops[0]) and flops[1] > flops[0]
    assert left["sft"] == pytest.approx(20 * flops[2] / flops[0]) and flops[2] == 2 * flops[1]
    assert outlook.seconds_left(config, stages, 110, per_flop) == {"sft": left["sft"] / 2}
    assert outlook.seconds_left(config, stages, 120, per_flop) == {}


@pytest.mark.parametrize(
    "seconds, shown",
    [
        (0, "0 s"),
        (89, "89 s"),
        (90, "2 min"),
        (5399, "90 min"),
        (5400, "1.5 h"),
        (172_799, "48.0 h"),
        (777_600, "9.0 days"),
    ],
)
def test_a_duration_has_the_unit_that_fits(seconds, shown):
    assert outlook.duration(seconds) == shown


def test_only_a_run_of_more_than_a_day_on_a_cpu_is_warned_of_with_the_steps_of_an_hour():
    config, stages = config_of(), stages_of(config_of())
    days = {"pretrain": 9 * 86_400.0, "sft": 86_400.0}
    line = outlook.time_warning(config, stages, days, "cpu")
    assert line.startswith("10.0 days on a CPU is very long") and "config.pretrain.steps=1 config.sft.steps=1" in line
    config = config_of(pretrain__steps=100_000)
    line = outlook.time_warning(config, stages_of(config), days, "cpu")
    assert "config.pretrain.steps=416 " in line  # 1/240 of them
    assert outlook.time_warning(config, stages, days, "gpu") == ""
    assert outlook.time_warning(config, stages, {"pretrain": 86_400.0}, "cpu") == ""


# ---------------------------------------------------------------------------------------------------------------- data


def test_passes_are_the_tokens_read_over_the_tokens_of_a_source():
    config = config_of(pretrain__sources="text:a@0:3/50:1, text:b, text:c", sft__sources="json:d")
    tokens = {"pretrain": {"text:a": 1000, "text:b": 100, "text:c": 0}, "sft": {"json:d": 2560}}
    checked = {phase: {spec: stream.Checked("", 10, n) for spec, n in own.items()} for phase, own in tokens.items()}
    assert outlook.corpus_bytes(checked) == 40 and outlook.corpus_bytes({}) == 0
    counts = outlook.passes(config, stages_of(config), checked)
    shares = [(3 / 5 + 1 / 3) / 2, (1 / 5 + 1 / 3) / 2]
    assert counts["pretrain"] == pytest.approx({"text:a": 12.8 * shares[0], "text:b": 128 * shares[1]})
    assert counts["sft"] == {"json:d": 2.0}
    assert outlook.passes(config, stages_of(config), {}) == {"pretrain": {}, "sft": {}}


def test_a_source_that_is_read_too_often_or_hardly_is_named_with_the_steps_that_suit_it():
    config = config_of()
    warnings = lambda **counts: outlook.data_warnings(config, stages_of(config), counts, 0)
    assert warnings(pretrain={"text:a": 4.0, "text:b": 0.05, "text:c": 0.0}, sft={"json:d": 1.0}) == []
    (often,) = warnings(pretrain={"text:a": 40.0})
    assert often == (
        "pretrain reads text:a 40 times, and more than 4 add little; use more text, config.pretrain.steps=10"
    )
    both = warnings(pretrain={"text:a": 8.0, "text:b": 0.01}, sft={"json:d": 5.0})
    assert "config.pretrain.steps=50, or a lower weight" in both[0] and "config.sft.steps=16" in both[2]
    assert both[1] == "pretrain reads only 1.00% of text:b; config.pretrain.steps=10000 would read it once"


@pytest.mark.parametrize("vocab, corpus, warned", [(32_000, 1.2e6, True), (2048, 5e6, False), (4352, 1.2e6, False)])
def test_a_vocabulary_far_too_large_for_its_corpus_is_named_with_one_that_suits(vocab, corpus, warned):
    config = config_of(model__vocab=vocab)
    lines = outlook.data_warnings(config, stages_of(config), {}, int(corpus))
    assert len(lines) == warned
    if warned:
        assert "32,000 pieces is too large for 1.2 MB" in lines[0] and "vocab_size=1088" in lines[0]
    given_away = config_of(model__vocab=vocab, tokenizer__path="gpt2")
    assert outlook.data_warnings(given_away, stages_of(config), {}, int(corpus)) == []


def test_the_default_vocabulary_is_the_square_root_of_the_bytes():
    sizes = {0: 32_000, 1: 512, 100_000: 512, 1_200_000: 1088, 5_000_000: 2240, 1 << 30: 32_000, 1 << 40: 32_000}
    assert {size: tokenizer.pieces_for(size) for size in sizes} == sizes


@pytest.mark.parametrize("kind", ["text", "json", "array", "parquet", "builtin"])
def test_the_tokens_of_a_source_are_estimated_from_a_few_of_its_records(tok, tmp_path, kind):
    texts = [prose(60 + 5 * (i % 7), seed=i) for i in range(300)]
    if kind == "text":
        (tmp_path / "a.txt").write_text("\n\n".join(texts))
        spec = f"text:{tmp_path}/a.txt"
    elif kind == "builtin":
        spec = "builtin:smalltalk"
    elif kind == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", compression="gzip")
        spec = f"parquet:{tmp_path}/a.parquet"
    else:
        write_jsonl(tmp_path / "a.json", [{"text": text, "id": "x" * 30} for text in texts])
        if kind == "array":
            lines = (tmp_path / "a.json").read_text().splitlines()
            (tmp_path / "a.json").write_text(f"[{','.join(lines)}]")
        spec = f"json:{tmp_path}/a.json"
    p = run_config(pretrain__sources=spec, pretrain__eval_fraction=0.0).pretrain
    batches = stream.read_once(p.sources, tok)
    exact = 0
    while (batch := batches.next(8, 256)) is not None:
        exact += int(batch["weights"].sum())
    estimate = stream.check(p, tok, chats=False)[spec].tokens
    assert estimate == pytest.approx(exact, rel=0.35 if kind in ("parquet", "array", "builtin") else 0.1)
    held_out = run_config(pretrain__sources=spec, pretrain__eval_fraction=0.5).pretrain
    assert stream.check(held_out, tok, chats=False)[spec].tokens == pytest.approx(estimate / 2, abs=1)


# --------------------------------------------------------------------------------------------------------------- lines


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """A function: a run's meter sees steps of so many seconds; return the lines of (stdout, stderr)."""

    def steps_of(config, seconds: float, count: int, passes=None) -> tuple[list[str], list[str]]:
        clock, stages = [0.0], stages_of(config)
        monkeypatch.setattr(metrics, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
        values = {"loss": 3.25, "lr": 0.1, "grad_norm": 2.0, "ok": True, "scale": 1.0, "refused": 0, "in_a_row": 0}
        with contextlib.closing(metrics.Meter(config, str(tmp_path), stages[-1].end, 0, passes)) as meter:
            clock[0] += 100  # compiles
            meter.restart_clock()
            for step in range(count):
                fitted = unchanged(stage_at(stages, step))
                meter.add(fitted, Progress(step=step + 1), {name: np.asarray(x) for name, x in values.items()})
                clock[0] += seconds
            meter.flush()
        out, err = capsys.readouterr()
        return out.splitlines(), err.splitlines()

    return steps_of


@pytest.mark.parametrize(
    "seconds, every, steps", [(1, 1, [1, 31, 61, 91]), (1, 20, [20, 60, 100]), (40, 2, [2, 4, 6, 8]), (0.01, 1, [1])]
)
def test_a_log_file_has_a_line_every_so_many_steps_or_half_a_minute_whichever_is_later(train, seconds, every, steps):
    count = 8 if seconds == 40 else 100
    lines, _ = train(config_of(every__log=every), seconds, count)
    assert [int(line.split()[1].split("/")[0]) for line in lines] == steps
    assert lines[0].startswith(f"step {steps[0]}/120 pretrain-64 loss 3.250 {128 / seconds:,.0f} tokens/s ETA ")


def test_a_terminal_has_its_bar_and_no_plain_lines(train, monkeypatch):
    monkeypatch.setattr(metrics.sys.stdout, "isatty", lambda: True, raising=False)
    lines, _ = train(config_of(every__log=1), 60, 5)
    assert not [line for line in lines if "ETA" in line]


@pytest.mark.parametrize("seconds, said_at", [(1, 6), (12, 4), (3600, 2)])
def test_after_five_measured_steps_or_half_a_minute_a_line_says_what_the_run_takes(train, seconds, said_at):
    config = config_of()
    _, err = train(config, seconds, 20, {"pretrain": {"text:a": 12.3}})
    said = [line for line in err if "to the end" in line]
    left = outlook.seconds_left(
        config, stages_of(config), said_at, seconds / outlook.step_flops(config, stages_of(config)[0])
    )
    assert len(said) == 1 and said[0].startswith(
        f"step {said_at}: about {outlook.duration(sum(left.values()))} to the end"
    )
    assert said[0].endswith("; pretrain reads text:a 12 times")
    assert ("warning: " in "".join(err)) == (seconds == 3600)
