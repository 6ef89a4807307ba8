"""Connections of the HTTP server that cannot hold it up: late heads, idle ones and readers that do not read are closed.

uvicorn closes connections that are idle after a response, and nothing else. hypercorn bounds idle ones alone.
"""

import asyncio
import resource

from uvicorn.protocols.http.h11_impl import H11Protocol

from lowrank_jax.machine.console import say

HEAD_SECONDS = 10.0  # from a connection, or the end of a response on it, to the end of the next request's head
IDLE_SECONDS = 75.0  # after a response, until the next request begins: browsers keep connections
READ_SECONDS = 30.0  # for a full send buffer (64 KB) to be read
SPARE_FILES = 64  # for the run's files and pipes
BACKLOG = 64  # connections that are accepted at once, before the first of them can make room
FEWEST, MOST = 16, 10_000  # connections


class Connection(H11Protocol):
    """A connection with time limits. Where there are too many, the longest idle one makes room for the next."""

    idle: dict["Connection", None] = {}  # connections without a request, longest idle first
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
        """Note that this connection has a request."""
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
