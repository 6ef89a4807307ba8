"""Shared by the parts of scripts/check_device.py: their flags, their rows on stdout, and their time."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from lowrank_jax import cli
from lowrank_jax.machine import console

LONGEST_REASON = 400


class Rows(NamedTuple):
    """A part's flags, and the stream that takes its rows: everything else that prints to stdout goes to stderr."""

    small: bool
    deadline: float  # no measurement starts after it
    stream: object

    def has_time(self) -> bool:
        return time.monotonic() < self.deadline

    def row(self, check: str, ok: bool | None, **figures) -> None:
        """Print one result at once; `ok` is None for a figure without a bound."""
        print(console.to_json({"check": check, "ok": ok} | figures), file=self.stream, flush=True)

    def measure(self, check: str, run: Callable[[], tuple[bool | None, dict]], **facts) -> None:
        """Print the (ok, figures) of `run()`, or that it failed and why, or that no time was left for it."""
        if not self.has_time():
            self.row(check, None, **facts, reason="no time left")
            return
        started = time.monotonic()
        try:
            ok, figures = run()
        except Exception as e:  # whatever a device does, the other checks go on
            ok, figures = False, {"reason": reason_of(e)}
        self.row(check, ok, **facts, **figures, seconds=round(time.monotonic() - started, 2))


def start(doc: str, argv: list[str] | None = None) -> Rows:
    """Read a part's flags and take stdout for its rows."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="toy sizes, for a CPU")
    parser.add_argument("--seconds", type=float, default=600, help="start no new measurement after this time")
    args = parser.parse_args(argv)
    cli.use_compilation_cache()
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout.flush()
    os.dup2(2, 1)
    return Rows(args.small, time.monotonic() + args.seconds, stream)


def reason_of(e: BaseException) -> str:
    """Return an error in one line."""
    return f"{type(e).__name__}: {' '.join(str(e).split())}"[:LONGEST_REASON]


def events_of(folder: str, kind: str) -> Iterator[dict]:
    """Return the events of one kind in a run's ledger."""
    from lowrank_jax.training import run_folder

    return (event for event in run_folder.read_rows(folder, "events.jsonl") if event["event"] == kind)
