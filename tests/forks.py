"""Processes that start with the package imported, as forks of a server that has started no backend.

Importing JAX and the package takes 2 CPU seconds, and the tests start about 200 commands. The server is
`multiprocessing`'s forkserver. A fork runs a command through `runpy`, as `python -m` would, with its own arguments,
environment, signals and streams. All forks share the variables that JAX reads at its import.
"""

import atexit
import multiprocessing
import os
import pkgutil
import runpy
import subprocess
import sys
import threading
from multiprocessing import reduction

import pytest

PRELOADED = [f"lowrank_jax.{name}" for name in ("main", "generate", "evaluate", "plan", "serve", "report", "compress")]
PRELOADED += ["lowrank_jax.importer", "lowrank_jax.export.__main__", "matplotlib.pyplot"]

_context = multiprocessing.get_context("forkserver")


def start_server(environment: dict[str, str]) -> None:
    """Start the server, once, with the variables that JAX reads at its import."""
    _context.set_forkserver_preload([__name__, *PRELOADED])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server imports before it receives a path
        patch.setenv("OPENBLAS_NUM_THREADS", "1")  # a fork has only the thread that forked
        multiprocessing.forkserver.ensure_running()


class Fork:
    """A forked command with the parts of `subprocess.Popen`'s interface that tests use. Its streams are text."""

    def __init__(self, module: str, args: list[str], cwd, env, patches: dict, stdin=None, stdout=None, stderr=None):
        parent, child = {}, {}
        for number, stream in enumerate((stdin, stdout, stderr)):
            if stream == subprocess.PIPE:
                read, write = os.pipe()
                parent[number], child[number] = (write, read) if number == 0 else (read, write)
            elif stream == subprocess.DEVNULL:
                child[number] = os.open(os.devnull, os.O_RDWR)
            elif stream is not None:
                child[number] = os.dup(stream if isinstance(stream, int) else stream.fileno())
        streams = _Streams(child)
        self._process = _context.Process(target=_run, args=(module, args, os.fspath(cwd), env, patches, streams))
        self._process.start()
        atexit.register(self._process.kill)  # this process would wait for forks that a failed test leaves
        for fd in child.values():
            os.close(fd)
        self.pid = self._process.pid
        files = {number: open(fd, "w" if number == 0 else "r", errors="replace") for number, fd in parent.items()}
        self.stdin, self.stdout, self.stderr = (files.get(number) for number in range(3))

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, text: str | None = None, timeout: float | None = None) -> tuple[str, str]:
        """Write `text`, read both streams to their end and wait; raises TimeoutExpired after so many seconds."""
        read: dict[str, str] = {}
        readers = [
            threading.Thread(target=lambda name=name, stream=stream: read.update({name: stream.read()}), daemon=True)
            for name, stream in (("out", self.stdout), ("err", self.stderr))
            if stream
        ]
        for reader in readers:
            reader.start()
        if self.stdin:
            try:
                self.stdin.write(text or "")
                self.stdin.close()
            except BrokenPipeError:  # the command ended without reading all of it
                pass
        self.wait(timeout)
        for reader in readers:
            reader.join(10)
        return read.get("out", ""), read.get("err", "")


class _Streams:
    """File descriptors by number, which are sent to the fork with its arguments."""

    def __init__(self, fds: dict[int, int]):
        self.fds = fds

    def __getstate__(self) -> dict:
        return {number: reduction.DupFd(fd) for number, fd in self.fds.items()}

    def __setstate__(self, fds: dict) -> None:
        self.fds = {number: fd.detach() for number, fd in fds.items()}


def _run(module: str, args: list[str], cwd: str, env: dict[str, str], patches: dict, streams: _Streams) -> None:
    """Run the command as the main program, in the fork. `patches` maps names such as package.module.NAME to values."""
    for number, fd in streams.fds.items():
        os.dup2(fd, number)
        os.close(fd)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1, errors="backslashreplace")
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [module, *args]
    sys.path[0:0] = [cwd]
    for name, value in patches.items():
        place, attribute = name.rsplit(".", 1)
        setattr(pkgutil.resolve_name(place), attribute, value)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # nobody reads the stream any more
                pass
        atexit._run_exitfuncs()
