"""Shared by the parts of check_device.py: rows as JSON lines, a budget, and arms measured in a process that may die.

A part is a list of arms, most important first. A process of its own measures them one after another, so that running
out of memory or a compiler's abort costs one arm: a new process then measures the rest.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
LATEST = 60.0  # seconds after the budget's end at which an arm is stopped

Row = dict  # {"check": name, "ok": True, False, or None for a figure without a bound, ...figures}


def main(
    part: str, arms: Callable[[bool], list[dict]], measure: Callable[[dict], Row], judge: Callable[[list[Row]], list]
) -> None:
    """Run a part as a command: print the row of each arm, and each bound's row as soon as `judge` returns it.

    An arm has a `check`, the name of its row, and may have a `process`: arms with another one do not share a process.
    `measure` runs in that process. `judge` turns the rows so far into rows of bounds.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__, allow_abbrev=False)
    parser.add_argument("--small", action="store_true", help="toy sizes, for a CPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no arm begins after so many seconds")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        serve(measure)
        return
    rows, judged = [], set()
    for row in run(part, arms(args.small), args.seconds):
        rows.append(row)
        bounds = [bound for bound in judge(rows) if bound["check"] not in judged]
        judged |= {bound["check"] for bound in bounds}
        for line in (row, *bounds):
            print(json.dumps(line), flush=True)


def run(part: str, arms: list[dict], seconds: float) -> Iterator[Row]:
    """Yield the row of each arm, and at the end a row that names the arms for which no time was left."""
    end, child, late = time.monotonic() + seconds, None, []
    for arm in arms:
        if time.monotonic() >= end:
            late.append(arm["check"])
            continue
        if child and (child.process.poll() is not None or child.name != arm.get("process")):
            child.close()
            child = None
        child = child or Child(part, arm.get("process"))
        started = time.monotonic()
        row = child.measure(arm, end + LATEST - started)
        yield {"check": arm["check"]} | row | {"wall_seconds": round(time.monotonic() - started, 1)}
    if child:
        child.close()
    if late:
        yield {"check": "time left", "ok": None, "reason": f"{seconds:.0f} s are over; left out: {', '.join(late)}"}


class Child:
    """A process that measures arms in turn; `name` is what its arms have in common."""

    def __init__(self, part: str, name: str | None):
        self.name, self._errors = name, tempfile.TemporaryFile()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self.process = subprocess.Popen([sys.executable, part, "--child"], cwd=ROOT, text=True, **pipes)

    def measure(self, arm: dict, seconds: float) -> Row:
        """Return the arm's row: a failed one where the process dies, or does not answer in so many seconds."""
        timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(arm) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line:
            return json.loads(line)
        status = self.process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines() or ["nothing on stderr"]
        return {"ok": False, "reason": f"the process ended with status {status}: {said[-1][:300]}"}

    def close(self) -> None:
        """End the process, and show what it wrote to stderr."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self._errors.seek(0)
        sys.stderr.write(self._errors.read().decode(errors="replace"))
        self._errors.close()


def serve(measure: Callable[[dict], Row]) -> None:
    """Answer each arm on stdin with its row on stdout; what libraries print to stdout goes to stderr."""
    sys.path.insert(0, ROOT)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            row = {"ok": None} | measure(json.loads(line))
        except Exception as e:
            traceback.print_exc()
            row = {"ok": False, "reason": f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"}
        answers.write(json.dumps(row) + "\n")


def bound(check: str, value: float, least: float | None) -> Row:
    """Return the row of a figure that must be at least `least`; without that, it is a figure alone."""
    return {"check": check, "ok": None if least is None else value >= least, "value": value, "least": least}
