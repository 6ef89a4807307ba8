"""Trains the arms of a study beside each other and tells which one wins.

    python scripts/experiment.py run --study=quality --lrs=0.006,0.012 --seeds=0,1,2
    python scripts/experiment.py table --study=quality

Studies and arms are plain data in scripts/studies.py. Every arm is trained by the product's own loop, in a process of
its own; its line in docs/results/STUDY.jsonl is written when it is done, and what has a line is not done again: stop
the command (Ctrl-C) and start it again as you like. Arms of one seed start from the same draw of data, in the same
order, and are measured on the same held-out text, so that differences are taken within a seed.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

import studies

from configs import default
from lowrank_jax import cli, costs, stages, train, workdir
from lowrank_jax.config import RunConfig, RunFailure, UsageError
from lowrank_jax.data import stream, tokenizer

ROOT = os.path.abspath(sys.path[0])
RESULTS = os.path.join(ROOT, "docs", "results")


def command(argv: list[str]) -> dict | None:
    parser = cli.Parser(__doc__)
    parser.add_argument("action", choices=("run", "one", "table"), help="one: a single arm, in this process")
    parser.add_argument("--study", required=True, choices=studies.STUDIES)
    parser.add_argument("--arms", default="", help="names, with commas between (default: all)")
    parser.add_argument("--lrs", default="", help="learning rates (default: the study's)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--folder", default="runs/experiment", help="where the runs are kept")
    parser.add_argument("--results", default=RESULTS, help="where the lines are kept")
    args = parser.parse_args(argv)
    if args.action == "table":
        print(table(args.study, read_results(args.results, args.study)), flush=True)
        return None
    tasks = asked(args)
    if args.action == "one":
        one(args.study, *tasks[0], args.folder)
        return None
    done = {key(row) for row in read_results(args.results, args.study)}
    for task in tasks:
        if task not in done:
            row = in_a_process(args, *task)
            workdir.append(args.results, f"{args.study}.jsonl", row)
            cli.say(f"{args.study}: {task[0]}, lr {task[1]}, seed {task[2]}: {row['bits_per_byte']:.4f} bits per byte")
    return {"study": args.study, "runs": len(tasks)}


def asked(args: argparse.Namespace) -> list[tuple[str, float, int]]:
    """(arm, learning rate, seed) of every run asked for: seed by seed, so that each seed is a whole table early."""
    study = studies.STUDIES[args.study]
    names = [name.strip() for name in args.arms.split(",") if name.strip()]
    for name in names:
        if name not in study["arms"]:
            raise UsageError(f"--arms={name} is not one of {', '.join(study['arms'])}")
    try:
        lrs = [float(x) for x in args.lrs.split(",") if x] or list(study["lrs"])
        seeds = [int(x) for x in args.seeds.split(",")]
    except ValueError:
        raise UsageError("--lrs and --seeds must be numbers with commas between") from None
    return [(arm, lr, seed) for seed, lr, arm in itertools.product(seeds, lrs, names or study["arms"])]


def key(row: dict) -> tuple[str, float, int]:
    return row["arm"], row["lr"], row["seed"]


def read_results(folder: str, study: str) -> list[dict]:
    """The lines of a study, the last one of each run."""
    return list({key(row): row for row in workdir.read_rows(folder, f"{study}.jsonl")}.values())


# --------------------------------------------------------------------------------------------------------------- runs


def config_of(study: str, arm: str, lr: float = 1e-2, seed: int = 0, tokenizer_path: str = "") -> RunConfig:
    """The config of one run, as the command line would make it."""
    values = default.get_config()
    changes = studies.STUDIES[study]["settings"] | studies.STUDIES[study]["arms"][arm]
    changes |= {"pretrain.sources": studies.TEXT, "pretrain.lr": lr, "seed": seed}
    changes |= {"tokenizer.path": tokenizer_path, "tokenizer.vocab_size": studies.VOCAB}
    for name, value in changes.items():
        if name != "variant":
            *groups, last = name.split(".")
            holder = values[groups[0]] if groups else values
            holder[last] = value
    return RunConfig.from_dict(values.to_dict())


def one(study: str, arm: str, lr: float, seed: int, folder: str) -> None:
    """Trains a run to its end, in this process, which its variant then has changed for good."""
    studies.apply(studies.STUDIES[study]["arms"][arm].get("variant", ""))
    train.run(config_of(study, arm, lr, seed, learnt_tokenizer(folder)), folder_of(folder, study, arm, lr, seed))


def learnt_tokenizer(folder: str) -> str:
    """The folder of the pieces that all runs share, learnt from the studies' text where they are not there yet."""
    path = os.path.join(folder, "tokenizer")
    if not os.path.isdir(path):
        study = next(iter(studies.STUDIES))
        phase = config_of(study, studies.STUDIES[study]["reference"]).pretrain
        tokenizer.train(stream.texts([phase], 8_000_000), studies.VOCAB).save(f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    return path


def folder_of(folder: str, study: str, arm: str, lr: float, seed: int) -> str:
    return os.path.join(folder, study, f"{arm.replace(' ', '-').replace('/', '_')}-{lr:g}-{seed}")


def in_a_process(args: argparse.Namespace, arm: str, lr: float, seed: int) -> dict:
    """Runs `one` in a child, which gets the signals that come meanwhile; returns the run's line of results."""
    learnt_tokenizer(args.folder)
    flags = [f"--study={args.study}", f"--arms={arm}", f"--lrs={lr}", f"--seeds={seed}", f"--folder={args.folder}"]
    child = subprocess.Popen(
        [sys.executable, os.path.abspath(__file__), "one", *flags], cwd=ROOT, stdout=sys.stderr, process_group=0
    )
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda number, _: child.send_signal(number)) for number in numbers}
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    for number, handler in before.items():
        signal.signal(number, handler)
    if child.returncode:
        if child.returncode in (-signal.SIGTERM, -signal.SIGINT, 143, 130):
            sys.exit(130)
        raise RunFailure(f"{arm}, lr {lr}, seed {seed} ended with status {child.returncode}")
    folder = folder_of(args.folder, args.study, arm, lr, seed)
    row = {"study": args.study, "arm": arm, "lr": lr, "seed": seed, **measured(folder)}
    row |= {"cpu_seconds": round(used.ru_utime + used.ru_stime, 1) if row.pop("starts") == 1 else None}
    row |= {"peak_rss_bytes": used.ru_maxrss * 1024, **provenance()}
    row["command"] = " ".join(["python scripts/experiment.py run", *(f'"{f}"' if " " in f else f for f in flags[:4])])
    if not studies.STUDIES[args.study].get("keep"):
        shutil.rmtree(os.path.join(folder, "checkpoints"))
    return row


def measured(folder: str) -> dict:
    """What a finished run tells of itself. `step_seconds` is the median over groups of ten steps."""
    rows, events = workdir.read_rows(folder, "metrics.jsonl"), workdir.read_rows(folder, "events.jsonl")
    config, finish = workdir.read_config(folder), next(e for e in reversed(events) if e["event"] == "finish")
    trained, held = [row for row in rows if "split" not in row], [row for row in rows if "split" in row]
    counts, flops = costs.parameters(config.model), flops_of(config)
    seconds = [config.pretrain.tokens_per_step / row["tokens_per_s"] for row in trained]
    facts = {"bits_per_byte": held[-1]["bits_per_byte"], "loss": held[-1]["eval_loss"], "steps": finish["step"]}
    facts |= {"tokens": finish["tokens"], "parameters": counts["total"], "attention": counts["attention"]}
    facts |= {"flops": flops, "flops_per_token": flops / finish["tokens"]}
    facts |= {
        "step_seconds": round(statistics.median(seconds), 4),
        "starts": sum(e["event"] == "start" for e in events),
    }
    facts |= {"skipped": trained[-1]["skipped"], "data_sha256": finish["data_sha256"]}
    return facts | {"tokenizer_sha256": tokenizer.load(workdir.tokenizer_folder(folder)).sha256}


def flops_of(config: RunConfig) -> float:
    """FLOPs of all the training that a config asks for."""
    each = (
        s.steps * s.tokens_per_step * costs.train_flops_per_token(config.model, s.seq_len) for s in stages.plan(config)
    )
    return float(sum(each))


def provenance() -> dict:
    git = lambda *args: subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    changed = git("status", "--porcelain", "--", "lowrank_jax", "scripts", "configs")
    commit = git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    return {"commit": commit, "python": platform.python_version(), "time": round(time.time())}


# ------------------------------------------------------------------------------------------------------------- tables


def table(study: str, rows: list[dict]) -> str:
    """Every arm at every learning rate: mean and deviation over the seeds, and the difference to the reference.

    The difference is between the arm and the reference, each at the learning rate that suits it best, seed by seed.
    """
    reference = studies.STUDIES[study]["reference"]
    by_run = {key(row): row for row in rows}
    lrs = sorted({lr for _, lr, _ in by_run})
    arms = [arm for arm in studies.STUDIES[study]["arms"] if any(name == arm for name, _, _ in by_run)]
    head = ["arm", "parameters", "attention", "TFLOP", *(f"lr {lr:g}" for lr in lrs), f"less {reference}", "seeds"]
    lines = [head]
    for arm in arms:
        some = next(row for row in rows if row["arm"] == arm)
        cells = [_spread([row["bits_per_byte"] for row in _of(rows, arm, lr)]) for lr in lrs]
        sizes = [f"{some['parameters'] / 1e6:.2f}M", f"{some['attention'] / 1e6:.2f}M", f"{some['flops'] / 1e12:.1f}"]
        differences = paired(rows, arm, reference)
        lines.append([arm, *sizes, *cells, _spread(differences, "{:+.4f}"), str(len(differences))])
    return _markdown(lines)


def paired(rows: list[dict], arm: str, reference: str) -> list[float]:
    """Bits per byte of an arm less the reference's, for every seed that both have, each at its best learning rate."""
    at = {name: {row["seed"]: row for row in _of(rows, name, best_lr(rows, name))} for name in (arm, reference)}
    seeds = sorted(set(at[arm]) & set(at[reference]))
    for seed in seeds:
        a, b = at[arm][seed], at[reference][seed]
        if a["tokens"] == b["tokens"] and a["data_sha256"] != b["data_sha256"]:
            raise RunFailure(f"{arm} has read other data than {reference} with seed {seed}: nothing can be compared")
    return [at[arm][seed]["bits_per_byte"] - at[reference][seed]["bits_per_byte"] for seed in seeds]


def best_lr(rows: list[dict], arm: str) -> float:
    """The learning rate with the lowest mean; of those with the most seeds, so that no lucky seed decides."""
    lrs = {row["lr"] for row in rows if row["arm"] == arm}
    if not lrs:
        return 0.0
    most = max(len(_of(rows, arm, lr)) for lr in lrs)
    whole = [lr for lr in lrs if len(_of(rows, arm, lr)) == most]
    return min(whole, key=lambda lr: statistics.mean(row["bits_per_byte"] for row in _of(rows, arm, lr)))


def _of(rows: list[dict], arm: str, lr: float) -> list[dict]:
    return [row for row in rows if (row["arm"], row["lr"]) == (arm, lr)]


def _spread(values: list[float], form: str = "{:.4f}") -> str:
    if not values:
        return "–"
    shown = form.format(statistics.mean(values))
    return f"{shown} ± {statistics.stdev(values):.4f}" if len(values) > 1 else shown


def _markdown(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in lines)


if __name__ == "__main__":
    cli.main(command)
