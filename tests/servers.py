"""The server as a real process, for the tests that talk to it."""

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


class Served(NamedTuple):
    url: str
    process: forks.Fork
    said: list[str]  # lines of standard error

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return response.read().decode()

    def metric(self, name: str) -> float:
        lines = self.get("/metrics").splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith((name + " ", name + "{")))

    def post(self, path: str, body, headers: dict | None = None) -> tuple[int, dict, dict]:
        """Status, headers and JSON of the response; `body` is sent as it is if it is bytes, else as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers or {})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, dict(response.headers), json.load(response)
        except urllib.error.HTTPError as e:
            return e.code, dict(e.headers), json.load(e)


@contextlib.contextmanager
def serving(workdir, *args: str) -> Iterator[Served]:
    """A server of the run in `workdir`, on a port of its own."""
    process = runs.launch("serve", f"--workdir={workdir}", "--port=0", *args, stdout=subprocess.PIPE)
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("listening on "):
            break
    assert said and said[-1].startswith("listening on "), said
    threading.Thread(target=lambda: said.extend(process.stderr), daemon=True).start()
    try:
        yield Served(said[-1].split()[-1], process, said)
    finally:
        process.kill()
        process.wait()


def until(condition, seconds: float = 10.0) -> bool:
    """Whether the condition comes true within the time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
