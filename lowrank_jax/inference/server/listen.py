"""The socket, uvicorn and the signals of the server."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable

import uvicorn

from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.inference.server.scheduler import Scheduler
from lowrank_jax.machine import console

GRACE = 3.0  # seconds that active requests have after a signal


def bind(host: str, port: int) -> tuple[socket.socket, str]:
    """Return a socket that owns the address, and the address as a URL."""
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


def end_on_signals() -> None:
    """Let a signal end the process at once, until `serve` has requests to finish."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os._exit(128 + number))


async def serve(app: Callable, listener: socket.socket, url: str, scheduler: Scheduler) -> int:
    """Serve until a signal arrives, give active requests GRACE seconds, and return the signal's number."""
    config = uvicorn.Config(
        app, lifespan="off", loop="asyncio", http="h11", ws="none", log_level="warning", access_log=False,
        server_header=False, timeout_keep_alive=75, timeout_graceful_shutdown=int(GRACE) + 2,
    )  # fmt: skip
    server, loop, received = uvicorn.Server(config), asyncio.get_running_loop(), []
    server.capture_signals = contextlib.nullcontext  # uvicorn would end the process

    def stop(number: int) -> None:
        if received and number == signal.SIGINT:
            os._exit(128 + number)
        received.append(number)
        server.should_exit = True
        loop.call_later(GRACE, scheduler.close)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    listener.listen(config.backlog)
    console.say(f"listening on {url}")
    await server.serve([listener])
    return received[0]
