"""A run on one page: loss.png and report.html, made from the run's folder alone.

python -m lowrank_jax.report --workdir=runs/quickstart
"""

import base64
import collections
import datetime
import html
import json
import math
import os

import matplotlib
import matplotlib.figure
import matplotlib.ticker
import numpy as np

from lowrank_jax.config import UsageError
from lowrank_jax.training import forecast, plan_table, run_folder
from lowrank_jax.training.plan import make

COLORS = {"pretrain": "#1f5a94", "sft": "#b4531f"}
POINTS = 300  # of a line: more of them are drawn faintly behind their means
TROUBLE = ("skip", "oom", "retry", "restore", "restore_failed", "fallback", "preempt")  # told with their facts
ROUTINE = ("save", "sample", "fp8_check")  # not told one by one
EACH, LATEST = 10, 30  # events shown of each such kind, and of all others; events.jsonl has every one
CHARACTERS = 160  # of one fact


def write(folder: str) -> dict:
    """Writes loss.png and report.html; returns their paths. Raises UsageError where nothing was trained yet."""
    config, rows = run_folder.read_config(folder), run_folder.read_rows(folder, "metrics.jsonl")
    if not rows:
        raise UsageError(f"--workdir={folder} has no metrics yet")
    events, described = run_folder.read_rows(folder, "events.jsonl"), forecast.describe(config, make(config))
    picture, page = os.path.join(folder, "loss.png"), os.path.join(folder, "report.html")
    _figure(rows, events, described["stages"]).savefig(picture, dpi=150)
    with open(picture, "rb") as f:
        image = base64.b64encode(f.read()).decode()
    samples = [_sample(event) for event in events if event["event"] == "sample"]
    latest = [event for event in events if event["event"] not in TROUBLE + ROUTINE]
    sections = [
        ("Training", f'<div class="wide"><img alt="curves by tokens" src="data:image/png;base64,{image}"></div>'),
        ("Held-out text", _table(_eval_summary(_split(rows)[1]))),
        ("Stage switches", _table(_switches(events, described["stages"])) + _saving(rows, events)),
        ("Samples", "".join(samples) or "<p>none: set pretrain.sample and sft.sample</p>"),
        ("Plan", f'<pre class="wide">{html.escape(plan_table.text(described))}</pre>'),
        ("Events", _table(_counts(events))),
        (f"Out of the ordinary: the last {EACH} of each kind", _table([_flat(event) for event in _trouble(events)])),
        ("Latest events", _table([_flat(event) for event in latest[-LATEST:]])),
    ]
    body = "".join(f"<h2>{title}</h2>\n{content}\n" for title, content in sections)
    facts = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in _glance(rows, events).items())
    name, path = (html.escape(text) for text in (os.path.basename(os.path.abspath(folder)), os.path.abspath(folder)))
    run_folder.write_text(page, _PAGE.format(name=name, path=path, facts=facts, body=body))
    return {"report": page, "picture": picture}


def _figure(rows: list[dict], events: list[dict], stages: list[dict]) -> matplotlib.figure.Figure:
    train, evals = _split(rows)
    figure = matplotlib.figure.Figure(figsize=(7.5, 9), layout="constrained")
    loss, bits, length, speed, rate = panels = figure.subplots(5, sharex=True, height_ratios=[4, 1.6, 1, 1.2, 1.2])
    for phase in dict.fromkeys(row["phase"] for row in rows):
        color = COLORS.get(phase, "#555555")
        mine, held = ([row for row in some if row["phase"] == phase] for some in (train, evals))
        _line(loss, mine, "loss", color, phase)
        for axes, key, label in ((loss, "eval_loss", f"{phase}, held out"), (bits, "bits_per_byte", None)):
            x, y = _tokens(train, [row["step"] for row in held]), [row[key] for row in held]
            axes.plot(x, y, "o-", color=color, mfc="white", ms=4, lw=1, label=label)
        _line(speed, mine, "tokens_per_s", color)
        _line(rate, mine, "lr", color)
    length.plot(*_series(train, "seq_len"), color="#333333", lw=1.2, drawstyle="steps-pre")
    refused = sorted({e["step"] for e in events if e["event"] == "skip" and "source" not in e})
    if refused:
        x, low = _tokens(train, refused), {"transform": loss.get_xaxis_transform()}
        loss.plot(x, [0.02] * len(x), "|", color="#b00020", label="skipped update", **low)
    _mark_stages(panels, train, stages)
    length.set_yscale("log", base=2)
    length.set_yticks(sorted({row["seq_len"] for row in train}), minor=False)
    length.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%d"))
    for axes in (speed, rate):
        axes.set_ylim(bottom=0)
    for axis in (rate.xaxis, speed.yaxis):
        axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda n, _: _short(n)))
    loss.legend(fontsize=8, frameon=False, loc="upper right", bbox_to_anchor=(1, 0.9))
    rate.set_xlabel("tokens", fontsize=8.5)
    for axes, label in zip(panels, ("loss (nats a token)", "bits a byte", "length", "tokens/s", "learning rate")):
        axes.set_ylabel(label, fontsize=8.5)
        axes.tick_params(labelsize=8, color="#999999")
        axes.grid(axis="y", color="#eeeeee", lw=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    return figure


def _line(axes, rows: list[dict], key: str, color: str, label: str | None = None) -> None:
    x, y = _series(rows, key)
    if len(x) > POINTS:
        axes.plot(x, y, color=color, lw=0.5, alpha=0.25)
        x, y = ([part.mean() for part in np.array_split(values, POINTS)] for values in (x, y))
    axes.plot(x, y, color=color, lw=1.2, label=label)


def _split(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """The rows of training, and those of evaluations."""
    return [row for row in rows if "split" not in row], [row for row in rows if "split" in row]


def _series(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and values of the rows that have one (the loss of a skipped update may be null)."""
    some = [row for row in rows if row.get(key) is not None]
    return np.array([row["tokens"] for row in some]), np.array([row[key] for row in some])


def _mark_stages(panels, train: list[dict], stages: list[dict]) -> None:
    seen = {row["stage"] for row in train}
    for i, stage in enumerate(stage for stage in stages if stage["name"] in seen):
        x, at = _tokens(train, stage["start"]), (0, -10 * (i % 3))  # three heights, as short stages stand close
        for axes in panels:
            axes.axvline(x, color="#aaaaaa", lw=0.7, ls=":")
        name = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top", "fontsize": 7.5}
        panels[0].annotate(f" {stage['name']}", (x, 1), at, color="#555555", **name)


def _tokens(train: list[dict], steps):
    """The tokens trained on up to a step, or each of several: exact at logged steps, and between two of one stage."""
    known = [(0, 0), *((row["step"], row["tokens"]) for row in train)]
    return np.interp(steps, *zip(*known))


def _glance(rows: list[dict], events: list[dict]) -> dict:
    train, evals = _split(rows)
    last = [event["event"] for event in events if event["event"] in ("start", "preempt", "finish")][-1:]
    state = {"finish": "finished", "preempt": "stopped by a signal"}.get("".join(last), "not finished")
    facts = {"state": state, "steps": _show(rows[-1]["step"]), "tokens": _short(_tokens(train, rows[-1]["step"]))}
    losses, speeds = _series(train, "loss")[1], _series(train, "tokens_per_s")[1]
    if len(losses):
        facts |= {"last loss": f"{losses[-1]:.3f}", "median tokens/s": _short(np.median(speeds))}
    return facts | {f"{row['split']}, bits a byte": f"{row['bits_per_byte']:.3f}" for row in evals}


def _eval_summary(evals: list[dict]) -> list[dict]:
    summary = []
    for split in dict.fromkeys(row["split"] for row in evals):
        bits = [row["bits_per_byte"] for row in evals if row["split"] == split]
        fall = f"{1 - bits[-1] / bits[0]:.1%}" if bits[0] else "–"
        shown = {name: f"{value:.3f}" for name, value in (("first", bits[0]), ("best", min(bits)), ("last", bits[-1]))}
        summary.append({"bits a byte of": split, "evaluations": len(bits)} | shown | {"fell by": fall})
    return summary


def _switches(events: list[dict], stages: list[dict]) -> list[dict]:
    lengths = {stage["name"]: stage["seq_len"] for stage in stages}
    table = []
    for event in (event for event in events if event["event"] == "stage"):
        made = [e for e in events if e["event"] == "compile" and e.get("stage") == event["stage"]]
        length = event.get("seq_len") or lengths.get(event["stage"])
        row = {"step": event["step"], "stage": event["stage"], "length": length}
        row |= {"compile, s": event.get("compile_seconds"), "stall, s": event.get("stall_seconds")}
        row |= {"stall, ordinary steps": event.get("stall_steps")}
        table.append(row | ({"peak memory": _fact("peak_bytes", made[-1].get("peak_bytes"))} if made else {}))
    return table


def _saving(rows: list[dict], events: list[dict]) -> str:
    blocked = [event["blocked_seconds"] for event in events if event.get("blocked_seconds") is not None]
    train = [row for row in rows if row.get("tokens_per_s")]
    trained = np.diff([0, *(row["tokens"] for row in train)]) @ [1 / row["tokens_per_s"] for row in train]
    if not blocked:
        return ""
    share = f", {sum(blocked) / trained:.2%} of the {_show(trained)} s that its steps took" if trained else ""
    return f"<p>{_show(len(blocked))} saves held up training for {_show(sum(blocked))} s in all{share}.</p>"


def _counts(events: list[dict]) -> list[dict]:
    kinds = collections.Counter(event["event"] for event in events)
    last = {event["event"]: event["step"] for event in events}
    return [{"event": kind, "count": count, "last at step": last[kind]} for kind, count in kinds.most_common()]


def _trouble(events: list[dict]) -> list[dict]:
    kept = [event for kind in TROUBLE for event in [e for e in events if e["event"] == kind][-EACH:]]
    return sorted(kept, key=lambda event: event["time"])


def _flat(event: dict) -> dict:
    at = datetime.datetime.fromtimestamp(event["time"], datetime.UTC)
    facts = [f"{k} {_fact(k, v)}" for k, v in event.items() if k not in ("event", "step", "time")]
    shown = {"step": event["step"], "event": event["event"], "facts": ", ".join(facts)}
    return shown | {"UTC": f"{at:%Y-%m-%d %H:%M:%S}"}


def _sample(event: dict) -> str:
    prompt, text = html.escape(event["prompt"]), html.escape(event["text"])
    return f"<p>step {event['step']:,}, after {event['phase']}</p><pre><b>{prompt}</b> {text}</pre>"


def _table(rows: list[dict]) -> str:
    if not rows:
        return "<p>none</p>"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    kinds = {c: "text" if any(isinstance(row.get(c), str) for row in rows) else "number" for c in columns}
    kinds |= {"facts": "facts"}
    line = lambda tag, shown: "".join(f'<{tag} class="{kinds[c]}">{html.escape(shown[c])}</{tag}>' for c in columns)
    body = "".join(f"<tr>{line('td', {c: _show(row.get(c)) for c in columns})}</tr>\n" for row in rows)
    return f'<div class="wide"><table><tr>{line("th", dict(zip(columns, columns)))}</tr>\n{body}</table></div>'


def _fact(key: str, value) -> str:
    if key.endswith("_bytes") and isinstance(value, (int, float)):
        return f"{value / 2**30:.2f} GiB"
    if key.endswith("_sha256"):
        return str(value)[:12]
    text = _show(value)
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]}…"


def _show(value) -> str:
    if value is None:
        return "–"
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False) if value else "none"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _short(n: float) -> str:
    """A count in a few characters: 950, 12k, 1.5M, 3B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.3g}{letter}"
    return f"{n:.3g}"


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<style>
:root {{ color-scheme: light }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff }}
h1 {{ font-size: 1.5rem; margin-bottom: 0 }} h2 {{ font-size: 1.1rem; margin: 2.5rem 0 .5rem }}
h1, .path {{ overflow-wrap: anywhere }} .path {{ color: #666; margin: 0; font-size: .85rem }}
dl {{ display: flex; flex-wrap: wrap; gap: .75rem 2rem }} dt {{ color: #666; font-size: .8rem }}
dd {{ margin: 0; font-size: 1.15rem }}
.wide {{ overflow-x: auto }} img {{ width: 100%; min-width: 36rem; display: block }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }}
td, th {{ border-bottom: 1px solid #e3e3e3; padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top }}
td, th {{ white-space: nowrap }} td.facts {{ white-space: normal; min-width: 13rem; overflow-wrap: anywhere }}
th {{ color: #666; font-weight: 600; font-size: .8rem }} .number {{ text-align: right }}
pre {{ font-size: .8rem; white-space: pre-wrap; background: #f7f7f7; padding: 1rem; margin: .5rem 0 }}
pre.wide {{ white-space: pre }}
</style>
<h1>{name}</h1><p class="path">{path}</p>
<dl>{facts}</dl>
{body}
"""
