"""An OpenAI-compatible HTTP server for a trained model, with a chat page at /.

python -m lowrank_jax.serve --workdir=runs/quickstart
python -m lowrank_jax.serve --workdir=runs/quickstart --host=0.0.0.0 --port=8000 --slots=16   # with LOWRANK_API_KEY set

Routes: POST /v1/chat/completions and /v1/completions (api.py lists their fields), GET /v1/models, /healthz, /metrics
(Prometheus) and / (the page). Only /v1 needs an API key. Without a key, the server answers only to the names and
addresses of this machine, and to pages of other sites only with --allow-origin. After SIGTERM or SIGINT it takes no new
requests and gives active ones a few seconds to finish.
"""

import asyncio
import gc
import os
import re
import signal
import socket
import sys

from lowrank_jax import cli
from lowrank_jax.config import UsageError
from lowrank_jax.data import chat
from lowrank_jax.inference import engine, quantize
from lowrank_jax.inference.server import connections
from lowrank_jax.inference.server.api import Settings
from lowrank_jax.inference.server.routes import Server
from lowrank_jax.inference.server.scheduler import Scheduler
from lowrank_jax.machine import console
from lowrank_jax.model import costs
from lowrank_jax.training.trained import open_run

LIMITS = {"port": (0, 65535), "slots": (1, 1024), "queue": (0, 10**6), "context": (16, 2**20), "max_tokens": (1, 10**9)}


def arguments(argv: list[str]):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    parser.add_run()
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    add("--port", type=int, default=8000, help="0 takes any free port (default 8000)")
    add("--slots", type=int, default=8, help="answers that are generated at the same time (default 8)")
    add("--context", type=int, default=4096, help="most tokens of a prompt and its answer (default 4096)")
    add("--queue", type=int, default=64, help="most answers that wait for a slot (default 64)")
    add("--max_tokens", type=int, help="most new tokens of an answer (default: the context)")
    add("--timeout", type=float, default=600.0, help="most seconds per request (default 600)")
    add(
        "--api_key",
        help="key that clients must send, or several, separated by commas; LOWRANK_API_KEY sets them "
        "without showing them in process lists",
    )
    add(
        "--allow-origin",
        "--allow_origin",
        default="",
        metavar="URL,...",
        help="pages of other sites that may use the server (default: none without a key, all with one)",
    )
    add(
        "--reuse",
        choices=("all", "key"),
        help="whose earlier prompts speed up a prompt that begins alike: the time to "
        "the first token tells that somebody has sent one (default: key if there are several keys, else all)",
    )
    add("--weights", default="auto", choices=("auto", *quantize.KINDS), help="format of the weights in memory")
    add("--model_name", help="the model's name in the API (default: the name of the run's folder)")
    args = parser.parse_args(argv)
    for name, (low, high) in LIMITS.items():
        if (value := getattr(args, name)) is not None and not low <= value <= high:
            raise UsageError(f"--{name}={value} must be between {low} and {high}")
    if not 0 < args.timeout < 1e6:
        raise UsageError(f"--timeout={args.timeout} must be a number of seconds between 0 and 1e6")
    if args.model_name == "":
        raise UsageError("--model_name must not be empty")
    sent = os.environ.get("LOWRANK_API_KEY", "") if args.api_key is None else args.api_key
    args.keys = _listed(sent)
    if not args.keys and (sent or args.api_key is not None):  # a server without a key is open
        raise UsageError("--api_key and LOWRANK_API_KEY must have a key, or several, separated by commas")
    for origin in _listed(args.allow_origin):
        if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise UsageError(f"--allow-origin={origin} must be like https://example.org, without a path, or *")
    return args


def _listed(text: str) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, text.split(","))))


def prepare(args) -> tuple[Server, Scheduler]:
    """Return the run's server, and its scheduler, which has not started."""
    run = open_run(args.workdir, at=args.step, phase=args.phase)
    weights, stop_ids = engine.prepare(run.config, run.params, args.weights), chat.stop_ids(run.tokenizer)
    make = lambda: engine.Engine(run.config.model, weights, stop_ids, args.slots, args.context)
    name = args.model_name or os.path.basename(os.path.abspath(args.workdir))
    answers = args.slots + args.queue
    settings = Settings(
        model=name,
        vocab=run.config.model.vocab,
        context=args.context,
        max_tokens=args.max_tokens or args.context,
        answers=answers,
        timeout=args.timeout,
        keys=args.keys,
        origins=_listed(args.allow_origin),
        hosts=(args.host.lower(), socket.gethostname().lower(), f"{socket.gethostname().lower()}.local"),
        cache_bytes=tuple(costs.kv_bytes_per_token(run.config.model, weights.norm.dtype.itemsize).values()),
        most_letters=args.context * int(run.tokenizer.byte_lengths().max()),
        reuses_prefixes_of_all=(args.reuse or ("key" if len(args.keys) > 1 else "all")) == "all",
    )
    scheduler = Scheduler(make, answers)
    return Server(scheduler, run.tokenizer, settings), scheduler


def command(argv: list[str]) -> dict:
    args = arguments(argv)
    listener, url = connections.bind(args.host, args.port)  # first, so that a port in use is reported at once
    for number in (signal.SIGTERM, signal.SIGINT):  # at once, until `listen` has requests to finish
        signal.signal(number, lambda number, _: os._exit(128 + number))
    server, scheduler = prepare(args)
    if not server.settings.keys and not connections.is_local(listener):
        console.say(f"warning: everybody who reaches {url} can use this server; set LOWRANK_API_KEY")
    scheduler.start()
    gc.freeze()  # else each collection goes through JAX's million objects: 4 MB of JSON takes 0.9 s instead of 0.2 s
    number = asyncio.run(connections.listen(server.app(), listener, url, scheduler))
    scheduler.close()
    if args.json:
        console.show(console.to_json({"url": url, "stopped_by": signal.Signals(number).name}))
    scheduler.thread.join(connections.GRACE)
    if scheduler.thread.is_alive():  # it is compiling, which nothing can stop
        sys.stdout.flush()
        os._exit(128 + number)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    cli.main(command)
