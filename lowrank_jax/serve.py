"""An OpenAI-compatible HTTP server for a trained model, with a chat page at /.

python -m lowrank_jax.serve --workdir=runs/quickstart
python -m lowrank_jax.serve --workdir=runs/quickstart --host=0.0.0.0 --port=8000 --slots=16   # with LOWRANK_API_KEY set

Routes: POST /v1/chat/completions and /v1/completions (api.py tells what they take), GET /v1/models, /healthz, /metrics
(Prometheus) and / (the page). A key is asked for under /v1 alone. SIGTERM or SIGINT: nothing new is taken, and what is
under way has a few seconds to finish.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys

import uvicorn

from lowrank_jax import cli
from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.data import chat
from lowrank_jax.inference import engine, quantize
from lowrank_jax.inference.server.api import Limits
from lowrank_jax.inference.server.routes import Server, Settings
from lowrank_jax.inference.server.scheduler import Scheduler
from lowrank_jax.machine import console
from lowrank_jax.training.trained import open_run

GRACE = 3.0  # seconds that requests under way have after a signal


class _Uvicorn(uvicorn.Server):
    """Leaves signals to this file, as uvicorn would end the process by them, and says when it listens."""

    def __init__(self, config: uvicorn.Config, url: str):
        super().__init__(config)
        self._url = url

    def capture_signals(self):
        return contextlib.nullcontext()

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        console.say(f"listening on {self._url}")


async def _run(server: uvicorn.Server, listener: socket.socket, scheduler: Scheduler) -> int:
    """Serves until a signal comes; returns its number."""
    loop, received = asyncio.get_running_loop(), []

    def stop(number: int) -> None:
        if received and number == signal.SIGINT:
            os._exit(128 + number)
        received.append(number)
        server.should_exit = True
        loop.call_later(GRACE, scheduler.close)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    await server.serve([listener])
    return received[0]


def _listen(host: str, port: int) -> tuple[socket.socket, str]:
    """A socket that has the address, before anything slow is done for it, and the address as a URL."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as e:
        raise UsageError(f"--host={host}: {e.strerror or e}") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as e:
        raise RunFailure(f"cannot listen on {host}, port {port}: {e.strerror}") from None
    name = f"[{host}]" if ":" in host else host
    return listener, f"http://{name}:{listener.getsockname()[1]}"


def arguments(argv: list[str]):
    parser = cli.Parser(__doc__)
    parser.add_argument("--workdir", required=True, help="the run")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default 127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free (default 8000)")
    parser.add_argument("--slots", type=int, default=8, help="answers under way at the same time (default 8)")
    parser.add_argument(
        "--context", type=int, default=4096, help="most tokens of a prompt and its answer (default 4096)"
    )
    parser.add_argument("--queue", type=int, default=64, help="most answers that wait for a slot (default 64)")
    parser.add_argument("--max_tokens", type=int, help="most new tokens of an answer (default: the context)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that a request may take (default 600)")
    parser.add_argument(
        "--api_key", help="what clients must send (or in LOWRANK_API_KEY, which no list of processes shows)"
    )
    parser.add_argument("--weights", default="auto", choices=("auto", *quantize.KINDS), help="how weights are kept")
    parser.add_argument("--model_name", help="what clients call the model (default: the name of the run's folder)")
    args = parser.parse_args(argv)
    if not 0 <= args.port <= 65535:
        raise UsageError("--port must be between 0 and 65535")
    if not 1 <= args.slots <= 1024 or not 0 <= args.queue <= 1_000_000:
        raise UsageError("--slots must be between 1 and 1,024 and --queue between 0 and 1,000,000")
    if not 16 <= args.context <= 1 << 20 or (args.max_tokens is not None and args.max_tokens < 1):
        raise UsageError("--context must be between 16 and 1,048,576 and --max_tokens at least 1")
    if not 0 < args.timeout < 1e6:
        raise UsageError("--timeout must be a number of seconds between 0 and 1e6")
    if args.api_key == "" or args.model_name == "":
        raise UsageError("--api_key and --model_name must not be empty")
    return args


def prepare(args) -> tuple[Server, Scheduler]:
    """The server of the run, and its scheduler, which has not begun."""
    run = open_run(args.workdir)
    weights, stop_ids = engine.prepare(run.config, run.params, args.weights), chat.stop_ids(run.tokenizer)
    model, tokenizer = run.config.model, run.tokenizer
    make = lambda: engine.Engine(model, weights, stop_ids, args.slots, args.context)
    scheduler = Scheduler(make, args.slots, args.queue)
    name = args.model_name or os.path.basename(os.path.abspath(args.workdir))
    most = args.max_tokens or args.context
    limits = Limits(name, model.vocab, args.context, most, args.slots + args.queue)
    key = args.api_key or os.environ.get("LOWRANK_API_KEY", "")
    return Server(scheduler, tokenizer, Settings(limits, args.timeout, key)), scheduler


def command(argv: list[str]) -> dict:
    args = arguments(argv)
    listener, url = _listen(args.host, args.port)
    for number in (signal.SIGTERM, signal.SIGINT):  # until it serves, there is nothing to finish
        signal.signal(number, lambda number, _: os._exit(128 + number))
    server, scheduler = prepare(args)
    scheduler.start()
    config = uvicorn.Config(
        server.app(), lifespan="off", loop="asyncio", http="h11", ws="none", log_level="warning", access_log=False,
        server_header=False, timeout_keep_alive=75, timeout_graceful_shutdown=int(GRACE) + 2,
    )  # fmt: skip
    number = asyncio.run(_run(_Uvicorn(config, url), listener, scheduler))
    scheduler.close()
    if args.json:
        print(json.dumps({"url": url, "stopped_by": signal.Signals(number).name}), flush=True)
    if not scheduler.join(GRACE):  # in a compilation, which nothing can stop
        sys.stdout.flush()
        os._exit(128 + number)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    cli.main(command)
