"""A storm of faults over small trainings: each run must end like an undisturbed one and lose no good checkpoint.

    python scripts/bench/storm.py --minutes=30 --folder=/tmp/storm [--seed=0]

At random moments processes are killed, signalled or stopped, reads and writes fail, lines of the ledger are torn,
strays appear among the checkpoints, checkpoints are damaged, and two processes start at once. A run that ends is
compared with the undisturbed one, and the next begins. The same command goes on where a storm was stopped.
"""

import collections
import errno
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))
from lowrank_jax import cli
from lowrank_jax.config import RunFailure
from lowrank_jax.training import run_folder
from scripts.bench import harness

TINY = """model.d=32 model.layers=1 model.heads=2 model.rank=4 tokenizer.vocab_size=400 pretrain.steps=40
pretrain.tokens_per_step=512 pretrain.block=16 pretrain.auto_grow=True pretrain.grow_plan=16,32
pretrain.grow_every_steps=20 pretrain.eval_tokens=512 pretrain.sample= sft.steps=12 sft.tokens_per_step=512 sft.block=32
sft.eval_tokens=256 sft.sample= every.log=1 every.eval=20 every.save=4 every.keep=3"""
READS = (errno.EIO, errno.EACCES, errno.ESTALE, errno.ETIMEDOUT)
WRITES = (errno.ENOSPC, errno.EIO, errno.EACCES)
PARTS = "/checkpoints/ /state/ /meta/ manifest.ocdbt metrics.jsonl events.jsonl config.json .lock".split()
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "hang up": signal.SIGHUP}
KINDS = (*SIGNALS, "stop", "failing reads", "failing writes", "torn lines", "strays", "damage", "two starters", "calm")
STATUSES = {0, 1, *(128 + number for number in SIGNALS.values()), *(-number for number in SIGNALS.values())}
NEVER = 999  # the status of a process that did not end
HASHES = ("step", "data_sha256", "params_sha256")


class Storm:
    """The folder of a storm, with its undisturbed run, the run that is disturbed now, and the counts so far."""

    def __init__(self, folder: str, seed: int):
        self.home, self.seed = pathlib.Path(os.path.abspath(folder)), seed
        self.home.mkdir(parents=True, exist_ok=True)
        self.run, self._state = self.home / "run", self.home / "storm.json"
        empty = {
            "seed": seed,
            "seconds": 20.0,
            "starts": 0,
            "runs": 0,
            "equal": 0,
            "kinds": {},
            "statuses": {},
            "wrong": [],
            "damaged": [],
        }
        self.counts = json.loads(self._state.read_text()) if self._state.exists() else empty
        self.library = self.home / "faulty_files.so"
        source = pathlib.Path(__file__).with_name("faulty_files.cc")
        subprocess.run(["g++", "-shared", "-fPIC", "-O2", "-o", self.library, source, "-ldl"], check=True)
        settings = [f"--config.{setting}" for setting in TINY.split()]
        self._line = [
            sys.executable,
            "-m",
            "lowrank_jax.main",
            f"--config={harness.ROOT}/configs/quickstart.py",
            *settings,
        ]
        self.reference = self._undisturbed()
        self.seconds = self.counts["seconds"]  # that an undisturbed run takes
        self.damaged = set(self.counts["damaged"])  # names of checkpoints that the storm itself has damaged

    def _undisturbed(self) -> dict:
        folder = self.home / "alone"
        if run_folder.finished_step(str(folder)) is None:
            for _ in range(2):  # the second with warm caches: faults strike within the time that it takes
                shutil.rmtree(folder, ignore_errors=True)
                started = time.monotonic()
                if self.wait(self.start(folder), 900)[0] != 0:
                    raise RunFailure("the undisturbed run has failed")
                self.counts["seconds"] = time.monotonic() - started
        return finish_of(folder)

    def start(self, folder: pathlib.Path, fault: str = "") -> subprocess.Popen:
        env = os.environ | ({"LD_PRELOAD": str(self.library), "FAULTY_FILES": fault} if fault else {})
        line = [*self._line, f"--workdir={folder}"]
        return subprocess.Popen(line, cwd=harness.ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def wait(self, process: subprocess.Popen, seconds: float = 300) -> tuple[int, str]:
        """Return (status, stderr) of a process, which is killed where it does not end."""
        try:
            err = process.communicate(timeout=seconds)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            return NEVER, process.communicate()[1].decode(errors="replace") + "\nit did not end"
        return process.returncode, err.decode(errors="replace")

    def strike(self) -> list[str]:
        """Start the run once under a random fault; note and return what went wrong."""
        draw = random.Random(f"{self.seed}-{self.counts['starts']}")
        kind = draw.choice(KINDS) if self.run.is_dir() else draw.choice([*SIGNALS, "stop", "two starters", "calm"])
        if kind in BEFORE:
            BEFORE[kind](self, draw)
        good = good_checkpoints(self.run, self.damaged)
        ended = FAULTS.get(kind, calm)(self, draw)
        renamed = {name for name in self.damaged if (self.run / "checkpoints" / f"{name}.damaged").exists()}
        self.damaged -= renamed  # its step may be written again
        wrong = [f"{kind}: {text}" for text in (*judge(ended), *self.lost(good))]
        self.counts["starts"] += 1
        for name, value in (("kinds", kind), *(("statuses", str(status)) for status, _ in ended)):
            self.counts[name][value] = self.counts[name].get(value, 0) + 1
        if any(status == 0 for status, _ in ended):
            wrong += self._compare()
        self.counts["wrong"] += [f"start {self.counts['starts']}, {text}" for text in wrong]
        self.counts["damaged"] = sorted(self.damaged)
        self._state.write_text(json.dumps(self.counts))
        return wrong

    def lost(self, good: dict[str, str]) -> list[str]:
        """Return what has happened to checkpoints that were good before, beyond the rule of `every.keep`."""
        now, keep = good_checkpoints(self.run, self.damaged), 3
        changed = [f"checkpoint {name} has changed" for name in good if name in now and now[name] != good[name]]
        kept = run_folder.checkpoint_steps(str(self.run))  # with a damaged one that its checksum does not condemn
        newer = lambda name: sum(step > int(name) for step in kept)
        gone = [f"checkpoint {name} is gone" for name in good if name not in now and newer(name) < keep]
        return changed + gone

    def _compare(self) -> list[str]:
        """Compare the run that has ended with the undisturbed one, and make room for the next."""
        finish = finish_of(self.run)
        self.counts["runs"] += 1
        self.counts["equal"] += finish == self.reference
        wrong = [] if finish == self.reference else [f"the run ended with {finish}, not {self.reference}"]
        if wrong:
            shutil.copytree(self.run, self.home / f"wrong{self.counts['runs']}", symlinks=True)
        shutil.rmtree(self.run)
        self.damaged.clear()
        return wrong


def finish_of(folder: pathlib.Path) -> dict:
    ends = [event for event in run_folder.read_rows(str(folder), "events.jsonl") if event["event"] == "finish"]
    return {key: ends[-1][key] for key in HASHES} if ends else {}


def good_checkpoints(folder: pathlib.Path, damaged: set[str]) -> dict[str, str]:
    """Return {step: hash of its files} of the checkpoints that the storm has not damaged."""
    sums = {}
    for step in run_folder.checkpoint_steps(str(folder)):
        path, digest = folder / "checkpoints" / str(step), hashlib.sha256()
        for file in sorted(path.rglob("*")):
            digest.update(str(file.relative_to(path)).encode() + (file.read_bytes() if file.is_file() else b""))
        if str(step) not in damaged:
            sums[str(step)] = digest.hexdigest()
    return sums


def judge(ended: list[tuple[int, str]]) -> list[str]:
    """Return what is wrong with the ends of processes: another status, or a traceback."""
    refused = lambda status, err: status == 2 and "another process is training" in err
    wrong = [f"status {s}: {err.strip()[-300:]}" for s, err in ended if s not in STATUSES and not refused(s, err)]
    return wrong + [f"a traceback: {err.strip()[-600:]}" for _, err in ended if "Traceback" in err]


# ---------------------------------------------------------------------------------------------------------- faults


def calm(storm: Storm, draw: random.Random) -> list[tuple[int, str]]:
    """Let the run go on for a while, and stop it as one does."""
    return end_by(storm, draw, signal.SIGTERM)


def linger(storm: Storm, draw: random.Random, *processes: subprocess.Popen) -> None:
    """Wait for a random moment: of the start-up by the clock, or of the training by the rows that it has logged."""
    size = lambda: path.stat().st_size if path.exists() else 0
    path, started = storm.run / "metrics.jsonl", time.monotonic()
    enough, seconds = size() + draw.uniform(0, 6000), draw.uniform(0, storm.seconds / 3)
    by_clock = draw.random() < 0.3
    while any(process.poll() is None for process in processes):
        elapsed = time.monotonic() - started
        if (by_clock and elapsed > seconds) or (not by_clock and size() > enough) or elapsed > 4 * storm.seconds:
            return
        time.sleep(0.02)


def end_by(storm: Storm, draw: random.Random, number: int, fault: str = "") -> list[tuple[int, str]]:
    process = storm.start(storm.run, fault)
    linger(storm, draw, process)
    if process.poll() is None:
        process.send_signal(number)
    return [storm.wait(process)]


def stop(storm: Storm, draw: random.Random) -> list[tuple[int, str]]:
    """Stop a process for a while; one that starts meanwhile is refused, or trains and refuses the first."""
    process = storm.start(storm.run)
    linger(storm, draw, process)
    process.send_signal(signal.SIGSTOP)
    other = storm.start(storm.run)
    time.sleep(draw.uniform(0, storm.seconds / 2))
    process.send_signal(signal.SIGCONT)
    return end_all(storm, draw, [process, other])


def two_starters(storm: Storm, draw: random.Random) -> list[tuple[int, str]]:
    return end_all(storm, draw, [storm.start(storm.run) for _ in range(2)])


def end_all(storm: Storm, draw: random.Random, processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    linger(storm, draw, *processes)
    for process in processes:
        if process.poll() is None:
            process.send_signal(draw.choice([signal.SIGTERM, signal.SIGKILL]))
    return [storm.wait(process) for process in processes]


def failing_files(storm: Storm, draw: random.Random, how: str, numbers: tuple) -> list[tuple[int, str]]:
    fault = f"{draw.choice(numbers)}:{draw.choice([1, 1, 2, 5, 10**6])}:{how}:{draw.choice(PARTS)}"
    return end_by(storm, draw, signal.SIGTERM, fault)


def torn_lines(storm: Storm, draw: random.Random) -> None:
    """Flip a bit, cut a line short, or add what is no row."""
    for name in ("metrics.jsonl", "events.jsonl"):
        path = storm.run / name
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        number = draw.randrange(len(lines))
        line = bytearray(lines[number] or b"[]")
        place = draw.randrange(len(line))
        if draw.random() < 0.5:
            line[place] ^= 1 << draw.randrange(8)
        else:
            line = line[:place]
        lines[number] = bytes(line)
        if path.exists():
            path.write_bytes(b"\n".join(lines))


def strays(storm: Storm, draw: random.Random) -> None:
    home = storm.run / "checkpoints"
    if not home.is_dir():
        return
    name = draw.choice(["999999", str(4 * draw.randrange(20)), "notes.txt", "7~", ".swp", "12.orbax-checkpoint-tmp-1"])
    if not os.path.lexists(home / name):
        make = draw.choice([pathlib.Path.mkdir, pathlib.Path.touch, lambda path: path.symlink_to("nowhere")])
        make(home / name)


def damage(storm: Storm, draw: random.Random) -> None:
    """Damage the newest checkpoint where another one is whole."""
    good = sorted(good_checkpoints(storm.run, storm.damaged), key=int)
    if len(good) < 2:
        return
    path = storm.run / "checkpoints" / good[-1]
    files = sorted(file for file in (path / "state").rglob("*") if file.is_file() and file.stat().st_size)
    os.truncate(file := draw.choice(files), file.stat().st_size // 2)
    storm.damaged.add(good[-1])


BEFORE = {"torn lines": torn_lines, "strays": strays, "damage": damage}
FAULTS = {kind: lambda storm, draw, number=number: end_by(storm, draw, number) for kind, number in SIGNALS.items()}
FAULTS |= {"stop": stop, "two starters": two_starters}
FAULTS["failing reads"] = lambda storm, draw: failing_files(storm, draw, "read", READS)
FAULTS["failing writes"] = lambda storm, draw: failing_files(storm, draw, "write", WRITES)


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--folder", required=True, help="where the runs are; the same folder goes on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    storm, end = Storm(args.folder, args.seed), time.monotonic() + 60 * args.minutes
    while time.monotonic() < end:
        for text in storm.strike():
            print(text, file=sys.stderr, flush=True)
    counts = storm.counts
    rows = [("starts", counts["starts"]), *sorted(collections.Counter(counts["kinds"]).items())]
    rows += [(f"status {status}", count) for status, count in sorted(counts["statuses"].items())]
    rows += [("runs that ended", counts["runs"]), ("of them equal", counts["equal"]), ("wrong", len(counts["wrong"]))]
    print("\n".join(["| | count |", "|---|---|", *(f"| {name} | {count} |" for name, count in rows)]))
    return counts


if __name__ == "__main__":
    cli.main(command)
