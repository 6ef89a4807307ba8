"""Compare our server with llama.cpp's under load: the same model, requests and clients, in one run on this CPU.

Compared: tokens per second, and the wait for an answer's first token and for each further one, as clients see them
through HTTP streams. Fair: both servers have as many slots as there are clients, two threads and weights of the same
width (fp32 and f32, or int8 and q8_0), each has its default cache, and the GGUF is the run's export. They take turns at
each load. Prompts are random tokens, so that no server can reuse one; answers are greedy and as long as the request
says. A short prompt has 16 tokens and its answer 128, a long one 1,500 and 64.

    pip install xllamacpp
    python scripts/bench/servers.py --workdir=runs/quickstart

Our server sends up to 16 tokens in one event. A further token's wait is the time after the first one, divided by the
number of tokens, of each answer; `pause` is the time between events.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

from lowrank_jax import cli
from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.data import chat
from lowrank_jax.training import trained
from scripts.bench import harness, load_server

THREADS, CONTEXT = 2, 2048
PROMPTS = {"short": (16, 128), "long": (1500, 64)}  # tokens read and written
WIDTHS = {"32": ("fp32", "f32"), "8": ("int8", "q8_0")}  # of our weights, and of the GGUF's
FORMS = ("dense", "latent")  # of attention in the GGUF


class Answer(NamedTuple):
    tokens: int
    ended: float
    first: float  # seconds to the first text
    each: float  # seconds per further token
    pauses: list[float]  # seconds between events


async def ask(port: int, request: dict) -> Answer:
    """Send a streamed request over a connection of its own; raises RunFailure without a whole answer."""
    body = json.dumps(request | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    began, reader, writer = time.perf_counter(), *await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    try:
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        status = (await reader.readline()).split()[1:2]
        if status != [b"200"]:
            raise RunFailure(f"status {status}: {(await reader.read(1000))[-300:]!r}")
        times, last = [], b""
        while line := await reader.readline():
            if line.startswith(b"data: [DONE]"):
                break
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
                last = line
        tokens = json.loads(last[6:]).get("usage", {}).get("completion_tokens", 0)
    finally:
        writer.close()
    if tokens != request["max_tokens"]:
        raise RunFailure(f"an answer has {tokens} tokens, not {request['max_tokens']}")
    texts = times[:-1]  # the last one is the usage
    pauses = [b - a for a, b in itertools.pairwise(texts)]
    return Answer(tokens, texts[-1], texts[0] - began, (texts[-1] - texts[0]) / (tokens - 1), pauses)


async def load(port: int, clients: int, seconds: float, draw: "Draw") -> dict:
    """Return the figures of so many clients that ask one request after another."""
    start = time.perf_counter() + seconds / 10  # answers that end before are not counted
    answers: list[Answer] = []

    async def client() -> None:
        while time.perf_counter() < start + seconds:
            answers.append(await ask(port, draw()))

    await asyncio.gather(*(client() for _ in range(clients)))
    answers = [answer for answer in answers if start < answer.ended < start + seconds]
    return figures(answers, seconds)


def figures(answers: list[Answer], seconds: float) -> dict:
    if len(answers) < 2:
        raise RunFailure(f"{len(answers)} answers in {seconds} seconds are too few; give --seconds more")
    cut = lambda values: statistics.quantiles(values, n=100, method="inclusive")
    parts = {
        "first": cut([answer.first for answer in answers]),
        "each": cut([answer.each for answer in answers]),
        "pause": cut([pause for answer in answers for pause in answer.pauses]),
    }
    ms = {f"{name}_p{p}_ms": round(1e3 * values[p - 1], 2) for name, values in parts.items() for p in (50, 99)}
    return {"answers": len(answers), "tokens_per_s": round(sum(a.tokens for a in answers) / seconds, 1), **ms}


class Draw:
    """Draws requests of one kind, the same ones for each server."""

    def __init__(self, kind: str, vocab: int, stop_ids: list[int]):
        self.read, self.written = PROMPTS[kind]
        self.vocab, self.bias, self.random = vocab, {str(i): -100 for i in stop_ids}, random.Random(0)

    def __call__(self) -> dict:
        ids = [self.random.randrange(self.vocab // 2, self.vocab) for _ in range(self.read)]  # no control tokens
        return {"prompt": ids, "max_tokens": self.written, "temperature": 0, "logit_bias": self.bias}


def start_ours(workdir: str, slots: int, weights: str) -> tuple[subprocess.Popen, int]:
    args = argparse.Namespace(workdir=workdir, slots=slots, clients=slots, weights=weights)
    return load_server.start(args, context=CONTEXT)


def start_llama(path: str, slots: int) -> tuple[subprocess.Popen, int]:
    command = [sys.executable, os.path.abspath(__file__), "--child", path, str(slots)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if line.startswith("http"):
            return process, int(line.rsplit(":", 1)[1])
    raise RunFailure("llama.cpp's server did not start")


def child(argv: list[str]) -> dict:
    import xllamacpp

    path, slots = argv[0], int(argv[1])
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.n_gpu_layers = CONTEXT * slots, slots, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
    # Its cache stays at its default, f16: one in f32 makes it several times slower with 8 clients.
    params.cache_prompt, params.cache_ram_mib, params.verbosity = False, 0, -1
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.pause()
    return {}


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--workdir", required=True, help="the run")
    parser.add_argument("--clients", default="1,8,64", help="numbers of clients (default 1,8,64)")
    parser.add_argument("--widths", default="32,8", help="bits of the weights (default 32,8)")
    parser.add_argument("--prompts", default="short,long")
    parser.add_argument("--seconds", type=float, default=120.0, help="of each load (default 120)")
    args = parser.parse_args(argv)
    widths, kinds = args.widths.split(","), args.prompts.split(",")
    if unknown := {*widths, *kinds} - {*WIDTHS, *PROMPTS}:
        raise UsageError(f"{min(unknown)} is none of {', '.join([*WIDTHS, *PROMPTS])}")
    from lowrank_jax.export import gguf

    run, rows = trained.open_run(args.workdir), []
    vocab, stop_ids, forms = run.config.model.vocab, chat.stop_ids(run.tokenizer), FORMS
    with tempfile.TemporaryDirectory() as folder:
        for width, clients, kind in itertools.product(widths, map(int, args.clients.split(",")), kinds):
            weights, quant = WIDTHS[width]
            servers = {"ours": lambda clients=clients, weights=weights: start_ours(args.workdir, clients, weights)}
            for form in forms:
                path = os.path.join(folder, f"{form}-{quant}.gguf")
                try:
                    if not os.path.exists(path):
                        os.rename(gguf.write(run, os.path.join(folder, form), form, quant), path)
                except UsageError as e:  # the latent form needs one rank for Q, K, V and O
                    forms = FORMS[:1]
                    print(f"left out: {e}", file=sys.stderr)
                    break
                servers[f"llama.cpp {form}"] = lambda path=path, clients=clients: start_llama(path, clients)
            for name, start in servers.items():
                process, port = start()
                try:
                    row = asyncio.run(load(port, clients, args.seconds, Draw(kind, vocab, stop_ids)))
                finally:
                    process.kill()
                    process.wait()
                rows.append({"server": name, "bits": width, "clients": clients, "prompts": kind} | row)
                print_row(rows[-1], first=len(rows) == 1)
    return {"results": rows}


def print_row(row: dict, first: bool) -> None:
    titles = ("server", "bits", "clients", "prompts", "tokens_per_s", *(k for k in row if k.endswith("_ms")))
    if first:
        print(" | ".join(titles))
    print(" | ".join(str(row[title]) for title in titles), flush=True)


if __name__ == "__main__":
    harness.main(command, child)
