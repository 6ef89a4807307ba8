"""A report of a run: loss.png and report.html, from the files of its folder alone."""

import base64
import collections
import contextlib
import datetime
import html
import importlib
import math
import os
import pathlib
import shlex
import string
from collections.abc import Iterable

import matplotlib.figure
import matplotlib.style
import numpy as np

from lowrank_jax.config import RunConfig, UsageError
from lowrank_jax.machine import storage
from lowrank_jax.machine.console import visible
from lowrank_jax.training import forecast, run_folder
from lowrank_jax.training.plan import make

PAGE, STYLE = (pathlib.Path(__file__).with_name(name) for name in ("report.html", "report.mplstyle"))
COLORS = {"pretrain": "#1f5a94", "sft": "#b4531f"}
POINTS = 300  # of a line: more of them are drawn faintly behind their means
TROUBLE = ("skip", "oom", "retry", "restore", "restore_failed", "fallback", "preempt")  # shown with their facts
ROUTINE = ("save", "sample", "fp8_check", "data", "tasks")  # only counted: other sections have their contents
EACH, LATEST = 10, 30  # events shown of each kind of trouble, and of all others; events.jsonl has every one
CHARACTERS = 160  # of one fact
MOST_EPOCHS = 4  # over a source before more data would help: Muennighoff et al., arXiv 2305.16264
NUMBERS = "step time tokens seq_len loss lr grad_norm tokens_per_s eval_loss bits_per_byte blocked_seconds".split()
TEXTS = "event phase stage split prompt text".split()


def write(folder: str) -> dict:
    """Write loss.png and report.html, and return their paths; raises UsageError where nothing was trained yet."""
    config, rows = run_folder.read_config(folder), _metrics(folder)
    if not rows:
        raise UsageError(f"--workdir={folder} has no metrics yet; let lowrank_jax.main run until its first step")
    events = _usable(run_folder.read_rows(folder, "events.jsonl"), "event", "step")
    described = forecast.describe(config, make(config))
    picture, page = os.path.join(folder, "loss.png"), os.path.join(folder, "report.html")
    with matplotlib.style.context(STYLE):
        figure = _figure(rows, events, described["stages"])
        storage.replace(picture, lambda f: figure.savefig(f, format="png"))
    image = base64.b64encode(pathlib.Path(picture).read_bytes()).decode()
    samples = "".join(_sample(event) for event in events if event["event"] == "sample")
    latest = [event for kind in TROUBLE for event in [e for e in events if e["event"] == kind][-EACH:]]
    trouble = sorted(latest, key=lambda event: event.get("time") or 0)
    others = [event for event in events if event["event"] not in TROUBLE + ROUTINE]
    last = {event["event"]: event["step"] for event in events}
    warnings = "".join(f"<p>{_escape(line)}</p>" for line in _warnings(config, rows, events))
    tasks = [event for event in events if event["event"] == "tasks" and isinstance(event.get("results"), dict)]
    kinds = collections.Counter(event["event"] for event in events).most_common()
    sections = [
        ("Warnings", warnings or "<p>none</p>"),
        ("Training", f'<div class="wide"><img alt="curves by tokens" src="data:image/png;base64,{image}"></div>'),
        ("Held-out text", _table(_eval_summary(rows))),
        *([("Tasks", _table(_of_tasks(tasks)))] if tasks else []),
        ("Stage switches", _table(_switches(events, described["stages"])) + _saving(rows, events)),
        ("Data", _table(_trained_on(config, events))),
        ("Samples", samples or "<p>none: set pretrain.sample and sft.sample</p>"),
        ("Run", _table(_run(events))),
        ("Settings that differ from the default", _table(_changes(config))),
        ("Plan", f'<pre class="wide">{_escape(forecast.table(described))}</pre>'),
        ("Events", _table({"event": kind, "count": n, "last at step": last[kind]} for kind, n in kinds)),
        (f"Out of the ordinary: the last {EACH} of each kind", _table(map(_flat, trouble))),
        ("Latest events", _table(map(_flat, others[-LATEST:]))),
        ("What to run next", f'<pre class="wide">{_escape(_next(folder, config, events))}</pre>'),
    ]
    body = "".join(f"<h2>{title}</h2>\n{content}\n" for title, content in sections)
    facts = "".join(
        f"<div><dt>{_escape(name)}</dt><dd>{_escape(value)}</dd></div>"
        for name, value in _glance(rows, events, described).items()
    )
    path = os.path.abspath(folder)
    texts = {"name": _escape(os.path.basename(path)), "path": _escape(path), "facts": facts, "body": body}
    run_folder.write_text(page, string.Template(PAGE.read_text(encoding="utf-8")).substitute(texts))
    return {"report": page, "picture": picture}


def _usable(rows: list[dict], *needed: str) -> list[dict]:
    """Return the rows that have what is needed, without values of NUMBERS and TEXTS that are of another type.

    Whoever made the folder wrote the rows: nothing is known of their other values.
    """
    kinds = dict.fromkeys(NUMBERS, _is_number) | dict.fromkeys(TEXTS, lambda x: isinstance(x, str))
    known = lambda row: {k: v for k, v in row.items() if v is None or k not in kinds or kinds[k](v)}
    return [row for row in map(known, rows) if all(row.get(key) is not None for key in needed)]


def _metrics(folder: str) -> list[dict]:
    rows = _usable(run_folder.read_rows(folder, "metrics.jsonl"), "step", "phase")
    evals = [row | {k: math.nan for k in ("eval_loss", "bits_per_byte") if row.get(k) is None} for row in rows]
    needed = {True: ("split",), False: ("stage", "tokens", "seq_len")}
    complete = lambda row: all(row.get(key) is not None for key in needed["split" in row])
    return [ev if "split" in row else row for ev, row in zip(evals, rows) if complete(row)]


def _is_number(x) -> bool:
    return type(x) in (int, float) and abs(x) < 2**53


def _escape(value) -> str:
    return html.escape(visible(str(value)))


def _figure(rows: list[dict], events: list[dict], stages: list[dict]) -> matplotlib.figure.Figure:
    train, evals = _split(rows)
    figure = matplotlib.figure.Figure()
    panels = figure.subplots(6, sharex=True, height_ratios=[4, 1.6, 1, 1.2, 1.2, 1.2])
    loss, bits, length, speed, norm, rate = panels
    for phase in dict.fromkeys(row["phase"] for row in rows):
        color = COLORS.get(phase, "#555555")
        of_train, of_evals = ([row for row in some if row["phase"] == phase] for some in (train, evals))
        _line(loss, of_train, "loss", color, label := visible(phase)[:40])
        for axes, key, name in ((loss, "eval_loss", f"{label}, held out"), (bits, "bits_per_byte", None)):
            x, y = _tokens(train, [row["step"] for row in of_evals]), [row[key] for row in of_evals]
            axes.plot(x, y, "o-", color=color, mfc="white", ms=4, lw=1, label=name)
        _line(speed, of_train, "tokens_per_s", color)
        _line(norm, of_train, "grad_norm", color)
        _line(rate, of_train, "lr", color)
    length.plot(*_series(train, "seq_len"), color="#333333", drawstyle="steps-pre")
    refused = sorted({e["step"] for e in events if e["event"] == "skip" and "source" not in e})
    if refused:
        x, low = _tokens(train, refused), {"transform": loss.get_xaxis_transform()}
        loss.plot(x, [0.02] * len(x), "|", color="#b00020", label="skipped update", **low)
    names = {row["stage"] for row in train}
    style = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top", "fontsize": 7.5}
    for i, stage in enumerate(stage for stage in stages if stage["name"] in names):
        x, offset = _tokens(train, stage["start"]), (0, -10 * (i % 3))  # three heights: short stages are close together
        for axes in panels:
            axes.axvline(x, color="#aaaaaa", lw=0.7, ls=":")
        loss.annotate(f" {stage['name']}", (x, 1), offset, color="#555555", **style)
    length.set_yscale("log", base=2)
    length.set_yticks(sorted({row["seq_len"] for row in train}), minor=False)
    length.yaxis.set_major_formatter("{x:.0f}")
    if (_series(train, "grad_norm")[1] > 0).any():  # a young run has no scale
        norm.set_yscale("log")
    for axes in (speed, rate):
        axes.set_ylim(bottom=0)
    for axis in (rate.xaxis, speed.yaxis):
        axis.set_major_formatter(lambda n, _: _short(n))
    for text in loss.legend(loc="upper right", bbox_to_anchor=(1, 0.9)).get_texts():
        text.set_parse_math(False)
    rate.set_xlabel("tokens")
    labels = ("loss (nats per token)", "bits per byte", "length", "tokens/s", "gradient norm", "learning rate")
    for axes, label in zip(panels, labels):
        axes.set_ylabel(label)
    figure.align_ylabels()
    return figure


def _line(axes, rows: list[dict], key: str, color: str, label: str | None = None) -> None:
    x, y = _series(rows, key)
    if len(x) > POINTS:
        axes.plot(x, y, color=color, lw=0.5, alpha=0.25)
        x, y = ([part.mean() for part in np.array_split(values, POINTS)] for values in (x, y))
    axes.plot(x, y, color=color, label=label)


def _split(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    return [row for row in rows if "split" not in row], [row for row in rows if "split" in row]  # of evaluations


def _series(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and values of the rows that have a value (the loss of a skipped update may be null)."""
    some = [row for row in rows if row.get(key) is not None]
    return np.array([row["tokens"] for row in some]), np.array([row[key] for row in some])


def _tokens(train: list[dict], steps):
    """Return the tokens trained on up to a step, or up to each of several; between logged steps it interpolates."""
    known = [(0, 0), *((row["step"], row["tokens"]) for row in train)]
    return np.interp(steps, *zip(*known))


def _glance(rows: list[dict], events: list[dict], described: dict) -> dict:
    train, evals = _split(rows)
    last = [event["event"] for event in events if event["event"] in ("start", "preempt", "finish")][-1:]
    state = {"finish": "finished", "preempt": "stopped by a signal"}.get("".join(last), "not finished")
    facts = {"state": state, "steps": _show(rows[-1]["step"]), "tokens": _short(_tokens(train, rows[-1]["step"]))}
    losses, speeds = _series(train, "loss")[1], _series(train, "tokens_per_s")[1]
    if len(losses):
        facts |= {"last loss": f"{losses[-1]:.3f}", "median tokens/s": _short(np.median(speeds))}
    facts |= {"parameters": _short(described["params"]["total"]), "time": _duration(events)}
    facts |= {f"{row['split']}, bits per byte": f"{row['bits_per_byte']:.3f}" for row in evals}
    costs = [row["cost of SFT"] for row in _eval_summary(rows) if row.get("cost of SFT")]
    return facts | ({"SFT cost the base": f"{costs[-1]} bits per byte"} if costs else {})


def _duration(events: list[dict]) -> str:
    """Return the time from each start to the last event before the next start, added up."""
    seconds, began, last = 0.0, None, None
    for event in events:
        now = event.get("time")
        if event["event"] == "start":
            seconds, began = seconds + (last - began if began is not None else 0), now
        last = now if now is not None else last
    seconds = max(seconds + (last - began if None not in (began, last) else 0), 0)
    hours, minutes = int(seconds // 3600), int(seconds // 60 % 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {seconds % 60:.0f} s"


def _eval_summary(rows: list[dict]) -> list[dict]:
    """Return the held-out figures of each split; those after the steps of its own phase show what SFT cost it."""
    (train, evals), summary = _split(rows), []
    for split in dict.fromkeys(row["split"] for row in evals):
        own = [row for row in evals if row["split"] == split]
        end = max((row["step"] for row in train if row["phase"] == split), default=math.inf)
        bits = [row["bits_per_byte"] for row in own if row["step"] <= end] or [row["bits_per_byte"] for row in own]
        shown = {name: f"{value:.3f}" for name, value in (("first", bits[0]), ("best", min(bits)), ("last", bits[-1]))}
        fall = f"{1 - bits[-1] / bits[0]:.1%}" if bits[0] else "–"
        row = {"bits per byte of": split, "evaluations": len(own)} | shown | {"fell by": fall}
        if later := [row["bits_per_byte"] for row in own if row["step"] > end]:
            row |= {"after SFT": f"{later[-1]:.3f}", "cost of SFT": f"{later[-1] - bits[-1]:+.3f}"}
        summary.append(row)
    return summary


def _of_tasks(events: list[dict]) -> list[dict]:
    table = []
    for event in events:
        for task, values in event["results"].items():
            row = {"step": event["step"], "task": task}
            table.append(row | (values if isinstance(values, dict) else {}))
    return table


def _warnings(config: RunConfig, rows: list[dict], events: list[dict]) -> list[str]:
    """Return a sentence for everything that a reader should know before trusting the run."""
    count, lines = collections.Counter(event["event"] for event in events), []
    refused = sum(event["event"] == "skip" and "source" not in event for event in events)
    kinds = {"oom": "a step ran out of memory", "fallback": "fp8 gave way to bf16"}
    kinds |= {"restore_failed": "a checkpoint was damaged", "decode_differs": "decoding differed from the forward pass"}
    kinds |= {"retry": "a read failed and was repeated"}
    lines += [
        f"{text}: {count[kind]:,} times, the last ones are listed below" for kind, text in kinds.items() if count[kind]
    ]
    lines += [f"{refused:,} updates were refused (no finite loss, or a spike)"] if refused else []
    if skipped := count["skip"] - refused:
        lines.append(f"{skipped:,} records could not be used and were skipped")
    for read in _trained_on(config, events):
        if _is_number(epochs := read.get("epochs")) and epochs > MOST_EPOCHS:
            lines.append(f"{read['source']} was read {epochs:.3g} times in {read['phase']}: more data would help")
    for row in _eval_summary(rows):
        best, last = float(row["best"]), float(row["last"])
        if last > 1.01 * best:
            lines.append(f"held-out {row['bits per byte of']} was better before its end: {best:.3f}, now {last:.3f}")
    lines += [
        f"tasks failed at step {e['step']}: {e['failed']}" for e in events if e["event"] == "tasks" and "failed" in e
    ]
    return lines


def _run(events: list[dict]) -> list[dict]:
    """Return where and how the run was started, each time that something differs from the start before."""
    table, names = [], {"command": "command", "commit": "commit", "hardware": "hardware", "versions": "versions"}
    names |= {"devices": "devices", "processes": "processes", "mesh": "mesh", "precision": "precision"}
    known = {}
    for event in (event for event in events if event["event"] == "start"):
        facts = {name: event[key] for key, name in names.items() if event.get(key) is not None}
        table += [
            {"from step": event["step"], "": n, "facts": _fact(n, x, 1000)}
            for n, x in facts.items()
            if known.get(n) != x
        ]
        known |= facts
    return table


def _changes(config: RunConfig) -> list[dict]:
    """Return the settings that configs/default.py has otherwise; none where that file is not beside the package."""
    for name in ("configs.default", "lowrank_jax.configs.default"):
        with contextlib.suppress(ImportError, UsageError):
            default = RunConfig.from_dict(importlib.import_module(name).get_config().to_dict())
            differ = run_folder.differences(default, config)
            return [
                {"config.": k, "facts": run_folder.describe(now), "default": run_folder.describe(was)}
                for k, was, now in differ
            ]
    return []


def _next(folder: str, config: RunConfig, events: list[dict]) -> str:
    """Return the commands that a run of this state is ready for."""
    where = f"--workdir={shlex.quote(os.path.abspath(folder))}"
    has_ended = [e["event"] for e in events if e["event"] in ("start", "finish")][-1:] == ["finish"]
    lines = [] if has_ended else ["the command above again: training goes on where it stopped"]
    chat = "--chat" if config.sft.steps else f"--prompt={shlex.quote(config.pretrain.sample or 'The')}"
    lines += [f"python -m lowrank_jax.generate {where} {chat}", f"python -m lowrank_jax.serve {where}"]
    lines.append(f"python -m lowrank_jax.evaluate {where}" + " --phase=pretrain" * (len(config.phases) > 1))
    unfinished = "" if has_ended else " --unfinished"
    return "\n".join([*lines, f"python -m lowrank_jax.export {where} --format=hf --out=exports/hf{unfinished}"])


def _switches(events: list[dict], stages: list[dict]) -> list[dict]:
    lengths, table = {stage["name"]: stage["seq_len"] for stage in stages}, []
    peaks = {event.get("stage"): event.get("peak_bytes") for event in events if event["event"] == "compile"}
    for event in (event for event in events if event["event"] == "stage"):
        name = event.get("stage")
        row = {"step": event["step"], "stage": name, "length": event.get("seq_len") or lengths.get(name)}
        row |= {"compile, s": event.get("compile_seconds"), "stall, s": event.get("stall_seconds")}
        row |= {"stall, ordinary steps": event.get("stall_steps")}
        table.append(row | ({"peak memory": _fact("peak_bytes", peaks[name])} if name in peaks else {}))
    return table


def _trained_on(config: RunConfig, events: list[dict]) -> list[dict]:
    """Return what each phase has read of each source; a phase that has not ended has its sources alone."""
    data = [event for event in events if event["event"] == "data" and event.get("phase") is not None]
    ended = {event["phase"]: event.get("sources") for event in data}
    planned = {name: [{"source": s.spec} for s in phase.sources] for name, phase in config.phases.items()}
    lists = [(phase, read) for phase, read in (planned | ended).items() if isinstance(read, list)]
    table = [{"phase": phase} | counts for phase, read in lists for counts in read if isinstance(counts, dict)]
    empty = {key for row in table for key in row} - {key for row in table for key, value in row.items() if value}
    return [{key: value for key, value in row.items() if key not in empty} for row in table]


def _saving(rows: list[dict], events: list[dict]) -> str:
    blocked = [event["blocked_seconds"] for event in events if event.get("blocked_seconds") is not None]
    if not blocked:
        return ""
    train = [row for row in rows if row.get("tokens_per_s")]
    trained = np.diff([0, *(row["tokens"] for row in train)]) @ [1 / row["tokens_per_s"] for row in train]
    share = f", {sum(blocked) / trained:.2%} of the {_show(trained)} s that its steps took" if trained else ""
    return f"<p>{_show(len(blocked))} saves held up training for {_show(sum(blocked))} s in all{share}.</p>"


def _flat(event: dict) -> dict:
    facts = [f"{key} {_fact(key, value)}" for key, value in event.items() if key not in ("event", "step", "time")]
    seconds = min(max(event.get("time") or 0, 0), 2**37)  # until the year 6325
    shown = {"step": event["step"], "event": event["event"], "facts": ", ".join(facts)}
    return shown | {"UTC": f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M:%S}"}


def _sample(event: dict) -> str:
    phase, prompt = (_escape(event.get(key, "")) for key in ("phase", "prompt"))
    more = event.get("more") if isinstance(event.get("more"), list) else []
    texts = [event.get("text", ""), *(text for text in more if isinstance(text, str))]
    shown = "".join(f"<pre><b>{prompt}</b> {_escape(text)}</pre>" for text in texts)
    return f"<p>step {event['step']:,}, after {phase}</p>{shown}"


def _table(rows: Iterable[dict]) -> str:
    rows = list(rows)
    if not rows:
        return "<p>none</p>"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    kinds = {c: "text" if any(isinstance(row.get(c), str) for row in rows) else "number" for c in columns}
    kinds |= {"facts": "facts"}
    line = lambda tag, shown: "".join(f'<{tag} class="{kinds[c]}">{_escape(shown[c])}</{tag}>' for c in columns)
    body = "".join(f"<tr>{line('td', {c: _show(row.get(c)) for c in columns})}</tr>\n" for row in rows)
    return f'<div class="wide"><table><tr>{line("th", dict(zip(columns, columns)))}</tr>\n{body}</table></div>'


def _fact(key: str, value, most: int = CHARACTERS) -> str:
    if key.endswith("_bytes") and _is_number(value):
        return f"{value / 2**30:.2f} GiB"
    text = str(value)[:12] if key.endswith("_sha256") else _show(value)
    return text if len(text) <= most else f"{text[:most]}…"


def _show(value) -> str:
    if isinstance(value, (dict, list)):
        parts = [f"{k} {_show(x)}" for k, x in value.items()] if isinstance(value, dict) else map(_show, value)
        return ", ".join(parts) or "none"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "–" if value is None else f"{value:,}" if type(value) is int else str(value)


def _short(n: float) -> str:
    """Return a count in a few characters: 950, 12k, 1.5M, 3B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.3g}{letter}"
    return f"{n:.3g}"
