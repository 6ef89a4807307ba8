"""Trains the arms of a study beside each other and tells which one wins.

    python scripts/studies/experiment.py run --study=quality --lrs=0.0015,0.003,0.006 --seeds=0,1,2
    python scripts/studies/experiment.py table --study=quality
    python scripts/studies/experiment.py publish    # every study that has results, into docs/results.md, with plots

Studies and arms are plain data in scripts/studies/arms.py. The product's own loop trains every arm in a process of its
own; its line in docs/results/STUDY.jsonl is written when it is done, and what has a line is not done again: stop
the command (Ctrl-C) and start it again as you like. Arms of one seed start from the same draw of data, in the same
order, and are measured on the same held-out text, so that differences are taken within a seed.
"""

import argparse
import functools
import itertools
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

import jax
import jax.numpy as jnp
import numpy as np

from configs import default
from lowrank_jax import cli
from lowrank_jax.config import RunConfig, RunFailure, UsageError
from lowrank_jax.data import stream, tokenizer
from lowrank_jax.machine import console
from lowrank_jax.model import costs, network
from lowrank_jax.training import loop, run_folder, trained
from lowrank_jax.training.plan import stages_of
from scripts.studies import arms, tables

ROOT = os.path.abspath(sys.path[0])
RESULTS = os.path.join(ROOT, "docs", "results")


def command(argv: list[str]) -> dict | None:
    parser = cli.Parser(__doc__)
    parser.add_argument("action", choices=("run", "one", "table", "publish"), help="one: a run in this process")
    parser.add_argument("--study", default="quality", choices=arms.STUDIES)
    parser.add_argument("--arms", default="", help="names, with commas between (default: all)")
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
    tasks = asked(args)
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


def asked(args: argparse.Namespace) -> list[tuple[str, float, int]]:
    """(arm, learning rate, seed) of every run asked for: seed by seed, so that each seed is a whole table early."""
    study = arms.STUDIES[args.study]
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


# --------------------------------------------------------------------------------------------------------------- runs


def config_of(study: str, arm: str, lr: float = 1e-2, seed: int = 0, tokenizer_path: str = "") -> RunConfig:
    """The config of one run, as the command line would make it."""
    values = default.get_config()
    changes = arms.changes(study, arm) | {"pretrain.lr": lr, "seed": seed}
    changes |= {"tokenizer.path": tokenizer_path, "tokenizer.vocab_size": arms.VOCAB}
    for name, value in changes.items():
        if name != "variant":
            *groups, last = name.split(".")
            holder = values[groups[0]] if groups else values
            holder[last] = value
    return RunConfig.from_dict(values.to_dict())


def one(study: str, arm: str, lr: float, seed: int, folder: str) -> None:
    """Trains a run to its end, in this process, which its variant then has changed for good."""
    arms.apply(arms.changes(study, arm).get("variant", ""))
    home = folder_of(folder, study, arm, lr, seed)
    loop.run(config_of(study, arm, lr, seed, learnt_tokenizer(folder)), home)
    if lengths := arms.STUDIES[study].get("lengths"):
        run_folder.write_text(os.path.join(home, "lengths.json"), json.dumps(by_length(home, lengths)))


def learnt_tokenizer(folder: str) -> str:
    """The folder of the pieces that all runs share, learnt from the studies' text where they are not there yet."""
    path = os.path.join(folder, "tokenizer")
    if not os.path.isdir(path):
        study = next(iter(arms.STUDIES))
        phase = config_of(study, arms.STUDIES[study]["reference"]).pretrain
        tokenizer.train(stream.texts([phase], 8_000_000), arms.VOCAB).save(f"{path}.tmp")
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
    row["command"] = " ".join(
        ["python scripts/studies/experiment.py run", *(f'"{f}"' if " " in f else f for f in flags[:4])]
    )
    if not arms.STUDIES[args.study].get("keep"):
        shutil.rmtree(os.path.join(folder, "checkpoints"))
    return row


def measured(folder: str) -> dict:
    """What a finished run tells of itself. `step_seconds` is the median over groups of ten steps."""
    rows, events = run_folder.read_rows(folder, "metrics.jsonl"), run_folder.read_rows(folder, "events.jsonl")
    config, finish = run_folder.read_config(folder), next(e for e in reversed(events) if e["event"] == "finish")
    done, held = [row for row in rows if "split" not in row], [row for row in rows if "split" in row]
    counts, flops = costs.parameters(config.model), flops_of(config)
    seconds = [config.pretrain.tokens_per_step / row["tokens_per_s"] for row in done]
    facts = {"bits_per_byte": held[-1]["bits_per_byte"], "loss": held[-1]["eval_loss"], "steps": finish["step"]}
    facts |= {"tokens": finish["tokens"], "parameters": counts["total"], "attention": counts["attention"]}
    facts |= {"flops": flops, "flops_per_token": flops / finish["tokens"]}
    facts |= {
        "step_seconds": round(statistics.median(seconds), 4),
        "starts": sum(e["event"] == "start" for e in events),
    }
    facts |= {"rows": [[s.steps, s.batch, s.seq_len] for s in stages_of(config)]}
    facts |= {"skipped": done[-1]["skipped"], "data_sha256": finish["data_sha256"]}
    facts |= {"tokenizer_sha256": tokenizer.load(run_folder.tokenizer_folder(folder)).sha256}
    facts |= {"curve": curve(config, done, held)} if len(held) > 2 else {}
    if not os.path.isfile(os.path.join(folder, "lengths.json")):
        return facts
    with open(os.path.join(folder, "lengths.json"), encoding="utf-8") as f:
        return facts | {"lengths": json.load(f)}


def curve(config: RunConfig, done: list[dict], held: list[dict]) -> list[dict]:
    """At each evaluation: FLOPs and seconds of the steps until then, at their stage's median, and bits per byte."""
    plan, points = stages_of(config), []
    typical = {
        s.name: statistics.median(s.tokens_per_step / r["tokens_per_s"] for r in done if r["stage"] == s.name)
        for s in plan
    }
    for row in held:
        so_far = {s.name: min(max(row["step"] - s.start, 0), s.steps) for s in plan}
        flops = sum(
            so_far[s.name] * s.tokens_per_step * costs.train_flops_per_token(config.model, s.seq_len) for s in plan
        )
        seconds = sum(so_far[s.name] * typical[s.name] for s in plan)
        points.append(
            {"step": row["step"], "flops": flops, "seconds": round(seconds, 2), "bits_per_byte": row["bits_per_byte"]}
        )
    return points


# ------------------------------------------------------------------------------------------------------------- lengths


BLOCKS = 8  # of the longest length, of each kind of text
EDGES = (0, 256, 512, 1024, 2048, 4096)  # of the positions whose losses are told apart


def by_length(folder: str, lengths: tuple[int, ...]) -> dict:
    """{kind of text: {length: [bits per byte of all, then by position in the longest row]}} for the same targets.

    Blocks of the longest length, each out of one document, are cut into rows of each length. "window" is the longest
    length with attention to the last `lengths[0]` tokens only; after it this process can measure nothing else.
    """
    run, found = trained.open_run(folder), {}
    texts = {kind: blocks(run.tokenizer, texts, max(lengths)) for kind, texts in arms.unseen().items()}
    for length in lengths:
        for kind, ids in texts.items():
            found.setdefault(kind, {})[str(length)] = bits(run, ids, length)
    jax.clear_caches()
    arms.see_only(lengths[0])
    for kind, ids in texts.items():
        found[kind]["window"] = bits(run, ids, max(lengths))
    return found


def blocks(tok: tokenizer.Tokenizer, texts: list[str], length: int) -> np.ndarray:
    """[BLOCKS, length + 1] ids: the beginnings of texts that are long enough."""
    ids = (tok.encode(text[: 12 * length])[: length + 1] for text in texts)
    return np.asarray(list(itertools.islice((x for x in ids if len(x) > length), BLOCKS)), np.int32)


def bits(run: trained.Trained, ids: np.ndarray, length: int) -> list[float]:
    """Bits per byte of ids [block, size + 1] in rows of `length`: of all, and of the positions between two EDGES."""
    rows = lambda x: x.reshape(-1, length)
    tokens, targets = rows(ids[:, :-1]), rows(ids[:, 1:])
    many = max(1, 8192 // length)
    parts = [
        losses(run.config.model, run.params, tokens[i : i + many], targets[i : i + many])
        for i in range(0, len(tokens), many)
    ]
    nats = np.concatenate(parts).reshape(len(ids), -1)
    size = run.tokenizer.byte_lengths()[ids[:, 1:]]
    spans = [(0, nats.shape[1]), *((a, b) for a, b in zip(EDGES, EDGES[1:]) if b <= nats.shape[1])]
    return [float(nats[:, a:b].sum() / math.log(2) / size[:, a:b].sum()) for a, b in spans]


@functools.partial(jax.jit, static_argnums=0)
def losses(c, params: dict, tokens_BT, targets_BT) -> jax.Array:
    """[B, T] nats of each target."""
    logits_BTV = network.logits(c, params, network.features(c, params, tokens_BT))
    picked = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - picked


def flops_of(config: RunConfig) -> float:
    """FLOPs of all the training that a config asks for."""
    each = (
        s.steps * s.tokens_per_step * costs.train_flops_per_token(config.model, s.seq_len) for s in stages_of(config)
    )
    return float(sum(each))


def provenance() -> dict:
    git = lambda *args: subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    changed = git("status", "--porcelain", "--", "lowrank_jax", "scripts", "configs")
    commit = git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    return {"commit": commit, "python": platform.python_version(), "time": round(time.time())}


if __name__ == "__main__":
    cli.main(command)
