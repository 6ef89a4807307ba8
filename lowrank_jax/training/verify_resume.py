"""Whether a run that is killed again and again ends as one that nothing interrupts, to the last bit.

    python scripts/verify_resume.py --folder=runs/verify     # 104 kills in 8 arms: 30 minutes on two cores
    python scripts/verify_resume.py --config=configs/quickstart.py --precisions=fp32 --optimizers=muon --kills=9

Each arm (a precision and an optimizer) trains the config twice: once left alone, and once killed at random moments,
half by SIGKILL and half by SIGTERM, and started again until it is through. LOWRANK_FAULTS adds the moments that chance
may miss: inside the first save, and before the first step of every further stage and of SFT. A run that is through
before it was killed often enough is followed by another. Compared are the hashes of the weights and of the data, the
tokens, and every row of metrics.jsonl but for its speed.

Without --config it is a tiny model on made-up text that it reads several times. With --folder, arms that are done are
not done again. Exit status 0: all arms are equal.

Where a kill struck is read off the ledger, the metrics and unfinished checkpoints. It is sharpest with every.log=1, as
in the tiny run; what cannot be told apart counts as `step`.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

import contextlib
import itertools
import json
import math
import pathlib
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from typing import NamedTuple

from lowrank_jax import cli
from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.data import stream, tokenizer
from lowrank_jax.machine import faults
from lowrank_jax.training import run_folder
from lowrank_jax.training.plan import Stage, milestones, stage_at, stages_of

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = """model.d=32 model.layers=1 model.heads=2 model.rank=4 tokenizer.vocab_size=512 pretrain.steps=240
pretrain.tokens_per_step=1024 pretrain.microbatch_tokens=512 pretrain.block=16 pretrain.auto_grow=True
pretrain.grow_plan=16,32,64 pretrain.grow_every_steps=80 pretrain.eval_tokens=4096 sft.steps=80
sft.tokens_per_step=1024 sft.block=64 sft.eval_tokens=4096 every.log=1 every.eval=20 every.save=17 every.fp8_check=30"""
TINY_FP8 = "model.d=256 model.mlp=256"  # precision.FP8_WIDTH: narrower matmuls stay bf16
PLACES = ("start-up", "step", "save", "stage switch", "phase switch", "evaluation")
KINDS = ("SIGKILL", "SIGTERM")
KIND_OF = {-signal.SIGKILL: "SIGKILL", 128 + signal.SIGTERM: "SIGTERM", -signal.SIGTERM: "SIGTERM"}
EARLY = 0.2  # share of the random kills that strike at any time since the launch, and not once training goes on
NOT_COMPARED = ("tokens_per_s", "mfu")
SAME = ("step", "tokens", "data_sha256", "params_sha256")
PATIENCE = 600.0  # seconds that a process may take longer than it should


class Arm(NamedTuple):
    """What is trained, and the folder that its runs are in."""

    name: str
    config: list[str]
    folder: pathlib.Path
    cache: pathlib.Path

    @property
    def alone(self) -> pathlib.Path:
        return self.folder / "alone"


@dataclass
class Pace:
    """Seconds that the latest process took to its first step, and that the run left alone trained."""

    start_up: float
    training: float


class Failure(Exception):
    """A process ended, or did not end, as it must not."""


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--config", metavar="FILE", help="a config; --config.group.key=value changes a key of it")
    parser.add_argument("--kills", type=int, default=100, help="how often processes are killed in all, at least")
    parser.add_argument("--precisions", default="fp32,bf16,fp16,fp8")
    parser.add_argument("--optimizers", default="adamw,muon")
    parser.add_argument("--folder", help="where to train; kept, and gone on from (default: a temporary folder)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args, changes = parser.parse_known_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # by way of what ends the trainer, too
    if args.kills < 1:
        raise UsageError(f"--kills={args.kills} must be at least 1")
    folder = pathlib.Path(args.folder or tempfile.mkdtemp(prefix="verify_resume_")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    rows = study(folder, args, changes)
    unequal = [row["arm"] for row in rows if not row["equal"]]
    result = {"equal": not unequal, "kills": sum(len(row["struck"]) for row in rows), "arms": rows}
    if unequal:
        if args.json:
            print(json.dumps(result), flush=True)
        raise RunFailure(f"not equal: {', '.join(unequal)}; the runs are in {folder}")
    if not args.folder:
        shutil.rmtree(folder)
    return result


def study(folder: pathlib.Path, args, changes: list[str]) -> list[dict]:
    """The result of every arm, each printed as it ends; those in results.jsonl are not done again."""
    pairs = list(itertools.product(args.precisions.split(","), args.optimizers.split(",")))
    each = math.ceil(args.kills / len(pairs))
    arms = [arm_of(folder, args.config, changes, *pair) for pair in pairs]
    print(line("arm", KINDS, PLACES, "resumed", "repeated", "equal"), flush=True)
    rows = []
    for arm in arms:
        asked = {"arm": arm.name, "config": arm.config, "seed": args.seed, "asked": each}
        done = [row for row in run_folder.read_rows(folder, "results.jsonl") if asked.items() <= row.items()]
        if not done:
            done = [asked | verify(arm, each, random.Random(f"{args.seed} {arm.name}"))]
            run_folder.append(folder, "results.jsonl", done[0])
        rows.append(done[-1])
        print(shown(rows[-1]), flush=True)
    print(shown(total(rows)), flush=True)
    return rows


# ----------------------------------------------------------------------------------------------------- what is trained


def arm_of(folder: pathlib.Path, config: str | None, changes: list[str], precision: str, optimizer: str) -> Arm:
    """The arm, its config checked, and its data and tokenizer made where they are not there."""
    base = [f"--config={config}"] if config else tiny(folder, precision)
    base += [*changes, f"--config.precision={precision}", f"--config.optim.name={optimizer}"]
    read = cli.read_config(base)
    if not (read.tokenizer.path or read.init_from):
        base.append(f"--config.tokenizer.path={learn_tokenizer(folder, read)}")
    name = f"{precision}-{optimizer}"
    return Arm(name, base, folder / name, folder / "cache")


def tiny(folder: pathlib.Path, precision: str) -> list[str]:
    write_texts(folder)
    settings = TINY.split() + (TINY_FP8.split() if precision == "fp8" else [])
    settings += [f"pretrain.sources=text:{folder}/prose.txt@0.7, json:{folder}/notes.jsonl@0.3"]
    settings += [f"sft.sources=json:{folder}/chats.jsonl"]
    return [f"--config={ROOT}/configs/default.py", *(f"--config.{setting}" for setting in settings)]


def write_texts(folder: pathlib.Path) -> None:
    """Made-up words in sentences: enough of them for an epoch or two."""
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


def learn_tokenizer(folder: pathlib.Path, config) -> pathlib.Path:
    home = folder / "tokenizer"
    if not home.is_dir():
        phases = [config.pretrain] + ([config.sft] if config.sft.steps else [])
        t = config.tokenizer
        tokenizer.train(stream.texts(phases, t.train_bytes), t.vocab_size).save(str(home))
    return home


# ----------------------------------------------------------------------------------------------------------- processes


class Process:
    """The trainer, launched once on a run's folder."""

    def __init__(self, arm: Arm, home: pathlib.Path, fault: str = ""):
        self.arm, self.home, self.launched = arm, home, time.monotonic()
        self.partial, self.step = unfinished(home), last_step(home)  # as they are before
        ledger = home / "events.jsonl"
        self._offset = ledger.stat().st_size if ledger.exists() else 0
        env = os.environ | {faults.VARIABLE: fault, "JAX_COMPILATION_CACHE_DIR": str(arm.cache)}
        env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
        env |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
        self._stderr = arm.folder / "stderr"
        with open(self._stderr, "w") as err:
            run = [sys.executable, "-m", "lowrank_jax.main", *arm.config, f"--workdir={home}"]
            self.popen = subprocess.Popen(run, env=env, stdout=subprocess.DEVNULL, stderr=err)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_) -> None:
        self.popen.kill()
        self.popen.wait()

    def events(self) -> list[dict]:
        """What this process has put into the ledger."""
        with contextlib.suppress(FileNotFoundError), open(self.home / "events.jsonl", "rb") as f:
            f.seek(self._offset)
            return [json.loads(text) for text in f.read().split(b"\n")[:-1] if text]
        return []

    def trains(self) -> bool:
        """Whether its first step is done."""
        return any(event["event"] == "stage" for event in self.events())

    def ends_within(self, seconds: float | None) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(seconds)
        return self.popen.returncode is not None

    def until_training(self, seconds: float) -> float:
        """Seconds from the launch to its first step, or to its end."""
        while not (self.ends_within(0.05) or self.trains()):
            if time.monotonic() - self.launched > seconds:
                raise Failure(f"nothing trains {seconds:.0f} s after the launch{self.tail()}")
        return time.monotonic() - self.launched

    def catches_terms(self) -> bool:
        """Whether SIGTERM has a handler by now; False where nothing tells."""
        with contextlib.suppress(OSError):
            mask = re.search(r"SigCgt:\s*(\w+)", pathlib.Path(f"/proc/{self.popen.pid}/status").read_text())[1]
            return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)
        return False

    def tail(self) -> str:
        lines = self._stderr.read_text(errors="replace").splitlines()[-12:]
        return "".join(f"\n    {text}" for text in lines)


def strike(process: Process, number: int, draw: random.Random, pace: Pace, seconds: float) -> tuple[str, set[int]]:
    """Sends the signal at a random moment; where that was, and the exit statuses that may follow from it.

    `seconds` is the most that it waits once training goes on. Nothing is sent, and nothing may follow, where the
    process ends before.
    """
    if draw.random() < EARLY:
        gone = process.ends_within(draw.uniform(0, pace.start_up))
    else:
        took = process.until_training(pace.start_up + PATIENCE)
        pace.start_up = took if process.trains() else pace.start_up
        gone = process.ends_within(draw.uniform(0, seconds))
    if gone:
        return "", set()
    where, caught = place(process), process.catches_terms()  # a SIGTERM changes what the files tell
    process.popen.send_signal(number)
    if number == signal.SIGKILL:
        process.popen.wait()
        return place(process), {-number}
    return where, {128 + number} if caught else {128 + number, -number}


def ended(process: Process, seconds: float | None, allowed: set[int]) -> int:
    """Waits for the end of a process and checks that it is one of those that may be; its status."""
    if not process.ends_within(seconds):
        raise Failure(f"it has not ended after {seconds:.0f} s{process.tail()}")
    status, events = process.popen.returncode, process.events()
    if status not in allowed | {0}:
        raise Failure(f"exit status {status}, expected {sorted(allowed) or 0}{process.tail()}")
    last = events[-1] if events else {"event": "none", "step": 0}
    if status == 0 and last["event"] != "finish":
        raise Failure(f"exit status 0, but the last event is {last['event']}{process.tail()}")
    if status > 0 and not (last["event"] == "preempt" and (process.home / "checkpoints" / str(last["step"])).is_dir()):
        raise Failure(f"exit status {status}, but step {last['step']} was not saved{process.tail()}")
    return status


def place(process: Process) -> str:
    """Where in its work the process is, or was when it was killed: one of PLACES."""
    if not process.trains():
        return "start-up"
    if unfinished(process.home) - process.partial:
        return "save"
    config = run_folder.read_config(str(process.home))
    step, plan = last_step(process.home), stages_of(config)
    due = set(milestones(plan, config.every.eval, step)) & evaluations(process.arm.alone)
    if due - evaluations(process.home):
        return "evaluation"
    stage = stage_at(plan, step)
    begun = any(event["event"] == "stage" and event["step"] == step for event in process.events())
    return switch(stage) if step == stage.start and not begun else "step"


def switch(stage: Stage) -> str:
    return "phase switch" if stage.start == stage.phase_start else "stage switch"


def unfinished(home: pathlib.Path) -> set[tuple[str, int]]:
    """Checkpoints that are being written, or were when their process was killed, and since when."""
    found = set()
    for path in home.glob("checkpoints/*"):
        with contextlib.suppress(FileNotFoundError):  # done by now
            if not path.name.isdigit():
                found.add((path.name, path.stat().st_ctime_ns))
    return found


def evaluations(home: pathlib.Path) -> set[tuple[str, str, int]]:
    """Those that the run has made, as `milestones` names them."""
    return {milestone for milestone in run_folder.milestones(str(home)) if milestone[0] == "eval"}


def last_step(home: pathlib.Path) -> int:
    return max((row["step"] for row in run_folder.read_rows(str(home), "metrics.jsonl")), default=0)


# ------------------------------------------------------------------------------------------------------------- an arm


def verify(arm: Arm, kills: int, draw: random.Random) -> dict:
    """Trains the arm alone, then killed until there were `kills` kills; what became of it."""
    shutil.rmtree(arm.folder, ignore_errors=True)
    arm.folder.mkdir()
    struck, repeated, resumed, runs, why, began = [], 0, 0, 0, "", time.monotonic()
    try:
        pace = train_alone(arm)
        pending = moments(arm, kills)
        while len(struck) < kills and not why:
            runs += 1
            home = arm.folder / f"killed{runs}"
            repeated += train_killed(arm, home, pace, pending, struck, kills, draw)
            resumed += resumes(home)
            why = difference(arm.alone, home)
            if not why:
                shutil.rmtree(home / "checkpoints")
    except Failure as e:
        why = f"run {runs}: {e}" if runs else f"left alone: {e}"
    told = notes(arm) + ([] if resumed else ["no kill was followed by a resume from a checkpoint: more --kills"])
    facts = {"equal": not why, "why": why, "runs": runs, "resumed": resumed, "repeated": repeated, "struck": struck}
    return facts | {"seconds": round(time.monotonic() - began), "notes": told}


def resumes(home: pathlib.Path) -> int:
    """How many processes went on from a checkpoint of training; the others began again."""
    return sum(e["event"] == "start" and e["step"] > 0 for e in run_folder.read_rows(str(home), "events.jsonl"))


def train_alone(arm: Arm) -> Pace:
    """Trains to the end in one process, which compiles what the later ones find in the cache."""
    with Process(arm, arm.alone) as process:
        start_up = process.until_training(math.inf)
        ended(process, None, set())
    return Pace(start_up, time.monotonic() - process.launched - start_up)


def moments(arm: Arm, kills: int) -> list[tuple[int, str]]:
    """(step, fault) of the kills that are not left to chance, the rarest first where there is no room for all."""
    later = stages_of(run_folder.read_config(str(arm.alone)))[1:]
    found = [(0, "kill@save=1")]
    for stage in sorted(later, key=lambda s: s.start != s.phase_start):
        both = ("kill", "term") if stage.start == stage.phase_start else (("kill", "term")[len(found) % 2],)
        found += [(stage.start, f"{kind}@step={stage.start + 1}") for kind in both]
    return sorted(found[: (kills + 1) // 2])


def train_killed(arm: Arm, home: pathlib.Path, pace: Pace, pending, struck, kills: int, draw: random.Random) -> int:
    """Trains to the end in as many processes as it takes; adds to `struck`, takes from `pending`; steps done twice."""
    repeated, killed = 0, True
    while killed:
        newest = run_folder.newest_checkpoint(str(home)) or 0
        fault = next((f for f in pending if not f[0] or f[0] >= newest), None)
        by_chance = kills - len(struck) > len(pending)
        with Process(arm, home, fault[1] if fault else "") as process:
            left = max(1 - process.step / last_step(arm.alone), 0.05) * pace.training
            most = 2 * left / (kills - len(struck) + 1)
            killed = end(process, balance(struck, draw) if by_chance else 0, fault, draw, pace, most)
        if killed:
            struck.append(killed)
            pending[:] = [f for f in pending if f[1] != killed["by"]]
        repeated += sum(max(process.step - e["step"], 0) for e in process.events() if e["event"] == "start")
    return repeated


def end(process: Process, number: int, fault: tuple[int, str] | None, draw, pace: Pace, most: float) -> dict:
    """Waits for the end of a process, by signal `number` at a random moment if not 0; how it was killed, if it was."""
    where, allowed = strike(process, number, draw, pace, most) if number else ("", set())
    expected = {-signal.SIGKILL if fault[1].startswith("kill") else 128 + signal.SIGTERM} if fault else set()
    status = ended(process, pace.start_up + 10 * pace.training + PATIENCE, allowed | expected)
    if status == 0:
        return {}
    facts = {"signal": KIND_OF[status], "where": where, "by": "chance"}
    if status not in allowed:
        facts |= {"where": place_of(fault, process.home), "by": fault[1]}
    seconds = round(time.monotonic() - process.launched, 2)
    return facts | {"step": last_step(process.home), "run": process.home.name, "seconds": seconds}


def balance(struck: list[dict], draw: random.Random) -> int:
    """Either signal; the one that is behind, more often."""
    terms = sum(kill["signal"] == "SIGTERM" for kill in struck)
    return signal.SIGTERM if draw.random() * (len(struck) + 2) > terms + 0.5 else signal.SIGKILL


def place_of(fault: tuple[int, str], home: pathlib.Path) -> str:
    if "@save" in fault[1]:
        return "save"
    return switch(stage_at(stages_of(run_folder.read_config(str(home))), fault[0]))


def notes(arm: Arm) -> list[str]:
    """What the run left alone went through that weakens the comparison."""
    events = run_folder.read_rows(str(arm.alone), "events.jsonl")
    return [f"{e['event']} at step {e['step']}" for e in events if e["event"] in ("fallback", "oom", "skip")]


# ----------------------------------------------------------------------------------------------------------- comparison


def difference(alone: pathlib.Path, killed: pathlib.Path) -> str:
    """What differs between the ends of two runs, and the first row that does; empty where they are equal."""
    one, other = last_event(alone), last_event(killed)
    found = [f"{key} is {other.get(key)}, not {one.get(key)}" for key in SAME if one.get(key) != other.get(key)]
    for number, (a, b) in enumerate(itertools.zip_longest(metrics(alone), metrics(killed)), 1):
        if a != b:
            found.append(f"row {number} of metrics.jsonl is {json.dumps(b)}, not {json.dumps(a)}")
            break
    return "; ".join(found)


def last_event(home: pathlib.Path) -> dict:
    events = run_folder.read_rows(str(home), "events.jsonl")
    return events[-1] if events and events[-1]["event"] == "finish" else {}


def metrics(home: pathlib.Path) -> list:
    """All lines, in order, without their speed: one that is not JSON as text, so that it equals no row."""
    rows = []
    for text in (home / "metrics.jsonl").read_text().splitlines():
        try:
            rows.append({key: value for key, value in json.loads(text).items() if key not in NOT_COMPARED})
        except ValueError:
            rows.append(text)
    return rows


# --------------------------------------------------------------------------------------------------------------- table


def line(name, kinds, places, resumed, repeated, equal) -> str:
    cells = [f"{name:12}", *(f"{x:>7}" for x in kinds)]
    cells += [f"{x:>{max(len(place), 4)}}" for place, x in zip(PLACES, places)]
    return "  ".join([*cells, f"{resumed:>7}", f"{repeated:>8}", equal])


def shown(row: dict) -> str:
    count = lambda key, names: [sum(kill[key] == name for kill in row["struck"]) for name in names]
    equal = "yes" if row["equal"] else "NO"
    kinds, places = count("signal", KINDS), count("where", PLACES)
    text = line(row["arm"], kinds, places, row["resumed"], row["repeated"], equal)
    if row["notes"]:
        text += f"\n  ({', '.join(row['notes'][:5])})"
    return text + (f"\n  {row['why']}" if row["why"] else "")


def total(rows: list[dict]) -> dict:
    struck = [kill for row in rows for kill in row["struck"]]
    facts = {"arm": "all", "equal": all(row["equal"] for row in rows), "why": "", "notes": [], "struck": struck}
    return facts | {key: sum(row[key] for row in rows) for key in ("resumed", "repeated")}


if __name__ == "__main__":
    cli.main(command)
