"""What a training process needs before JAX is imported, and once it is."""

import gc
import os
import sys

HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"
TUNABLES = "GLIBC_TUNABLES"  # which glibc reads when a process starts, and never again


def environment() -> dict[str, str]:
    """What to add to the environment of a process that trains.

    XLA frees what a step needed at its end, and on a CPU the next step gets it back page by page: 111,708 faults a step
    of the `small` preset with 512 tokens at a time, and 565 when malloc asks for pages of 2 MB (glibc 2.35), which made
    2 cores 6% faster. XLA's own flags for CPUs helped by less than 1% or not at all (docs/performance.md).
    """
    try:
        with open(HUGE_PAGES) as f:
            on_request = "[madvise]" in f.read()  # with [always] they come unasked
    except OSError:  # not Linux, or a container that hides it
        return {}
    return {TUNABLES: "glibc.malloc.hugetlb=1"} if on_request and TUNABLES not in os.environ else {}


def prepare() -> None:
    """Starts this command anew, as the same process, where its environment lacks something."""
    if missing := environment():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | missing)


def spare_imports() -> None:
    """Keeps the garbage collector from what has been imported, and from looking as often as it would.

    Of the quickstart's start it took 1.3 s of 7.4, on 2 cores: reading 40 MB of JSON and tracing make many objects.
    """
    gc.freeze()
    gc.set_threshold(20_000)
