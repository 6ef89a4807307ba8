"""The HTTP server's socket and connections. Late heads, idle ones and readers that do not read are closed.

uvicorn closes connections that are idle after a response, and nothing else. hypercorn bounds idle ones alone.
"""

import asyncio
import contextlib
import ipaddress
import os
import resource
import signal
import socket
from collections.abc import Callable

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.inference.server.scheduler import Scheduler
from lowrank_jax.machine.console import say

GRACE = 3.0  # seconds that active requests have after a signal
HEAD_SECONDS = 10.0  # from a connection, or the end of a response on it, to the end of the next request's head
IDLE_SECONDS = 75.0  # after a response, until the next request begins: browsers keep connections
READ_SECONDS = 30.0  # for a full send buffer (64 KB) to be read
SPARE_FILES = 96  # for the run's files and pipes
BACKLOG = 64  # connections that are accepted at once, before the first of them can make room
QUEUE = 1024  # connections that the kernel keeps until they are accepted
FEWEST, MOST = 16, 10_000  # connections


class Connection(H11Protocol):
    """A connection with time limits. Where there are too many, the longest idle one makes room for the next."""

    idle: dict["Connection", None] = {}  # connections without a whole request, longest idle first
    has_warned = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._head = self._stuck = None
        self._rest(HEAD_SECONDS)
        if len(self.connections) > (most := most_connections()) and Connection.idle:
            oldest = next(iter(Connection.idle))
            oldest.transport.abort()
            oldest._work()
            self.connections.discard(oldest)
            if not Connection.has_warned:
                Connection.has_warned = True
                say(f"warning: more than {most} connections; the longest idle ones are closed (see `ulimit -n`)")

    def connection_lost(self, exc: Exception | None) -> None:
        self._work()
        self._cancel_stuck()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self in Connection.idle and self._head_seconds == IDLE_SECONDS:  # the next head has begun
            self._rest(HEAD_SECONDS)
        super().data_received(data)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and not self.cycle.response_complete:
            self._head.cancel()
        if self.cycle and not self.cycle.more_body and not self.cycle.response_complete:
            self._work()

    def on_response_complete(self) -> None:
        self._rest(IDLE_SECONDS)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cancel_stuck()
        self._stuck = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_stuck()

    def _rest(self, seconds: float) -> None:
        """Wait so long for the head of a request."""
        self._work()
        Connection.idle[self] = None
        self._head_seconds, self._head = seconds, self.loop.call_later(seconds, self.transport.abort)

    def _work(self) -> None:
        """Note that this connection has a request, with its whole body."""
        Connection.idle.pop(self, None)
        if self._head:
            self._head.cancel()

    def _cancel_stuck(self) -> None:
        if self._stuck:
            self._stuck.cancel()


def most_connections() -> int:
    """Return how many connections the limit of open files has room for."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if files == resource.RLIM_INFINITY else min(max(FEWEST, files - SPARE_FILES - BACKLOG), MOST)


def report_once(loop: asyncio.AbstractEventLoop, context: dict) -> None:
    """Handle asyncio's errors: a lack of files is one line, once; all others are logged as always."""
    if "out of system resource" not in context.get("message", ""):
        loop.default_exception_handler(context)
    elif not Connection.has_warned:
        Connection.has_warned = True
        say(
            "warning: there are too many open files to accept a connection (see `ulimit -n`); trying again every second"
        )


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


def is_local(listener: socket.socket) -> bool:
    """Return whether only this machine can connect."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


async def listen(app: Callable, listener: socket.socket, url: str, scheduler: Scheduler) -> int:
    """Serve until a signal arrives, give active requests GRACE seconds, and return the signal's number."""
    config = uvicorn.Config(
        app, lifespan="off", loop="asyncio", http=Connection, ws="none", log_level="error", access_log=False,
        server_header=False, timeout_keep_alive=2 * int(IDLE_SECONDS + 1), timeout_graceful_shutdown=int(GRACE) + 2,
        backlog=BACKLOG,
    )  # fmt: skip
    server, loop, received = uvicorn.Server(config), asyncio.get_running_loop(), []
    server.capture_signals = contextlib.nullcontext  # uvicorn would end the process
    loop.set_exception_handler(report_once)

    def stop(number: int) -> None:
        if received and number == signal.SIGINT:
            os._exit(128 + number)
        received.append(number)
        server.should_exit = True
        loop.call_later(GRACE, scheduler.close)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    listener.listen(config.backlog)
    say(f"listening on {url}")
    serving = asyncio.ensure_future(server.serve([listener]))
    while not (server.started or serving.done()):
        await asyncio.sleep(0.01)
    # asyncio accepts BACKLOG at once, and listens with the same number: a client beyond it would come again after 1 s.
    listener.listen(QUEUE)
    await serving
    return received[0]
