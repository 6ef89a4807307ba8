"""Load a server of a run with many clients at once, and compare each answer with that of an idle server.

    python scripts/bench/load_server.py --workdir=runs/quickstart
    python scripts/bench/load_server.py --workdir=runs/quickstart --clients=16 --seconds=30 --slots=4 --json

The script starts the server itself, on this machine's loopback. Requests differ in length and have a seed each, so that
no two answers are alike. Half of the requests are streams, and some of these are left early. A request without a whole
answer counts as dropped; an answer that differs from the idle server's counts as mixed up.
"""

import http.client
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
from typing import NamedTuple

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

from lowrank_jax import cli
from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.data import chat, tokenizer
from lowrank_jax.training import run_folder

WORDS = "the king and his queen said to all good people of old that no man may know what love has done here".split()
QUESTIONS = 24
LEAVE_SHARE = 0.05  # of the streams


class Answer(NamedTuple):
    text: str
    tokens: int
    whole: float  # seconds
    first: float | None = None  # seconds to the first text of a stream


class LeftEarly(Exception):
    """The client left on purpose."""


def questions(count: int, stop_ids: list[int], seed: int = 0) -> list[dict]:
    """Return requests of a few words to some hundred, with 4 to 200 new tokens and no end before."""
    draw, bias = random.Random(seed), {str(i): -100 for i in stop_ids}
    prompt = lambda: " ".join(draw.choices(WORDS, k=round(3 * 100 ** draw.random())))
    question = lambda: {"prompt": prompt(), "max_tokens": round(4 * 50 ** draw.random())}
    return [question() | {"temperature": 1.0, "seed": i, "logit_bias": bias} for i in range(count)]


def ask(port: int, question: dict, leaves: bool = False) -> Answer:
    """Send a request over a connection of its own; raises OSError or ValueError without a whole answer."""
    connection, began = http.client.HTTPConnection("127.0.0.1", port, timeout=300), time.perf_counter()
    try:
        connection.request("POST", "/v1/completions", json.dumps(question))
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"status {response.status}: {response.read()[:200]!r}")
        if "stream" not in question:
            body = json.load(response)
            text, tokens = body["choices"][0]["text"], body["usage"]["completion_tokens"]
            return Answer(text, tokens, time.perf_counter() - began)
        return _read_stream(response, began, leaves)
    finally:
        connection.close()


def _read_stream(response, began: float, leaves: bool) -> Answer:
    text, tokens, first = "", 0, None
    for line in response:
        data = line.decode().removeprefix("data:").strip()
        if data == "[DONE]":
            return Answer(text, tokens, time.perf_counter() - began, first)
        event = json.loads(data) if data else {"choices": []}
        for choice in event["choices"]:
            text += choice["text"]
            first = first or time.perf_counter() - began
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
        if leaves and first:
            raise LeftEarly
    raise ValueError("the stream was cut off")


class Load:
    """Clients in a thread each, until `over` is set, and their results."""

    def __init__(self, port: int, requests: list[dict], expected: list[str]):
        self.port, self.requests, self.expected = port, requests, expected
        self.over = threading.Event()
        self.answers: list[Answer] = []
        self.mixed, self.dropped, self.left = [], [], 0
        self._lock = threading.Lock()

    def client(self, seed: int) -> None:
        draw = random.Random(seed)
        while not self.over.is_set():
            i, streams = draw.randrange(len(self.requests)), draw.random() < 0.5
            stream = {"stream": True, "stream_options": {"include_usage": True}} if streams else {}
            try:
                answer = ask(self.port, self.requests[i] | stream, leaves=streams and draw.random() < LEAVE_SHARE)
            except LeftEarly:
                with self._lock:
                    self.left += 1
            except (OSError, ValueError, http.client.HTTPException) as e:
                with self._lock:
                    self.dropped.append(f"{type(e).__name__}: {e}")
            else:
                with self._lock:
                    self.answers.append(answer)
                    self.mixed += [i] if answer.text != self.expected[i] else []


def start(args, files: int = 0, context: int = 4096) -> tuple[subprocess.Popen, int]:
    """Start a server of the run, with so many open `files` at most; return its process and port."""
    flags = [f"--workdir={args.workdir}", "--port=0", f"--slots={args.slots}", f"--queue={args.clients}"]
    flags += [f"--context={context}"]
    command = [sys.executable, "-m", "lowrank_jax.serve", *flags, f"--weights={args.weights}"]
    limited = (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))) if files else None
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=os.getcwd(), preexec_fn=limited)
    for line in process.stderr:
        if line.startswith("listening on "):
            threading.Thread(target=lambda: print(process.stderr.read(), end="", file=sys.stderr), daemon=True).start()
            return process, int(line.rsplit(":", 1)[1])
        print(line, end="", file=sys.stderr)
    raise RunFailure("the server did not start")


def metric(port: int, name: str) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return next((float(line.split()[-1]) for line in lines if line.startswith(name + " ")), float("nan"))


def alone(port: int, requests: list[dict]) -> list[str]:
    """Return the answers of an otherwise idle server; raises RunFailure if two of them are alike."""
    texts = [ask(port, request).text for request in requests]
    if len(set(texts)) < len(texts):
        raise RunFailure("two of the answers are alike, so that a mix-up could not be noticed; train the run longer")
    return texts


def run(port: int, requests: list[dict], expected: list[str], clients: int, seconds: float) -> dict:
    """Load the server for so many seconds; return the figures of all answers, compared with the `expected` ones."""
    load = Load(port, requests, expected)
    resident = {"start": metric(port, "process_resident_memory_bytes")}
    threads = [threading.Thread(target=load.client, args=(seed,), daemon=True) for seed in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    time.sleep(seconds / 2)
    resident["middle"] = metric(port, "process_resident_memory_bytes")
    time.sleep(seconds / 2)
    load.over.set()
    for thread in threads:
        thread.join(300)
    elapsed = time.perf_counter() - began
    time.sleep(1)  # the engine drops abandoned requests at its next step
    resident["end"] = metric(port, "process_resident_memory_bytes")
    percentiles = lambda values: (
        statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else [0] * 99
    )
    whole = percentiles([a.whole for a in load.answers])
    first = percentiles([a.first for a in load.answers if a.first is not None])
    return {
        "clients": clients,
        "seconds": round(elapsed, 1),
        "requests": len(load.answers) + len(load.dropped) + load.left,
        "left_early": load.left,
        "dropped": len(load.dropped),
        "mixed_up": len(load.mixed),
        "tokens_per_s": round(sum(a.tokens for a in load.answers) / elapsed, 1),
        "latency_s": {f"p{p}": round(whole[p - 1], 3) for p in (50, 90, 99)},
        "first_text_s": {f"p{p}": round(first[p - 1], 3) for p in (50, 90, 99)},
        "rss_mb": {when: round(value / 1e6, 1) for when, value in resident.items()},
        "still_active": metric(port, "lowrank_active_rows") + metric(port, "lowrank_queue_length"),
        "reasons": sorted(set(load.dropped))[:5],
    }


def table(result: dict) -> str:
    rows = []
    for name, value in result.items():
        shown = "  ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        rows += [f"{name.replace('_', ' '):14} {shown}"] if value != [] else []
    return "\n".join(rows)


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--workdir", required=True, help="the run")
    parser.add_argument("--clients", type=int, default=64, help="number of simultaneous clients (default 64)")
    parser.add_argument("--seconds", type=float, default=120.0, help="duration (default 120)")
    parser.add_argument("--slots", type=int, default=8, help="of the server (default 8)")
    parser.add_argument("--weights", default="auto", help="as of lowrank_jax.serve (default auto)")
    args = parser.parse_args(argv)
    if not 1 <= args.clients <= 1000 or not 0 < args.seconds <= 86400:
        raise UsageError("--clients must be between 1 and 1,000 and --seconds at most 86,400")
    requests = questions(QUESTIONS, chat.stop_ids(tokenizer.load(run_folder.tokenizer_folder(args.workdir))))
    process, port = start(args)
    try:
        result = run(port, requests, alone(port, requests), args.clients, args.seconds)
        process.send_signal(signal.SIGTERM)
        result["exit_status"] = process.wait(30)
    finally:
        process.kill()
    print(table(result))
    if result["dropped"] or result["mixed_up"]:
        raise RunFailure(f"{result['dropped']} answers were dropped and {result['mixed_up']} mixed up")
    return result


if __name__ == "__main__":
    cli.main(command)
