"""The start of a process: its environment before JAX is imported, its CPU, and the garbage collector."""

import gc
import os
import sys

HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"
TUNABLES = "GLIBC_TUNABLES"  # glibc reads it once, when a process starts


def environment() -> dict[str, str]:
    """Return the variables that a process which trains should add to its environment.

    On a CPU, XLA frees a step's memory and the next step gets it back page by page. With 2 MB pages (glibc 2.35), a
    step of the `small` preset with 512 tokens per microbatch has 565 page faults instead of 111,708, and 2 cores are 6%
    faster. XLA's own flags for CPUs helped by less than 1% or not at all (docs/performance.md).
    """
    try:
        with open(HUGE_PAGES) as f:
            on_request = "[madvise]" in f.read()  # with [always], every process has them
    except OSError:  # not Linux, or a container that hides the file
        return {}
    return {TUNABLES: "glibc.malloc.hugetlb=1"} if on_request and TUNABLES not in os.environ else {}


def open_streams() -> None:
    """Open /dev/null for every standard stream that is closed: else the next file gets its number, and its output."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))


def prepare() -> None:
    """Restart this command, in the same process, where variables are missing in its environment."""
    open_streams()
    if missing := environment():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | missing)


def cpu_features() -> str:
    """Return the line that lists the CPU's features, on which compiled programs depend; empty where unknown."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            return next((line for line in f if line.startswith(("flags", "Features"))), "")
    except OSError:
        return ""


def spare_imports() -> None:
    """Keep the garbage collector from scanning imported modules, and let it run less often.

    It took 1.3 s of the quickstart's start of 7.4 s on 2 cores: reading 40 MB of JSON and tracing make many objects.
    """
    gc.freeze()
    gc.set_threshold(20_000)
