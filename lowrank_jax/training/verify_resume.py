"""Kill training processes at random moments, and compare the run that they leave with an uninterrupted one."""

import collections
import contextlib
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

from lowrank_jax.config import RunFailure
from lowrank_jax.machine import faults
from lowrank_jax.machine.console import show
from lowrank_jax.training import mirror, run_folder
from lowrank_jax.training.plan import stages_of

COLUMNS = ("SIGKILL", "SIGTERM", "start-up", "training", "save", "switch", "resumed", "equal")
SPEED = re.compile(r', "(tokens_per_s|mfu|crc)": [^,}]*')  # not compared
COMPARED = ("event", "step", "tokens", "data_sha256", "params_sha256")  # of the last event
PATIENCE = 600.0  # seconds that a process may take longer than expected
TINY = """model.d=32 model.layers=1 model.heads=2 model.rank=4 tokenizer.vocab_size=512 pretrain.steps=240
pretrain.tokens_per_step=1024 pretrain.microbatch_tokens=512 pretrain.block=16 pretrain.auto_grow=True
pretrain.grow_plan=16,32,64 pretrain.grow_every_steps=80 pretrain.eval_tokens=4096 sft.steps=80
sft.tokens_per_step=1024 sft.block=64 sft.eval_tokens=4096 every.log=1 every.eval=20 every.save=17 every.fp8_check=30"""


@dataclass
class Arm:
    """A precision and an optimizer: the flags of its training command, the folder of its runs, and its kills so far."""

    folder: pathlib.Path  # named like the arm
    config: list[str]
    wanted: int  # kills
    draw: random.Random
    bucket: str = ""  # where the killed runs are, each resumed as on another host; "" for the arm's folder
    start_up: float = 0.0  # seconds that the latest process took to its first step
    training: float = 0.0  # seconds of the uninterrupted run from its first step to its end
    faults: dict[str, int] = field(default_factory=dict)  # values of LOWRANK_FAULTS still due: the steps done before
    struck: list[dict] = field(default_factory=list)


def verify_arms(folder: pathlib.Path, arms: list[Arm], seed: int) -> list[dict]:
    """Return the result of every arm, each printed as it ends; arms in results.jsonl are not trained again."""
    show(" ".join([f"{'arm':12}", *(f"{title:>8}" for title in COLUMNS)]))
    rows, earlier = [], run_folder.read_rows(str(folder), "results.jsonl")
    for arm in arms:
        identity = {"arm": arm.folder.name, "config": arm.config, "seed": seed, "asked": arm.wanted}
        row = next((row for row in earlier if identity.items() <= row.items()), None)
        if row is None:
            row = identity | verify(arm)
            run_folder.append(str(folder), "results.jsonl", row)
        rows.append(row)
        show("\n  ".join([table_row(row["arm"], [row]), *row["notes"][:5], *row["why"].splitlines()]))
    show(table_row("all", rows))
    return rows


def tiny_settings(folder: pathlib.Path, precision: str) -> list[str]:
    """Write made-up texts and return the `key=value` settings of a tiny model that reads them several times."""
    draw = random.Random(0)
    words = ["".join(draw.choices("ba ce di fo gu ha je ki lo mu".split(), k=draw.randint(1, 3))) for _ in range(300)]
    text = lambda longest: " ".join(draw.choices(words, k=draw.randint(3, longest))).capitalize() + "."
    lines = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)
    turns = lambda: [{"role": role, "content": text(12)} for role in ("user", "assistant") * draw.randint(1, 3)]
    (folder / "prose.txt").write_text("\n\n".join(text(100) for _ in range(400)))
    (folder / "notes.jsonl").write_text(lines({"text": text(100)} for _ in range(150)))
    (folder / "chats.jsonl").write_text(lines({"messages": turns()} for _ in range(200)))
    sources = f"pretrain.sources=text:{folder}/prose.txt@0.7, json:{folder}/notes.jsonl@0.3"
    wide = ["model.d=256", "model.mlp=256"] if precision == "fp8" else []  # FP8_WIDTH: narrower matmuls stay bf16
    return [*TINY.split(), *wide, sources, f"sft.sources=json:{folder}/chats.jsonl"]


def verify(arm: Arm) -> dict:
    """Train the arm uninterrupted, then with the wanted kills in as many runs as that takes; return the comparison."""
    shutil.rmtree(arm.folder, ignore_errors=True)
    arm.folder.mkdir()
    reference, runs, resumed, why, began = arm.folder / "alone", 0, 0, "", time.time()
    try:
        train(arm, reference)  # the later processes read its compiled programs
        arm.training = time.time() - began - arm.start_up
        arm.faults = due_faults(reference, arm.wanted)
        while len(arm.struck) < arm.wanted and not why:
            runs += 1
            url = f"{arm.bucket}/{runs}" if arm.bucket else str(arm.folder / f"killed{runs}")
            home = pathlib.Path(mirror.place(url))
            while kill := train(arm, home, url):
                (home / mirror.BASE).unlink(missing_ok=True)
                arm.struck.append(kill)
                arm.faults.pop(kill["by"], None)
            resumed += sum(event["event"] == "start" and event["step"] > 0 for event in events_of(home))
            why = difference(reference, home)
            if not why:
                shutil.rmtree(home / "checkpoints")
    except RunFailure as e:
        why = f"run {runs}: {e}" if runs else f"left alone: {e}"
    events = [event for event in events_of(reference) if event["event"] in ("fallback", "oom", "skip")]
    notes = [f"{event['event']} at step {event['step']}" for event in events]
    return {"equal": not why, "why": why, "notes": notes, "runs": runs, "resumed": resumed, "struck": arm.struck}


def due_faults(reference: pathlib.Path, kills: int) -> dict[str, int]:
    """Return the injected kills, at most half of all and SFT's first, by the steps that are done before them."""
    stages = sorted(stages_of(run_folder.read_config(str(reference)))[1:], key=lambda s: s.start != s.phase_start)
    later = [(f"{kind}@step={s.start + 1}", s.start) for s, kind in zip(stages, itertools.cycle(("term", "kill")))]
    return dict(sorted([("kill@save=1", 0), *later][: (kills + 1) // 2], key=lambda fault: fault[1]))


def train(arm: Arm, home: pathlib.Path, url: str = "") -> dict:
    """Run the training command with the kills that are due; return the facts of its kill, or {} where it finished.

    Raises RunFailure where the process hangs, dies of anything else, or leaves a run that is not whole.
    """
    newest = run_folder.newest_checkpoint(str(home)) or 0
    fault = next((name for name, step in arm.faults.items() if step == 0 or step >= newest), "")
    injected = {"signal": f"SIG{fault[:4].upper()}", "where": "save" if "save" in fault else "switch", "by": fault}
    kills = {-signal.SIGKILL if "kill" in fault else 128 + signal.SIGTERM: injected} if fault else {}
    env = os.environ | {faults.VARIABLE: fault, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    env |= {"JAX_COMPILATION_CACHE_DIR": str(arm.folder.parent / "cache")}
    command = [sys.executable, "-m", "lowrank_jax.main", *arm.config, f"--workdir={url or home}"]
    launched, stderr = time.time(), arm.folder / "stderr"
    events = lambda: [event for event in events_of(home) if event.get("time", 0) >= launched]
    limit = arm.start_up + 10 * arm.training + PATIENCE if arm.training else None
    with open(stderr, "w") as f, subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=f) as process:
        try:
            if limit and arm.wanted - len(arm.struck) > len(arm.faults):
                kills |= strike(arm, process, events, launched + limit)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(limit)
            status = process.returncode
        finally:
            process.kill()
    arm.start_up = next((event["time"] - launched for event in events() if event["event"] == "stage"), arm.start_up)
    last = (events() or [{"event": "none", "step": 0}])[-1]
    is_saved = last["event"] == "preempt" and (home / "checkpoints" / str(last["step"])).is_dir()
    if status == 0 and last["event"] == "finish":
        return {}
    if status in kills and (status < 0 or is_saved):
        rows = run_folder.read_rows(str(home), "metrics.jsonl")
        return kills[status] | {"step": max((row["step"] for row in rows), default=0)}
    why = f"exit status {status}, expected {sorted(kills) or 0}; last event: {last}, saved: {is_saved}"
    why = f"the process has not ended after {limit:.0f} s" if status is None else why
    raise RunFailure("\n    ".join([why, *stderr.read_text(errors="replace").splitlines()[-12:]]))


def strike(arm: Arm, process: subprocess.Popen, events, deadline: float) -> dict[int, dict]:
    """Send the rarer signal at a random moment; return the exit statuses that may follow, with the kill's facts."""
    sent = [kill["signal"] for kill in arm.struck]
    number = min(signal.SIGKILL, signal.SIGTERM, key=lambda number: (sent.count(number.name), arm.draw.random()))
    is_early = arm.draw.random() < 0.2  # the others come once training goes on
    pause = arm.draw.uniform(0, arm.start_up if is_early else 2 * arm.training / (arm.wanted + 1))
    while not (is_early or any(event["event"] == "stage" for event in events())):
        if process.poll() is not None or time.time() > deadline:
            return {}
        time.sleep(0.05)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(pause)
        return {}
    names = {event["event"] for event in events()}
    process.send_signal(number)
    facts = {"signal": number.name, "where": "training" if "stage" in names else "start-up", "by": "chance"}
    is_caught = number == signal.SIGTERM and names and "finish" not in names
    return dict.fromkeys([128 + number] if is_caught else [128 + number, -number], facts)


def events_of(home: pathlib.Path) -> list[dict]:
    return run_folder.read_rows(str(home), "events.jsonl")


def difference(reference: pathlib.Path, killed: pathlib.Path) -> str:
    """Return how the ends of two runs differ, and the first row of the metrics that does; empty if they are equal."""
    one, other = ((events_of(home) or [{}])[-1] for home in (reference, killed))
    lines = [f"{key} is {other.get(key)}, not {one.get(key)}" for key in COMPARED if one.get(key) != other.get(key)]
    texts = (SPEED.sub("", (home / "metrics.jsonl").read_text()).splitlines() for home in (reference, killed))
    rows = enumerate(itertools.zip_longest(*texts), 1)
    lines += [f"row {number} of metrics.jsonl is {b}, not {a}" for number, (a, b) in rows if a != b][:1]
    return "; ".join(lines)


def table_row(name: str, rows: list[dict]) -> str:
    counts = collections.Counter(kill[key] for row in rows for kill in row["struck"] for key in ("signal", "where"))
    counts["resumed"] = sum(row["resumed"] for row in rows)
    cells = [*(counts[title] for title in COLUMNS[:-1]), "yes" if all(row["equal"] for row in rows) else "NO"]
    return " ".join([f"{name:12}", *(f"{cell:>8}" for cell in cells)])
