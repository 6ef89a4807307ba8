"""The start of a process: its environment before JAX is imported, its caches, its CPU, and the garbage collector."""

import functools
import gc
import os
import stat
import sys
import tempfile

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


@functools.cache
def cache_folder() -> str:
    """Return the folder for compiled programs, below $XDG_CACHE_HOME or ~/.cache; create it.

    Where it cannot be written, or where there is no home folder, a temporary folder of this user takes its place. The
    environment then names that folder, for libraries such as Matplotlib and for processes that this one starts.
    """
    if not os.environ.get("HOME", "unset"):
        del os.environ["HOME"]
    if not os.path.isabs(os.environ.get("XDG_CACHE_HOME", "")):  # to be ignored, says its specification
        os.environ.pop("XDG_CACHE_HOME", None)
    home, problem = os.path.expanduser("~"), ""
    if not (os.path.isabs(home) and os.path.isdir(home)):  # libraries would create a folder named ~
        os.environ["HOME"], problem = _temporary_folder(), "there is no home folder"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not _can_write(os.path.join(cache, "lowrank_jax")):
        problem = f"{cache} cannot be written"
        cache = os.environ["XDG_CACHE_HOME"] = os.path.join(_temporary_folder(), ".cache")
        os.makedirs(os.path.join(cache, "lowrank_jax"), exist_ok=True)
        os.environ.setdefault("MPLCONFIGDIR", os.path.join(cache, "matplotlib"))
    if problem:
        from lowrank_jax.machine import console  # imports tqdm

        console.say(f"{problem}, so caches are in {cache}; set HOME or XDG_CACHE_HOME to a folder that can be written")
    return os.path.join(cache, "lowrank_jax")


def _can_write(folder: str) -> bool:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _temporary_folder() -> str:
    """Return a folder that only this user can write: the same one for each process, unless its name is taken."""
    folder = os.path.join(tempfile.gettempdir(), f"lowrank_jax-{os.getuid()}")
    try:
        os.mkdir(folder, 0o700)
    except OSError:
        facts = os.lstat(folder) if os.path.lexists(folder) else None
        is_ours = facts and stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o22
        if not (is_ours and os.access(folder, os.W_OK)):
            return tempfile.mkdtemp(prefix="lowrank_jax-")
    return folder


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
