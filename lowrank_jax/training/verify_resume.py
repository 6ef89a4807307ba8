"""Kill training processes at random moments, and compare the run that they leave with an uninterrupted one.

The flags are in `__main__.py`. A kill's place is read off the ledger, the metrics and unfinished checkpoints, which is
most exact with every.log=1; a place that cannot be told from training counts as `step`.
"""

import collections
import contextlib
import itertools
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from lowrank_jax.config import RunConfig
from lowrank_jax.data import stream, tokenizer
from lowrank_jax.machine import faults
from lowrank_jax.training import run_folder
from lowrank_jax.training.plan import Stage, milestones, stage_at, stages_of

PLACES = ("start-up", "step", "save", "stage switch", "phase switch", "evaluation")
SIGNALS = {-signal.SIGKILL: "SIGKILL", 128 + signal.SIGTERM: "SIGTERM", -signal.SIGTERM: "SIGTERM"}  # by exit status
NAMES = ("SIGKILL", "SIGTERM")
COLUMNS = ("arm", *NAMES, *PLACES, "resumed", "repeated", "equal")
EARLY = 0.2  # share of the random kills at any time since the launch; the others come once training goes on
SPEED = ("tokens_per_s", "mfu")  # not compared
COMPARED = ("event", "step", "tokens", "data_sha256", "params_sha256")  # of the last event
PATIENCE = 600.0  # seconds that a process may take longer than expected
TINY = """model.d=32 model.layers=1 model.heads=2 model.rank=4 tokenizer.vocab_size=512 pretrain.steps=240
pretrain.tokens_per_step=1024 pretrain.microbatch_tokens=512 pretrain.block=16 pretrain.auto_grow=True
pretrain.grow_plan=16,32,64 pretrain.grow_every_steps=80 pretrain.eval_tokens=4096 sft.steps=80
sft.tokens_per_step=1024 sft.block=64 sft.eval_tokens=4096 every.log=1 every.eval=20 every.save=17 every.fp8_check=30"""
TINY_FP8 = "model.d=256 model.mlp=256"  # precision.FP8_WIDTH: narrower matmuls stay bf16


class Failure(Exception):
    """A process ended, or did not end, in a way that it must not."""


@dataclass
class Arm:
    """A precision and an optimizer: the flags of its training command, the folder of its runs, and its kills so far.

    `start_up` is the seconds that the latest process took to its first step; `training` those of the uninterrupted
    run from its first step to its end. `faults` maps the values of LOWRANK_FAULTS that are still due to the steps from
    which on they can strike.
    """

    name: str
    config: list[str]
    folder: pathlib.Path
    wanted: int  # kills
    draw: random.Random
    start_up: float = 0.0
    training: float = 0.0
    faults: dict[str, int] = field(default_factory=dict)
    struck: list[dict] = field(default_factory=list)
    repeated: int = 0  # steps that were trained again after a kill

    @property
    def reference(self) -> pathlib.Path:
        """Folder of the uninterrupted run."""
        return self.folder / "alone"

    @property
    def missing(self) -> int:
        return self.wanted - len(self.struck)


def verify_arms(folder: pathlib.Path, arms: list[Arm], seed: int) -> list[dict]:
    """Return the result of every arm, each printed as it ends; arms in results.jsonl are not trained again."""
    print(table_line(COLUMNS), flush=True)
    rows, earlier = [], run_folder.read_rows(str(folder), "results.jsonl")
    for arm in arms:
        identity = {"arm": arm.name, "config": arm.config, "seed": seed, "asked": arm.wanted}
        done = [row for row in earlier if identity.items() <= row.items()]
        if not done:
            done = [identity | verify(arm)]
            run_folder.append(str(folder), "results.jsonl", done[0])
        rows.append(done[-1])
        print(shown(rows[-1]), flush=True)
    print(shown(total(rows)), flush=True)
    return rows


# -------------------------------------------------------------------------------------------------- the made-up run


def tiny_settings(folder: pathlib.Path, precision: str) -> list[str]:
    """Write made-up texts and return the `key=value` settings of a tiny model that reads them several times."""
    draw = random.Random(0)
    words = ["".join(draw.choices("ba ce di fo gu ha je ki lo mu".split(), k=draw.randint(1, 3))) for _ in range(300)]
    sentence = lambda: " ".join(draw.choices(words, k=draw.randint(3, 12))).capitalize() + "."
    page = lambda: " ".join(sentence() for _ in range(draw.randint(2, 12)))
    turn = lambda role: {"role": role, "content": sentence()}
    chats = [{"messages": [turn("user"), turn("assistant")] * draw.randint(1, 3)} for _ in range(200)]
    lines = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "prose.txt").write_text("\n\n".join(page() for _ in range(400)))
    (folder / "notes.jsonl").write_text(lines({"text": page()} for _ in range(150)))
    (folder / "chats.jsonl").write_text(lines(chats))
    settings = TINY.split() + (TINY_FP8.split() if precision == "fp8" else [])
    settings += [f"pretrain.sources=text:{folder}/prose.txt@0.7, json:{folder}/notes.jsonl@0.3"]
    return [*settings, f"sft.sources=json:{folder}/chats.jsonl"]


def learn_tokenizer(folder: pathlib.Path, config: RunConfig) -> pathlib.Path:
    """Return the folder of the tokenizer that all arms share, which the first one learns."""
    home = folder / "tokenizer"
    if not home.is_dir():
        phases = [config.pretrain] + ([config.sft] if config.sft.steps else [])
        t = config.tokenizer
        tokenizer.train(stream.texts(phases, t.train_bytes), t.vocab_size).save(str(home))
    return home


class Process:
    """The training command, launched once on a run's folder."""

    def __init__(self, arm: Arm, home: pathlib.Path, fault: str = ""):
        self.arm, self.home, self.launched = arm, home, time.monotonic()
        self.first_step, self._partial = last_step(home), unfinished_checkpoints(home)
        self._earlier = len(run_folder.read_rows(str(home), "events.jsonl"))
        env = os.environ | {faults.VARIABLE: fault, "JAX_COMPILATION_CACHE_DIR": str(arm.folder.parent / "cache")}
        env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
        command = [sys.executable, "-m", "lowrank_jax.main", *arm.config, f"--workdir={home}"]
        self._stderr = arm.folder / "stderr"
        with open(self._stderr, "w") as err:
            self.popen = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=err)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_) -> None:
        self.popen.kill()
        self.popen.wait()

    def events(self) -> list[dict]:
        """Return the events that this process has put into the ledger."""
        return run_folder.read_rows(str(self.home), "events.jsonl")[self._earlier :]

    def has_trained(self) -> bool:
        """Return True once the first step is done."""
        return any(event["event"] == "stage" for event in self.events())

    def ends_within(self, seconds: float | None) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(seconds)
        return self.popen.returncode is not None

    def seconds_until_training(self, limit: float) -> float:
        """Wait for the first step, or for the end; return the seconds since the launch."""
        while not (self.ends_within(0.05) or self.has_trained()):
            if time.monotonic() - self.launched > limit:
                raise self.failure(f"no step is done {limit:.0f} s after the launch")
        return time.monotonic() - self.launched

    def catches_sigterm(self) -> bool:
        """Return True if SIGTERM has a handler by now, as far as /proc tells."""
        with contextlib.suppress(OSError):
            mask = re.search(r"SigCgt:\s*(\w+)", pathlib.Path(f"/proc/{self.popen.pid}/status").read_text())[1]
            return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)
        return False

    def place(self) -> str:
        """Return what the process is doing, or did when it was killed: one of PLACES."""
        if not self.has_trained():
            return "start-up"
        if unfinished_checkpoints(self.home) - self._partial:
            return "save"
        config, step = run_folder.read_config(str(self.home)), last_step(self.home)
        stages = stages_of(config)
        done, in_reference = (run_folder.milestones(str(home)) for home in (self.home, self.arm.reference))
        due = set(milestones(stages, config.every.eval, step)) & in_reference - done
        if any(kind == "eval" for kind, _, _ in due):
            return "evaluation"
        stage = stage_at(stages, step)
        has_begun = any(event["event"] == "stage" and event["step"] == step for event in self.events())
        return switch_into(stage) if step == stage.start and not has_begun else "step"

    def status(self, limit: float | None, allowed: set[int]) -> int:
        """Wait for the end and return the exit status; raises Failure unless the run is whole for that status."""
        if not self.ends_within(limit):
            raise self.failure(f"the process has not ended after {limit:.0f} s")
        status, last = self.popen.returncode, (self.events() or [{"event": "none", "step": 0}])[-1]
        if status not in allowed | {0}:
            raise self.failure(f"exit status {status}, expected {sorted(allowed) or 0}")
        if status == 0 and last["event"] != "finish":
            raise self.failure(f"exit status 0, but the last event is {last['event']}")
        saved = self.home / "checkpoints" / str(last["step"])
        if status > 0 and not (last["event"] == "preempt" and saved.is_dir()):
            raise self.failure(f"exit status {status}, but step {last['step']} was not saved")
        return status

    def failure(self, why: str) -> Failure:
        """Return the failure with the end of what the process printed."""
        return Failure("\n    ".join([why, *self._stderr.read_text(errors="replace").splitlines()[-12:]]))


def switch_into(stage: Stage) -> str:
    return "phase switch" if stage.start == stage.phase_start else "stage switch"


def unfinished_checkpoints(home: pathlib.Path) -> set[tuple[str, int]]:
    """Return (name, time of creation) of the checkpoints that are being written, or were at a kill."""
    names = set()
    for path in home.glob("checkpoints/*"):
        with contextlib.suppress(FileNotFoundError):  # finished and renamed meanwhile
            if not path.name.isdigit():
                names.add((path.name, path.stat().st_ctime_ns))
    return names


def last_step(home: pathlib.Path) -> int:
    return max((row["step"] for row in run_folder.read_rows(str(home), "metrics.jsonl")), default=0)


# ------------------------------------------------------------------------------------------------------------- an arm


def verify(arm: Arm) -> dict:
    """Train the arm uninterrupted, then with the wanted kills in as many runs as that takes; return the comparison."""
    shutil.rmtree(arm.folder, ignore_errors=True)
    arm.folder.mkdir()
    runs, resumed, why, began = 0, 0, "", time.monotonic()
    try:
        train_reference(arm)
        while arm.missing > 0 and not why:
            runs += 1
            home = arm.folder / f"killed{runs}"
            train_killed(arm, home)
            events = run_folder.read_rows(str(home), "events.jsonl")
            resumed += sum(e["event"] == "start" and e["step"] > 0 for e in events)  # the others began again
            why = difference(arm.reference, home)
            if not why:
                shutil.rmtree(home / "checkpoints")
    except Failure as e:
        why = f"run {runs}: {e}" if runs else f"left alone: {e}"
    events = run_folder.read_rows(str(arm.reference), "events.jsonl")  # what weakens the comparison:
    notes = [f"{e['event']} at step {e['step']}" for e in events if e["event"] in ("fallback", "oom", "skip")]
    notes += [] if resumed else ["no kill was followed by a resume from a checkpoint: more --kills"]
    facts = {"equal": not why, "why": why, "runs": runs, "resumed": resumed, "repeated": arm.repeated}
    return facts | {"struck": arm.struck, "seconds": round(time.monotonic() - began), "notes": notes}


def train_reference(arm: Arm) -> None:
    """Train to the end in one process, whose compiled programs later ones read; set the durations and the faults."""
    with Process(arm, arm.reference) as process:
        arm.start_up = process.seconds_until_training(math.inf)
        process.status(None, set())
    arm.training = time.monotonic() - process.launched - arm.start_up
    later = stages_of(run_folder.read_config(str(arm.reference)))[1:]
    due = [("kill@save=1", 0)]
    for stage in sorted(later, key=lambda s: s.start != s.phase_start):  # phase switches first: rarer than stages
        both = ("kill", "term") if stage.start == stage.phase_start else (("kill", "term")[len(due) % 2],)
        due += [(f"{kind}@step={stage.start + 1}", stage.start) for kind in both]
    arm.faults = dict(sorted(due[: (arm.wanted + 1) // 2], key=lambda fault: (fault[1], fault[0])))


def train_killed(arm: Arm, home: pathlib.Path) -> None:
    """Train to the end in as many processes as it takes, and note every kill."""
    killed = True
    while killed:
        newest = run_folder.newest_checkpoint(str(home)) or 0
        fault = next((text for text, step in arm.faults.items() if not step or step >= newest), "")
        with Process(arm, home, fault) as process:
            killed = end(arm, process, fault)
        if killed:
            arm.struck.append(killed)
            arm.faults.pop(killed["by"], None)
        starts = [event["step"] for event in process.events() if event["event"] == "start"]
        arm.repeated += sum(max(process.first_step - step, 0) for step in starts)


def end(arm: Arm, process: Process, fault: str) -> dict:
    """Wait for the end of a process, perhaps after a random signal; return the facts of its kill, if it was killed."""
    where, allowed = strike(arm, process) if arm.missing > len(arm.faults) else ("", set())
    expected = {-signal.SIGKILL if fault.startswith("kill") else 128 + signal.SIGTERM} if fault else set()
    status = process.status(arm.start_up + 10 * arm.training + PATIENCE, allowed | expected)
    if status == 0:
        return {}
    facts = {"signal": SIGNALS[status], "where": where, "by": "chance"}
    if status not in allowed:
        stages = stages_of(run_folder.read_config(str(process.home)))
        place = "save" if "@save" in fault else switch_into(stage_at(stages, arm.faults[fault]))
        facts |= {"where": place, "by": fault}
    seconds = round(time.monotonic() - process.launched, 2)
    return facts | {"step": last_step(process.home), "run": process.home.name, "seconds": seconds}


def strike(arm: Arm, process: Process) -> tuple[str, set[int]]:
    """Send SIGKILL or SIGTERM at a random moment; return the place, and the exit statuses that may follow.

    The signal sent less often so far is the likelier one. Where the process ends before, nothing is sent.
    """
    terms = sum(kill["signal"] == "SIGTERM" for kill in arm.struck)
    number = signal.SIGTERM if arm.draw.random() * (len(arm.struck) + 2) > terms + 0.5 else signal.SIGKILL
    left = max(1 - process.first_step / last_step(arm.reference), 0.05) * arm.training
    if arm.draw.random() < EARLY:
        has_ended = process.ends_within(arm.draw.uniform(0, arm.start_up))
    else:
        seconds = process.seconds_until_training(arm.start_up + PATIENCE)
        arm.start_up = seconds if process.has_trained() else arm.start_up
        has_ended = process.ends_within(arm.draw.uniform(0, 2 * left / (arm.missing + 1)))
    if has_ended:
        return "", set()
    where, caught = process.place(), process.catches_sigterm()  # before SIGTERM, which makes the process save
    process.popen.send_signal(number)
    if number == signal.SIGKILL:
        process.popen.wait()
        return process.place(), {-number}
    return where, {128 + number} if caught else {128 + number, -number}


# --------------------------------------------------------------------------------------------- comparison and table


def difference(reference: pathlib.Path, killed: pathlib.Path) -> str:
    """Return how the ends of two runs differ, and the first row of the metrics that does; empty if they are equal."""
    one, other = ((run_folder.read_rows(str(home), "events.jsonl") or [{}])[-1] for home in (reference, killed))
    lines = [f"{key} is {other.get(key)}, not {one.get(key)}" for key in COMPARED if one.get(key) != other.get(key)]
    for number, (a, b) in enumerate(itertools.zip_longest(metrics(reference), metrics(killed)), 1):
        if a != b:
            lines.append(f"row {number} of metrics.jsonl is {json.dumps(b)}, not {json.dumps(a)}")
            break
    return "; ".join(lines)


def metrics(home: pathlib.Path) -> list:
    """Return all lines without their speed; a line that is not JSON stays text, so that it equals no row."""
    rows = []
    for text in (home / "metrics.jsonl").read_text().splitlines():
        try:
            rows.append({key: value for key, value in json.loads(text).items() if key not in SPEED})
        except ValueError:
            rows.append(text)
    return rows


def table_line(cells: Sequence) -> str:
    first, *others = (f"{cell:>{max(len(title), 4)}}" for cell, title in zip(cells, COLUMNS))
    return "  ".join([f"{first.strip():12}", *others])


def shown(row: dict) -> str:
    counts = collections.Counter(kill[key] for kill in row["struck"] for key in ("signal", "where"))
    numbers = [counts[name] for name in (*NAMES, *PLACES)]
    text = table_line([row["arm"], *numbers, row["resumed"], row["repeated"], "yes" if row["equal"] else "NO"])
    notes = f"({', '.join(row['notes'][:5])})" if row["notes"] else ""
    return "\n  ".join(filter(None, (text, notes, row["why"])))


def total(rows: list[dict]) -> dict:
    struck = [kill for row in rows for kill in row["struck"]]
    facts = {"arm": "all", "equal": all(row["equal"] for row in rows), "why": "", "notes": [], "struck": struck}
    return facts | {key: sum(row[key] for row in rows) for key in ("resumed", "repeated")}
