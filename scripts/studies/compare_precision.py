"""Train a config in several precisions, and compare their losses with the first one's.

    python scripts/studies/compare_precision.py --config=configs/quickstart.py --precisions=bf16,fp8 --steps=500

Each arm is a run of `python -m lowrank_jax.main` in FOLDER/PRECISION, with pretraining only and the same data. A
finished arm is not repeated, and an interrupted one resumes. Any key of the config can be set with
--config.group.key=value, such as --config.optim.name=adamw.

An arm is within 1% of the first if every 50-step mean loss and the held-out bits per byte are, and if it has not fallen
back to bf16.
"""

import math
import os
import signal
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

import numpy as np

from lowrank_jax import cli
from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.training import run_folder

ROOT = os.path.abspath(sys.path[0])
WINDOW = 50  # steps
NEAR = 0.01
ROWS = {
    f"loss, mean of the last {WINDOW} steps": ("loss", "{:.4f}"),
    "  its ratio": ("loss_ratio", "{:.4f}"),
    f"most that a {WINDOW}-step mean is off": ("apart", "{:.2%}"),
    "  after step": ("apart_at", "{}"),
    "held out, bits per byte": ("bits_per_byte", "{:.4f}"),
    "  their ratio": ("bits_ratio", "{:.4f}"),
    "looks at bf16": ("checks", "{}"),
    "  loss off by": ("loss_off", "{:.4f} to {:.4f}"),
    "  gradient off by": ("gradient_off", "{:.4f} to {:.4f}"),
    "fallbacks to bf16": ("fallbacks", "{}"),
    "skipped updates": ("skipped", "{}"),
}


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--steps", type=int, default=500, help="updates of each arm")
    parser.add_argument("--precisions", default="bf16,fp8", help="the arms; the others are compared with the first")
    parser.add_argument("--folder", default="runs/precision", help="where their runs are kept")
    args, _ = parser.parse_with_config(argv)
    names = list(dict.fromkeys(name for name in args.precisions.split(",") if name))
    if args.steps < 1 or not names:
        raise UsageError("--steps must be above 0, and --precisions name at least one")
    arms = {name: os.path.join(args.folder, name) for name in names}
    config_flags = [a for a in argv if a.startswith("--config")]
    flags = {name: config_flags + _changes(name, args.steps) for name in arms}
    for name, folder in arms.items():
        _check(folder, flags[name])
    for name, folder in arms.items():
        if not _finished(folder):
            _train([*flags[name], f"--workdir={folder}"])
    results = compare({name: read(folder, args.steps) for name, folder in arms.items()})
    print(table(results), flush=True)
    return {"steps": args.steps, "folder": args.folder, "results": results}


# --------------------------------------------------------------------------------------------------------------- runs


def _changes(precision: str, steps: int) -> list[str]:
    """Return the flags of an arm: pretraining only, for `steps` steps, with every loss in the metrics."""
    changes = {"precision": precision, "pretrain.steps": steps, "sft.steps": 0, "pretrain.sample": ""}
    changes |= {"every.log": 1, "every.eval": max(1, steps // 10)}
    return [f"--config.{key}={value}" for key, value in changes.items()]


def _check(folder: str, flags: list[str]) -> None:
    """Raise UsageError if the config cannot be used, or if the folder holds a run of another config."""
    config = cli.read_config(flags)
    if not run_folder.holds_run(folder):
        return
    for key, was, now in run_folder.differences(run_folder.read_config(folder), config):
        if key != "model.vocab":  # 0 in the config file, and resolved in the run
            raise UsageError(f"{folder} holds a run whose config.{key} is {was}, not {now}; use another --folder")


def _finished(folder: str) -> bool:
    return any(event["event"] == "finish" for event in run_folder.read_rows(folder, "events.jsonl"))


def _train(flags: list[str]) -> None:
    """Run the training command, and pass signals on to it."""
    path = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
    child = subprocess.Popen(
        [sys.executable, "-m", "lowrank_jax.main", *flags],
        env=os.environ | {"PYTHONPATH": path},
        stdout=sys.stderr,
        process_group=0,  # a terminal's SIGINT would arrive twice, and twice means at once
    )
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda number, _: child.send_signal(number)) for number in numbers}
    status = child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if status > 128:
        sys.exit(status)
    if status:
        raise RunFailure(f"the run in {flags[-1].removeprefix('--workdir=')} ended with status {status}")


# ------------------------------------------------------------------------------------------------------------ figures


def read(folder: str, steps: int) -> dict:
    """Return the figures of a finished run."""
    rows, events = run_folder.read_rows(folder, "metrics.jsonl"), run_folder.read_rows(folder, "events.jsonl")
    train, evaluated = [row for row in rows if "split" not in row], [row for row in rows if "split" in row]
    by_step = {row["step"]: row["loss"] for row in train}
    losses = np.array([by_step.get(step) for step in range(1, steps + 1)], float)  # null or missing: NaN
    windows = np.lib.stride_tricks.sliding_window_view(losses, min(WINDOW, steps))
    looks = {e["step"]: e["off_by"] for e in events if e["event"] in ("fp8_check", "fallback")}  # the last of a step
    off = {kind: [float(look[kind]) for look in looks.values()] for kind in ("loss", "gradient")}
    return {
        "means": windows.mean(axis=1),
        "bits_per_byte": evaluated[-1]["bits_per_byte"] if evaluated else float("nan"),
        "checks": len(looks),
        "loss_off": _range(off["loss"]),
        "gradient_off": _range(off["gradient"]),
        "fallbacks": len({e["step"] for e in events if e["event"] == "fallback"}),
        "skipped": train[-1]["skipped"],
        "data_sha256": next(e["data_sha256"] for e in reversed(events) if e["event"] == "finish"),
    }


def compare(arms: dict[str, dict]) -> list[dict]:
    """Return a result for each arm, compared with the first; raises RunFailure if they read different data."""
    (first_name, first), *_ = arms.items()
    results = []
    for name, arm in arms.items():
        if arm["data_sha256"] != first["data_sha256"]:
            raise RunFailure(f"{name} has read other data than {first_name}; use another --folder")
        facts, means = {key: value for key, value in arm.items() if key != "means"}, arm["means"]
        apart = np.nan_to_num(np.abs(means / first["means"] - 1), nan=np.inf)
        facts |= {"loss": _finite(means[-1]), "loss_ratio": _finite(means[-1] / first["means"][-1])}
        facts |= {"apart": _finite(apart.max()), "apart_at": int(apart.argmax()) + min(WINDOW, len(means))}
        ratio = arm["bits_per_byte"] / first["bits_per_byte"]
        facts |= {"bits_per_byte": _finite(arm["bits_per_byte"]), "bits_ratio": _finite(ratio)}
        near = apart.max() <= NEAR and abs(ratio - 1) <= NEAR and not arm["fallbacks"]  # not so for NaN
        results.append({"precision": name, **facts, "near": bool(near)})
    return results


def _range(values: list[float]) -> tuple[float, float] | None:
    finite = [x for x in values if math.isfinite(x)]
    return (min(finite), max(finite)) if finite else None


def _finite(x: float) -> float | None:
    """Return the number, or None if it is not finite: JSON has no NaN."""
    return float(x) if math.isfinite(x) else None


def table(results: list[dict]) -> str:
    """Return a table of the arms side by side."""
    first = results[0]["precision"]
    lines = [["", *(r["precision"] for r in results)]]
    for label, (key, form) in ROWS.items():
        lines.append([label, *(_cell(r[key], form) for r in results)])
    lines.append([f"within {NEAR:.0%} of {first}", *("yes" if r["near"] else "NO" for r in results)])
    widths = [max(len(cell) for cell in column) for column in zip(*lines)]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        for line in lines
    )


def _cell(value, form: str) -> str:
    if value is None:
        return "–"
    return form.format(*value) if isinstance(value, tuple) else form.format(value)


if __name__ == "__main__":
    cli.main(command)
