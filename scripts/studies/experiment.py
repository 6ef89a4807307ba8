"""Train the arms of a study and compare them.

    python scripts/studies/experiment.py run --study=quality --lrs=0.0015,0.003,0.006 --seeds=0,1,2
    python scripts/studies/experiment.py table --study=quality
    python scripts/studies/experiment.py publish    # every study that has results, into docs/results.md, with plots

Studies and arms are plain data in scripts/studies/arms.py. The product's own loop trains each arm in a process of its
own. A finished run is one line of docs/results/STUDY.jsonl and is not trained again, so the command can be stopped
(Ctrl-C) and started again. Arms of one seed read the same batches and are measured on the same held-out text:
differences are taken within a seed.
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

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

from lowrank_jax import cli
from lowrank_jax.config import RunConfig, RunFailure, UsageError
from lowrank_jax.data import stream, tokenizer
from lowrank_jax.machine import console
from lowrank_jax.model import costs
from lowrank_jax.training import loop, run_folder
from lowrank_jax.training.plan import stages_of
from scripts.studies import arms, lengths, starts, tables

ROOT = os.path.abspath(sys.path[0])
RESULTS = os.path.join(ROOT, "docs", "results")


def command(argv: list[str]) -> dict | None:
    parser = cli.Parser(__doc__)
    parser.add_argument("action", choices=("run", "one", "table", "publish"), help="one: a single run in this process")
    parser.add_argument("--study", default="quality", choices=arms.STUDIES)
    parser.add_argument("--arms", default="", help="names, separated by commas (default: all)")
    parser.add_argument("--lrs", default="", help="learning rates (default: the study's)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--folder", default="runs/experiment", help="where the runs are kept")
    parser.add_argument("--results", default=RESULTS, help="where the lines are kept")
    args = parser.parse_args(argv)
    if args.action == "table":
        print(tables.of_study(args.study, tables.read(args.results, args.study)), flush=True)
        return None
    if args.action == "publish":
        tables.publish(args.results)
        return None
    tasks = wanted_runs(args)
    if args.action == "one":
        one(args.study, *tasks[0], args.folder)
        return None
    os.makedirs(args.results, exist_ok=True)
    done = {tables.key(row) for row in tables.read(args.results, args.study)}
    for task in tasks:
        if task not in done:
            row = in_a_process(args, *task)
            run_folder.append(args.results, f"{args.study}.jsonl", row)
            console.say(
                f"{args.study}: {task[0]}, lr {task[1]}, seed {task[2]}: {row['bits_per_byte']:.4f} bits per byte"
            )
    return {"study": args.study, "runs": len(tasks)}


def wanted_runs(args: argparse.Namespace) -> list[tuple[str, float, int]]:
    """Return (arm, learning rate, seed) of every run, seed by seed: the first seed's table is complete early."""
    study = arms.STUDIES[args.study]
    names = [name.strip() for name in args.arms.split(",") if name.strip()]
    for name in names:
        if name not in study["arms"]:
            raise UsageError(f"--arms={name} is not one of {', '.join(study['arms'])}")
        arms.changes(args.study, name)
    try:
        lrs = [float(x) for x in args.lrs.split(",") if x] or list(study["lrs"])
        seeds = [int(x) for x in args.seeds.split(",")]
    except ValueError:
        raise UsageError("--lrs and --seeds must be numbers, separated by commas") from None
    return [(arm, lr, seed) for seed, lr, arm in itertools.product(seeds, lrs, names or arms.runnable(args.study))]


# --------------------------------------------------------------------------------------------------------------- runs


def one(study: str, arm: str, lr: float, seed: int, folder: str) -> None:
    """Train a run to its end in this process, from its arm's own start if it has one."""
    home, settings = folder_of(folder, study, arm, lr, seed), (study, arm, lr, seed, learnt_tokenizer(folder))
    config = arms.config_of(*settings)
    if start := arms.changes(study, arm).get("start"):
        starts.write(config, start, start_folder(home))
        config = arms.config_of(*settings, init_from=start_folder(home))
    loop.run(config, home)
    if wanted := arms.STUDIES[study].get("lengths"):
        run_folder.write_text(os.path.join(home, "lengths.json"), json.dumps(lengths.by_length(home, wanted)))


def start_folder(home: str) -> str:
    """Return the folder of a run's first weights, where its arm has a start of its own."""
    return f"{home}-start"


def learnt_tokenizer(folder: str) -> str:
    """Return the folder of the tokenizer that all runs share; the first call learns it from the studies' text."""
    path = os.path.join(folder, "tokenizer")
    if not os.path.isdir(path):
        study = next(iter(arms.STUDIES))
        phase = arms.config_of(study, arms.STUDIES[study]["reference"]).pretrain
        tokenizer.train(stream.texts([phase], 8_000_000), arms.VOCAB).save(f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    return path


def folder_of(folder: str, study: str, arm: str, lr: float, seed: int) -> str:
    return os.path.join(folder, study, f"{arm.replace(' ', '-').replace('/', '_')}-{lr:g}-{seed}")


def in_a_process(args: argparse.Namespace, arm: str, lr: float, seed: int) -> dict:
    """Run `one` in a child process, pass signals on to it, and return the run's line of results."""
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
    quoted = (f'"{flag}"' if " " in flag else flag for flag in flags[:4])
    row["command"] = " ".join(["python scripts/studies/experiment.py run", *quoted])
    shutil.rmtree(os.path.join(folder, "checkpoints"))
    shutil.rmtree(start_folder(folder), ignore_errors=True)
    return row


def measured(folder: str) -> dict:
    """Return the figures of a finished run. `step_seconds` is the median over groups of ten steps."""
    rows, events = run_folder.read_rows(folder, "metrics.jsonl"), run_folder.read_rows(folder, "events.jsonl")
    config, finish = run_folder.read_config(folder), next(e for e in reversed(events) if e["event"] == "finish")
    trained, evaluated = [row for row in rows if "split" not in row], [row for row in rows if "split" in row]
    counts, flops = costs.parameters(config.model), flops_of(config)
    seconds = [config.pretrain.tokens_per_step / row["tokens_per_s"] for row in trained]
    facts = {"bits_per_byte": evaluated[-1]["bits_per_byte"], "loss": evaluated[-1]["eval_loss"]}
    facts |= {"steps": finish["step"], "starts": sum(e["event"] == "start" for e in events)}
    facts |= {"tokens": finish["tokens"], "parameters": counts["total"], "attention": counts["attention"]}
    facts |= {"flops": flops, "flops_per_token": flops / finish["tokens"]}
    facts |= {"rows": [[s.steps, s.batch, s.seq_len] for s in stages_of(config)]}
    facts |= {"step_seconds": round(statistics.median(seconds), 4)}
    facts |= {"skipped": trained[-1]["skipped"], "data_sha256": finish["data_sha256"]}
    facts |= {"tokenizer_sha256": tokenizer.load(run_folder.tokenizer_folder(folder)).sha256}
    facts |= {"curve": curve(config, trained, evaluated)} if len(evaluated) > 2 else {}
    if not os.path.isfile(os.path.join(folder, "lengths.json")):
        return facts
    with open(os.path.join(folder, "lengths.json"), encoding="utf-8") as f:
        return facts | {"lengths": json.load(f)}


def curve(config: RunConfig, trained: list[dict], evaluated: list[dict]) -> list[dict]:
    """Return the FLOPs and seconds of the steps before each evaluation, at their stage's median, and bits per byte."""
    stages, points = stages_of(config), []
    seconds_of = lambda s: [s.tokens_per_step / row["tokens_per_s"] for row in trained if row["stage"] == s.name]
    typical = {s.name: statistics.median(seconds_of(s)) for s in stages}
    for row in evaluated:
        steps = [(s, min(max(row["step"] - s.start, 0), s.steps)) for s in stages]
        flops = sum(n * s.tokens_per_step * costs.train_flops_per_token(config.model, s.seq_len) for s, n in steps)
        point = {"step": row["step"], "flops": flops, "bits_per_byte": row["bits_per_byte"]}
        points.append(point | {"seconds": round(sum(n * typical[s.name] for s, n in steps), 2)})
    return points


def flops_of(config: RunConfig) -> float:
    """Return the FLOPs of a config's whole training."""
    per_token = lambda s: costs.train_flops_per_token(config.model, s.seq_len)
    return float(sum(s.steps * s.tokens_per_step * per_token(s) for s in stages_of(config)))


def provenance() -> dict:
    git = lambda *args: subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    changed = git("status", "--porcelain", "--", "lowrank_jax", "scripts", "configs")
    commit = git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    return {"commit": commit, "python": platform.python_version(), "time": round(time.time())}


if __name__ == "__main__":
    cli.main(command)
