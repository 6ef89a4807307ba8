"""Attack a server of a run, and measure what others notice: the longest wait for /healthz, and the server's memory.

    python scripts/bench/attack_server.py --workdir=runs/quickstart                   # the table of docs/inference.md
    python scripts/bench/attack_server.py --workdir=runs/quickstart --fuzz=1400 --seeds=0,1,2

The script starts the server itself, on this machine's loopback, with 256 open files. While an attack runs, /healthz is
asked every 20 ms over a connection of its own. With --fuzz, so many requests of each seed, valid and broken bodies and
broken HTTP, are sent besides; none may be answered with a 5xx or kill the server.
"""

import concurrent.futures
import contextlib
import http.client
import json
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

from lowrank_jax import cli
from lowrank_jax.config import RunFailure
from scripts.bench import load_server

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
MARK, MEGABYTE = "\u2581", 1 << 20
MOST_STALL, MOST_GROWTH = 0.5, 300.0  # seconds, MB
FIELDS = (
    "prompt messages max_tokens n stop stream stream_options logprobs top_logprobs logit_bias seed temperature top_p"
)
VALUES = [None, True, -1, 0, 1, 3, 10**30, 0.5, float("1e308"), "", "a", MARK, "\ud800", [], {}, [1], ["a"], {"1": 5}]


def post(port: int, path: str, body, timeout: float = 300.0) -> int:
    """Send a request and read the whole response; return its status, or 0 where the connection was closed."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(
            "POST",
            path,
            body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass"),
        )
        response = connection.getresponse()
        response.read()
        return response.status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def together(port: int, path: str, bodies: list) -> list[int]:
    with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: post(port, path, body), bodies))


def long_stops(port: int) -> list[int]:
    stops = [f"{i}" * 1023 + "x" for i in range(4)]
    bodies = [{"prompt": "a", "stop": "a" * MEGABYTE, "max_tokens": 200}]
    bodies += [{"prompt": "0", "stop": stops, "n": 64, "max_tokens": 500, "logit_bias": {"48": 100}}]
    return together(port, TEXT, bodies)


def marks(port: int) -> list[int]:
    return together(port, TEXT, [{"prompt": MARK * (4 * MEGABYTE // 3 - 20)}] * 6)


def messages(port: int) -> list[int]:
    chat = lambda count, text: {"messages": [{"role": "user", "content": text}] * count, "max_tokens": 1}
    return together(port, CHAT, [chat(110_000, "a"), chat(4000, ""), chat(4000, "a"), chat(1, MARK * 30_000)])


def texts(port: int) -> list[int]:
    long = [
        {"prompt": text * (4 * MEGABYTE // len(text.encode()) - 20)} for text in ("a", "\n", "ab ", "\u00e9", "\x00")
    ]
    return together(port, TEXT, [*long, {"prompt": ["a " * 4000] * 64, "max_tokens": 1}, {"prompt": [1] * 10**6}])


def log_probabilities(port: int) -> list[int]:
    most = {"prompt": "a", "logprobs": 20, "logit_bias": {"2": -100}}
    bodies = [
        most | {"n": 24, "max_tokens": 4000},
        most | {"n": 1, "max_tokens": 4000},
        most | {"n": 8, "max_tokens": 500},
    ]
    return together(port, TEXT, [*bodies, most | {"n": 24, "max_tokens": 1000, "stream": True}])


def biases(port: int) -> list[int]:
    sizes = [1, 5, 9, 17, 33, 65, 129, 257, 300]
    return [
        post(port, TEXT, {"prompt": "a", "max_tokens": 2, "logit_bias": dict.fromkeys(map(str, range(n)), 1)})
        for n in sizes
    ]


def silence(port: int) -> list[int]:
    """Hold 300 connections that say nothing, or never end a request's head."""
    with contextlib.ExitStack() as stack:
        for i in range(300):
            with contextlib.suppress(OSError):
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
                connection.sendall(b"GET /healthz HTTP/1.1\r\nX: "[: i % 30])
        time.sleep(3)
        return [post(port, TEXT, {"prompt": "a", "max_tokens": 1})]


def unread(port: int) -> list[int]:
    """Ask for long streams, and read nothing of them."""
    body = json.dumps({"prompt": "a", "max_tokens": 4000, "n": 8, "logprobs": 20, "stream": True}).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(socket.create_connection(("127.0.0.1", port))).sendall(head + body)
        time.sleep(5)
    return []


def nested(port: int) -> list[int]:
    bodies = [b'{"prompt": ' + b"[" * MEGABYTE, b'{"a":' * 10**5, b'{"seed": ' + b"9" * MEGABYTE + b"}"]
    return together(port, TEXT, [*bodies, b"{" + b'"a":1,' * 10**5 + b'"b":1}', b"\xff" * MEGABYTE])


def endless_bodies(port: int) -> list[int]:
    """Hold up to 90 bodies of almost 4 MB that never end."""
    head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {4 * MEGABYTE}\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        for _ in range(90):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            connection.sendall(head + b" " * (4 * MEGABYTE - 100))
        time.sleep(2)
        return [post(port, TEXT, {"prompt": "a", "max_tokens": 1})]


def many_values(port: int) -> list[int]:
    """Send JSON that takes thirty times its size once it is parsed."""
    units = [b"[],", b"{},", b'{"a":0},', b'"",']
    return together(port, TEXT, [b'{"prompt":[' + u * (4 * MEGABYTE // len(u) - 10) + b"0]}" for u in units * 3])


ATTACKS: dict[str, Callable[[int], list[int]]] = {
    "stop strings of 1 MB; 4 of 1 kB with n=64": long_stops,
    "6 prompts of 4 MB of U+2581": marks,
    "110,000 messages; 4,000 messages": messages,
    "prompts of 4 MB of other letters; 64 long prompts": texts,
    "n=24 with 4,000 tokens and 20 log-probabilities": log_probabilities,
    "logit_bias of 9 sizes": biases,
    "300 silent connections": silence,
    "8 streams that nobody reads": unread,
    "nested, endless and broken JSON": nested,
    "90 bodies of 4 MB that do not end": endless_bodies,
    "12 bodies of 4 MB of empty lists and objects": many_values,
}


class Watch:
    """Ask /healthz again and again; `worst` is the longest wait in seconds, `most` the largest memory in MB."""

    def __init__(self, port: int):
        self.port, self.worst, self.most, self._over = port, 0.0, 0.0, threading.Event()
        self._threads = [threading.Thread(target=loop) for loop in (self._ask, self._weigh)]

    def __enter__(self) -> "Watch":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        while not self._over.wait(0.02):
            began = time.perf_counter()
            with contextlib.suppress(OSError, http.client.HTTPException):
                get(self.port, "/healthz")
            self.worst = max(self.worst, time.perf_counter() - began)

    def _weigh(self) -> None:
        while not self._over.wait(0.2) or not self.most:
            with contextlib.suppress(OSError, http.client.HTTPException):
                self.most = max(self.most, memory(self.port))


def get(port: int, path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def memory(port: int) -> float:
    """Return the server's resident memory in MB."""
    lines = get(port, "/metrics").splitlines()
    return next(float(line.split()[1]) / 1e6 for line in lines if line.startswith("process_resident_memory_bytes"))


def fuzz(port: int, count: int, seed: int) -> dict[int, int]:
    """Send `count` requests of random fields, bytes and HTTP; return how often each status came (0: closed)."""
    draw, statuses = random.Random(seed), {}
    value = lambda depth=0: (
        draw.choice(VALUES) if depth > 2 or draw.random() < 0.7 else [value(depth + 1)] * draw.randint(0, 3)
    )

    def one(_) -> int:
        path, kind = draw.choice((TEXT, CHAT)), draw.random()
        base = (
            {"prompt": "a", "max_tokens": 2}
            if path == TEXT
            else {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
        )
        body = base | {name: value() for name in draw.sample(FIELDS.split(), draw.randint(0, 3))}
        if kind < 0.6:
            return post(port, path, body, 60)
        text = json.dumps(body).encode()
        broken = bytearray(text)
        for _ in range(draw.randint(1, 5)):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        if kind < 0.8:
            return post(port, path, bytes(broken), 60)
        length = draw.choice((len(text), 0, 5, -1, 10**20))
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
        return raw(port, bytes(bytearray(head.encode())[draw.choice((0, 0, 3)) :]) + bytes(broken))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for status in pool.map(one, range(count)):
            statuses[status] = statuses.get(status, 0) + 1
    return dict(sorted(statuses.items()))


def raw(port: int, data: bytes) -> int:
    """Send bytes, close the sending half, and return the status of what comes back; 0 where nothing does."""
    with contextlib.suppress(OSError, ValueError, IndexError), socket.create_connection(("127.0.0.1", port), 5) as s:
        s.sendall(data)
        s.shutdown(socket.SHUT_WR)
        return int(s.recv(4096).split()[1])
    return 0


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--workdir", required=True, help="the run")
    parser.add_argument("--fuzz", type=int, default=0, help="random requests of each seed (default 0)")
    parser.add_argument("--seeds", default="0,1,2")
    args = parser.parse_args(argv)
    args.slots, args.clients, args.weights = 8, 64, "auto"
    process, port = load_server.start(args, files=256)
    rows, statuses = [], {}
    try:
        post(port, TEXT, {"prompt": "a", "max_tokens": 2})
        idle = memory(port)
        print(
            "| attack | longest wait for /healthz, s | memory above idle, MB | statuses |\n|---|---|---|---|",
            flush=True,
        )
        for name, attack in ATTACKS.items():
            with Watch(port) as watch:
                answered = attack(port)
            counts = ", ".join(f"{status} x {answered.count(status)}" for status in dict.fromkeys(answered))
            rows.append({"attack": name, "stall": watch.worst, "memory": watch.most - idle, "statuses": answered})
            print(f"| {name} | {watch.worst:.2f} | {watch.most - idle:.0f} | {counts} |", flush=True)
        for seed in args.seeds.split(",") if args.fuzz else ():
            statuses[seed] = fuzz(port, args.fuzz, int(seed))
            print(f"seed {seed}: {statuses[seed]}; memory {memory(port) - idle:.0f} MB above idle", flush=True)
        end = memory(port) - idle
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    failures = [
        status
        for counts in [*statuses.values(), *({s: 1 for s in r["statuses"]} for r in rows)]
        for status in counts
        if status >= 500
    ]
    wrong = [row["attack"] for row in rows if row["stall"] > MOST_STALL or row["memory"] > MOST_GROWTH]
    result = {"attacks": rows, "fuzz": statuses, "memory_at_the_end": end}
    if wrong or failures:
        raise RunFailure(f"too long or too large: {wrong}; statuses {failures}")
    return result


if __name__ == "__main__":
    cli.main(command)
