"""The report: the contents of its page and picture, also for runs that are young, old or in trouble."""

import base64
import html.parser
import json
import math
import os
import re
import shutil

import pytest

from lowrank_jax import report as command
from lowrank_jax.config import UsageError
from lowrank_jax.training import forecast, report, run_folder
from lowrank_jax.training.plan import make

pytestmark = pytest.mark.slow

STAGES = {"pretrain-16": (0, 16), "pretrain-32": (3, 32), "sft-32": (6, 32)}  # first step and length


def train_row(step: int, stage: str, **changes) -> dict:
    row = {"step": step, "phase": stage.split("-")[0], "stage": stage, "seq_len": STAGES[stage][1]}
    row |= {"batch": 256 // STAGES[stage][1], "tokens": 256 * step, "loss": 8.0 - step, "lr": 0.01, "grad_norm": 1.0}
    return row | {"tokens_per_s": 512.0, "mfu": None} | changes


def eval_row(step: int, split: str, bits: float) -> dict:
    row = {"step": step, "phase": split, "stage": f"{split}-32", "split": split, "eval_loss": 2 * bits}
    return row | {"bits_per_byte": bits, "eval_tokens": 100}


TRAIN = [train_row(step, "pretrain-16" if step <= 3 else "pretrain-32") for step in range(1, 7)]
TRAIN += [train_row(7, "sft-32"), train_row(8, "sft-32", tokens_per_s=128.0)]
EVALS = [eval_row(0, "pretrain", 4.0), eval_row(6, "pretrain", 2.0)]
EVALS += [eval_row(6, "sft", 3.0), eval_row(7, "sft", 2.25), eval_row(8, "sft", 2.5)]
EVENTS = [{"event": "start", "step": 0, "resumes": False, "changed": []}]
EVENTS += [
    {"event": "stage", "step": start, "stage": name, "compile_seconds": 7.25, "stall_seconds": 0.5, "stall_steps": 3.25}
    for name, (start, _) in STAGES.items()
]
EVENTS += [{"event": "sample", "step": 6, "phase": "pretrain", "prompt": "<b>O", "text": "Romeo & Juliet"}]
COUNTS = {"documents": 21, "tokens": 1536, "epochs": 1.3, "skipped": 2}
EVENTS += [{"event": "data", "step": 6, "phase": "pretrain", "sources": [{"source": "text:<x>"} | COUNTS]}]
EVENTS += [{"event": "finish", "step": 8, "tokens": 2048, "params_sha256": "ab" * 32}]


@pytest.fixture
def folder(tmp_path, make):
    """The folder of a run of three stages, without rows or events yet."""
    changes = {"auto_grow": True, "grow_plan": "16,32", "grow_every_steps": 3, "block": 16, "steps": 6}
    changes |= {"sources": "text:x", "tokens_per_step": 256}
    changes = {f"pretrain__{key}": value for key, value in changes.items()}
    sft = {"sft__steps": 2, "sft__block": 32, "sft__tokens_per_step": 256, "sft__sources": "json:x"}
    run_folder.write_config(str(tmp_path), make.run_config(**changes, **sft))
    return tmp_path


def page_of(folder, rows: list[dict], events: list[dict]) -> str:
    for row in rows:
        run_folder.append(str(folder), "metrics.jsonl", row)
    for event in events:
        run_folder.append(str(folder), "events.jsonl", {"time": 1.7e9} | event)
    report.write(str(folder))
    return (folder / "report.html").read_text()


def stages_in(folder) -> list[dict]:
    config = run_folder.read_config(str(folder))
    return forecast.describe(config, make(config))["stages"]


def section(page: str, title: str) -> str:
    """The text of a section, with one blank for each tag."""
    (part,) = [part for part in page.split("<h2>")[1:] if part.startswith(title)]
    return " ".join(re.sub("<[^>]*>", " ", part).split())


def test_the_page_stands_alone_and_holds_the_picture(folder):
    page = page_of(folder, TRAIN + EVALS, EVENTS)
    (image,) = re.findall('src="data:image/png;base64,([^"]*)"', page)
    assert base64.b64decode(image) == (folder / "loss.png").read_bytes()
    assert not re.search(r"https?:|<script|<link|@import|url\(", page)
    assert 'name="viewport"' in page and page.count("src=") == 1


def test_the_page_summarises_the_run(folder):
    page = page_of(folder, TRAIN + EVALS, EVENTS)
    head = " ".join(re.sub("<[^>]*>", " ", page.split("<h2>")[0]).split())
    assert "state finished steps 8 tokens 2.05k last loss 0.000 median tokens/s 512" in head
    assert "pretrain 2 4.000 2.000 2.000 50.0% sft 3 3.000 2.250 2.500 16.7%" in section(page, "Held-out text")
    assert "0 pretrain-16 16 7.25 0.5 3.25 3 pretrain-32 32 7.25 0.5 3.25 6 sft-32" in section(page, "Stage switches")
    assert "pretrain text:&lt;x&gt; 21 1,536 1.3 2 sft json:x – – – –" in section(page, "Data")
    assert "step 6, after pretrain &lt;b&gt;O Romeo &amp; Juliet" in section(page, "Samples")
    config = run_folder.read_config(str(folder))
    described = forecast.describe(config, make(config))
    assert forecast.table(described).splitlines()[0].split()[0] in section(page, "Plan")
    assert "stage 3 6 start 1 0 sample 1 6 data 1 6 finish 1 8" in section(page, "Events")
    assert "finish tokens 2,048, params_sha256 abababababab" in section(page, "Latest events")


def test_what_sft_costs_the_base_is_the_first_phases_figure_after_the_last_step(folder):
    page = page_of(folder, [*TRAIN, *EVALS, eval_row(8, "pretrain", 2.125)], EVENTS)
    assert "pretrain 3 4.000 2.000 2.000 50.0% 2.125 +0.125 sft 3 3.000" in section(page, "Held-out text")
    assert "SFT cost the base" in page and "+0.125 bits per byte" in page


def test_the_page_says_how_the_run_was_started_and_what_to_run_next(folder):
    start = {"event": "start", "step": 0, "command": "python -m x --a='b c'", "commit": "ab" * 20, "mesh": {"data": 2}}
    again = start | {"step": 3, "commit": "cd" * 20}
    page = page_of(folder, TRAIN, [start | {"time": 100.0}, {"event": "save", "step": 3, "time": 130.0}])
    page = page_of(folder, [], [again | {"time": 900.0}, EVENTS[-1] | {"time": 1000.5}])
    assert "2 min 10 s" in page and "python -m x --a=&#x27;b c&#x27;" in section(page, "Run")
    assert section(page, "Run").count("python -m x") == 1 and section(page, "Run").count("commit") == 2
    assert "data 2" in section(page, "Run") and "Run" in page
    assert "pretrain.steps 6 -1" in section(page, "Settings that differ")
    assert f"generate --workdir={folder} --chat" in section(page, "What to run next")
    assert "--unfinished" not in page


def test_warnings_are_sentences_and_a_run_without_any_has_none(folder, tmp_path):
    page = page_of(folder, TRAIN + EVALS[:2], EVENTS)
    assert section(page, "Warnings") == "Warnings none"
    source = {"source": "json:x", "documents": 1, "epochs": 9.5}
    events = [{"event": "data", "step": 8, "phase": "sft", "sources": [source]}, {"event": "oom", "step": 2}]
    events += [{"event": "skip", "step": 2, "loss": None}, {"event": "skip", "step": 2, "source": "json:x"}]
    events.append({"event": "tasks", "step": 8, "phase": "sft", "failed": "KeyError: x"})
    shown = section(page_of(folder, EVALS[2:], events), "Warnings")
    for text in ("read 9.5 times in sft", "out of memory: 1 times", "1 updates were refused", "1 records", "KeyError"):
        assert text in shown, text
    assert "held-out sft was better before its end: 2.250, now 2.500" in shown


def test_several_samples_and_the_results_of_tasks_are_shown(folder):
    sample = {"event": "sample", "step": 8, "phase": "sft", "prompt": "p", "text": "a", "more": ["<i>", 3, "c"]}
    results = {"event": "tasks", "step": 8, "phase": "sft", "results": {"choice": {"acc": 0.5, "questions": 6}}}
    page = page_of(folder, TRAIN, [sample, results])
    assert "p a p &lt;i&gt; p c" in section(page, "Samples") and "8 choice 0.5 6" in section(page, "Tasks")


def test_the_picture_shows_everything_against_tokens_and_marks_the_stages(folder):
    skipped = {"event": "skip", "step": 5, "loss": 90.0, "grad_norm": 1.0, "reason": "spike"}
    record = {"event": "skip", "step": 3, "source": "json:a", "where": "a, record 7", "reason": "not JSON"}
    stages = stages_in(folder)
    rows = [row | {"loss": None} if row["step"] == 5 else row for row in TRAIN] + EVALS
    figure = report._figure(rows, EVENTS + [record, skipped], stages)
    loss, bits, length, speed, norm, rate = figure.axes
    assert [list(line.get_ydata()) for line in norm.lines[:2]] == [[1.0] * 6, [1.0] * 2]
    lines = {line.get_label(): line for line in loss.lines}
    assert list(lines["pretrain"].get_xdata()) == [256 * step for step in (1, 2, 3, 4, 6)]
    assert list(lines["pretrain"].get_ydata()) == [7, 6, 5, 4, 2]
    assert list(lines["sft, held out"].get_xdata()) == [6 * 256, 7 * 256, 8 * 256]
    assert list(lines["skipped update"].get_xdata()) == [5 * 256]
    assert list(bits.lines[0].get_ydata()) == [4, 2]
    assert list(length.lines[0].get_ydata()) == [16] * 3 + [32] * 5
    assert {text.get_text().strip(): text.xy[0] for text in loss.texts} == {
        name: 256 * start for name, (start, _) in STAGES.items()
    }
    assert rate.get_xlabel() == "tokens" and all(axes.get_shared_x_axes().joined(axes, loss) for axes in figure.axes)


def test_long_lines_are_drawn_as_means_over_the_whole_run(folder):
    rows = [train_row(step, "pretrain-32", loss=step % 2) for step in range(1, 5001)]
    figure = report._figure(rows, [], stages_in(folder))
    every, means = figure.axes[0].lines[:2]
    assert len(every.get_xdata()) == 5000 and len(means.get_xdata()) == report.POINTS
    assert all(abs(y - 0.5) < 0.05 for y in means.get_ydata())


def test_what_saving_cost_is_set_against_the_time_of_the_steps(folder):
    saves = [{"event": "save", "step": step, "data_sha256": "0", "blocked_seconds": 0.05} for step in (6, 8)]
    page = page_of(folder, TRAIN + EVALS, EVENTS + saves)  # 7 steps take 0.5 s each, and the last 2 s
    assert "2 saves held up training for 0.1 s in all, 1.82% of the 5.5 s" in section(page, "Stage switches")


def test_saves_without_a_known_time_are_left_out(folder):
    page = page_of(folder, TRAIN, [{"event": "save", "step": 8, "data_sha256": "0"}])
    assert "held up" not in page and "save 1 8" in section(page, "Events")


def test_trouble_is_listed_with_its_facts_and_a_flood_of_one_kind_hides_no_other(folder):
    skip = {"event": "skip", "step": 1, "source": "s", "reason": "x" * 999}
    flood = [skip | {"where": f"record {n}"} for n in range(99)]
    trouble = [
        {"event": "oom", "step": 2, "microbatch_tokens": 128, "remat": False, "reason": "RESOURCE_EXHAUSTED"},
        {"event": "restore_failed", "step": 4, "reason": "checksum differs"},
        {"event": "fallback", "step": 5, "off_by": {"loss": 0.5}},
        {"event": "preempt", "step": 6, "signal": 15},
        {"event": "compile", "step": 0, "stage": "sft-32", "peak_bytes": 3 * 2**30, "device_bytes": None},
    ]
    page = page_of(folder, TRAIN, EVENTS[:-1] + trouble[:1] + flood + trouble[1:])
    assert "skip 99 1" in section(page, "Events")
    shown = section(page, "Out of the ordinary")
    assert shown.count("record") == report.EACH and "record 98" in shown and "x" * 161 not in shown
    for facts in ("microbatch_tokens 128, remat False", "checksum differs", "off_by loss 0.5", "signal 15"):
        assert facts in shown
    assert "peak_bytes 3.00 GiB, device_bytes –" in section(page, "Latest events")
    assert "3.00 GiB" in section(page, "Stage switches")
    assert "stopped by a signal" in page


@pytest.mark.parametrize(
    "rows, events",
    [
        (EVALS[:1], []),
        (TRAIN[:1], EVENTS[:1]),
        ([train_row(1, "pretrain-16", loss=None, grad_norm=None)], [{"event": "stage", "step": 0, "stage": "gone-7"}]),
        (TRAIN, [{"event": "something new", "step": 3}, {"event": "restore", "step": 3}]),
    ],
)
def test_a_young_old_or_unknown_run_still_has_a_report(folder, rows, events):
    page = page_of(folder, rows, events)
    assert "not finished" in page and (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_metrics_is_refused_in_one_line(folder):
    with pytest.raises(UsageError, match="no metrics yet"):
        report.write(str(folder))


def test_the_command_prints_the_page(folder, capsys):
    page_of(folder, TRAIN, EVENTS)
    paths = command.command([f"--workdir={folder}"])
    assert capsys.readouterr().out.strip() == paths["report"] == str(folder / "report.html")
    assert json.dumps(paths)


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'-alert(1)-'</title></pre>",
    "$\\frac{1$ ${body} $$ %s",
    "\x1b[31m\x9b\u202e\u2066\x00",
    "lone \ud800 and \udfff",
    "_hidden",
    "",
    "x" * 5000,
]
ODD = [None, True, -1, 1e308, 10**400, math.nan, -math.inf, [], [["a"]], {"a": {"<b>": "\udc80"}}, *HOSTILE]


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.data = set(), set(), ""

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.data += data


def check_harmless(page: str) -> None:
    parser = Tags()
    parser.feed(page)
    known = "html meta title style h1 h2 p dl div dt dd img table tr th td pre b".split()
    assert parser.tags <= set(known) and parser.attributes <= {
        "lang",
        "charset",
        "name",
        "content",
        "class",
        "alt",
        "src",
    }
    assert all(c in "\t\n" or c.isprintable() or c == "\xa0" for c in parser.data)


def test_no_row_or_event_runs_as_a_script_or_breaks_the_report(folder):
    rows, events = list(TRAIN + EVALS), list(EVENTS)
    for i, value in enumerate(ODD):
        for base, kept in ((TRAIN[0], rows), (EVALS[0], rows), *((event, events) for event in EVENTS)):
            kept += [base | {key: value} for key in base] + [base | {"reason": value}]
        text = value if isinstance(value, str) else f"key {i}"
        rows += [row | {"phase": text, "split": text} for row in EVALS[:2]]
        rows.append({text: value})
        events += [{"event": text, "step": i, text: value, f"{i}_bytes": value}, {"event": value, "step": 1}]
        events += [{"event": "compile", "step": 0, "stage": text, "peak_bytes": value}]
    page = page_of(folder, rows, events)
    check_harmless(page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;, bits per byte" in page and r"lone \ud800" in page
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_name_of_the_folder_is_text(tmp_path, folder):
    evil = tmp_path / os.fsdecode(b"<script>$name \xff\x1b")
    evil.mkdir()
    shutil.copy(folder / "config.json", evil)
    check_harmless(page_of(evil, TRAIN, EVENTS))
