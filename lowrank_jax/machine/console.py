"""Lines for the person who watches a command; stdout stays for results."""

import contextlib
import os
import sys

from tqdm import tqdm

from lowrank_jax.machine import processes

ABANDONED = "abandoned"  # name prefix of the threads that a process does not wait for when it ends


def say(line: str, everyone: bool = False) -> None:
    """Write a line to stderr, above the progress bar.

    In a multi-process run only the first process writes, or with `everyone` each process, with its name in front.
    """
    if everyone or processes.is_first():
        with contextlib.suppress(OSError):  # nobody reads stderr any more: no reason to stop
            tqdm.write(processes.name() + line if everyone else line, file=sys.stderr)


def show(text: str) -> None:
    """Write a line to stdout; where that fails, as when nobody reads it any more, drop it and all later ones."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
