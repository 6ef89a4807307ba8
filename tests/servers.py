"""The server as a real process, for the tests that send it requests."""

import contextlib
import json
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import NamedTuple

import forks
import runs

from lowrank_jax.inference.engine import Engine


class Served(NamedTuple):
    url: str
    process: forks.Fork
    lines: list[str]  # of standard error

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return response.read().decode()

    def metric(self, name: str) -> float:
        lines = self.get("/metrics").splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith((name + " ", name + "{")))

    def post(self, path: str, body, headers: dict | None = None) -> tuple[int, dict, dict]:
        """Return (status, headers, JSON) of the response; a `body` that is not bytes is sent as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers or {})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, dict(response.headers), json.load(response)
        except urllib.error.HTTPError as e:
            return e.code, dict(e.headers), json.load(e)


_step = Engine.step


def unhurried_step(self, *args):
    """Do an engine's step, and wait for a millisecond per token, as for a larger model, which leaves time to others."""
    pieces = _step(self, *args)
    time.sleep(0.001 * max((len(piece.ids) for piece in pieces.values()), default=0))
    return pieces


@contextlib.contextmanager
def serving(workdir, *args: str, patches: dict | None = None) -> Iterator[Served]:
    """Yield a server of the run in `workdir`, on its own port; `patches` are those of runs.launch."""
    args = f"--workdir={workdir}", "--port=0", *args
    process = runs.launch("serve", *args, patches=patches, stdout=subprocess.PIPE)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("listening on "):
            break
    assert lines and lines[-1].startswith("listening on "), lines
    threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True).start()
    try:
        yield Served(lines[-1].split()[-1], process, lines)
    finally:
        process.kill()
        process.wait()


def until(condition, seconds: float = 10.0) -> bool:
    """Wait for the condition; return False if it does not become true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
