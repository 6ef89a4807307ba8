"""A run on one page: loss.png and report.html, made from the run's folder alone.

python -m lowrank_jax.report --workdir=runs/quickstart
"""

import base64
import html
import os

import matplotlib
import matplotlib.figure

from lowrank_jax import cli, plan, workdir
from lowrank_jax.config import UsageError


def write(folder: str) -> dict:
    """Writes loss.png and report.html; returns their paths. Raises UsageError where nothing was trained yet."""
    config, rows = workdir.read_config(folder), workdir.read_rows(folder, "metrics.jsonl")
    if not rows:
        raise UsageError(f"--workdir={folder} has no metrics yet")
    picture, page = os.path.join(folder, "loss.png"), os.path.join(folder, "report.html")
    _plot(rows, picture)
    with open(picture, "rb") as f:
        image = base64.b64encode(f.read()).decode()
    evals = [row for row in rows if "split" in row]
    events = [event for event in workdir.read_rows(folder, "events.jsonl") if event["event"] != "save"]
    samples = [event for event in events if event["event"] == "sample"]
    sections = [
        ("Loss", f'<img alt="loss by step" src="data:image/png;base64,{image}">'),
        ("Held-out text", _table(_eval_summary(evals))),
        ("Samples", "".join(_sample(event) for event in samples) or "<p>none: set pretrain.sample and sft.sample</p>"),
        ("Plan", f'<pre class="table">{html.escape(plan.table(plan.describe(config)))}</pre>'),
        ("Events", _table([_flat(event) for event in events[-40:] if event not in samples])),
    ]
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections)
    workdir.write_text(page, _PAGE.format(name=html.escape(os.path.abspath(folder)), body=body))
    return {"report": page, "picture": picture}


def _plot(rows: list[dict], path: str) -> None:
    figure = matplotlib.figure.Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    train = [row for row in rows if "loss" in row]
    for phase in dict.fromkeys(row["phase"] for row in train):
        mine = [row for row in train if row["phase"] == phase]
        (line,) = axes.plot([r["step"] for r in mine], [r["loss"] for r in mine], lw=0.8, alpha=0.6, label=phase)
        held = [row for row in rows if row.get("split") == phase]
        steps, losses = [r["step"] for r in held], [r["eval_loss"] for r in held]
        axes.plot(steps, losses, "o-", ms=3, color=line.get_color(), label=f"{phase}, held out")
    for i, name in enumerate(dict.fromkeys(row["stage"] for row in train)):
        start = next(row["step"] for row in train if row["stage"] == name)
        axes.axvline(start, color="grey", lw=0.5, ls=":")
        axes.annotate(name, (start, 1 - 0.06 * (i % 3)), xycoords=("data", "axes fraction"), fontsize=7, va="top")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.legend()
    figure.savefig(path, dpi=120)


def _eval_summary(evals: list[dict]) -> list[dict]:
    summary = []
    for split in dict.fromkeys(row["split"] for row in evals):
        mine = [row for row in evals if row["split"] == split]
        first, last = mine[0]["bits_per_byte"], mine[-1]["bits_per_byte"]
        fall = f"{1 - last / first:.1%}" if first else "-"
        summary.append({"split": split, "first": f"{first:.3f}", "last": f"{last:.3f}", "bits per byte fell by": fall})
    return summary


def _sample(event: dict) -> str:
    prompt, text = html.escape(event["prompt"]), html.escape(event["text"])
    return f"<p>step {event['step']}, after {event['phase']}</p><pre><b>{prompt}</b> {text}</pre>"


def _flat(event: dict) -> dict:
    facts = ", ".join(f"{k} {v}" for k, v in event.items() if k not in ("event", "step", "time"))
    return {"step": event["step"], "event": event["event"], "facts": facts}


def _table(rows: list[dict]) -> str:
    if not rows:
        return "<p>none</p>"
    cells = lambda tag, values: "".join(f"<{tag}>{html.escape(str(v))}</{tag}>" for v in values)
    body = "".join(f"<tr>{cells('td', row.values())}</tr>" for row in rows)
    return f"<table><tr>{cells('th', rows[0])}</tr>{body}</table>"


_PAGE = """<!doctype html>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>lowrank_jax: {name}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
h1 {{ font-size: 1.3rem; overflow-wrap: anywhere }} h2 {{ font-size: 1.1rem; margin-top: 2rem }}
img {{ max-width: 100% }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
td, th {{ border-bottom: 1px solid #ddd; padding: .25rem .75rem; text-align: left; overflow-wrap: anywhere }}
pre {{ white-space: pre-wrap; background: #f6f6f6; padding: 1rem }}
pre.table {{ white-space: pre; overflow-x: auto }}
</style>
<h1>{name}</h1>
{body}
"""


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--workdir", required=True, help="the run")
    paths = write(parser.parse_args(argv).workdir)
    print(paths["report"], flush=True)
    return paths


if __name__ == "__main__":
    cli.main(command)
