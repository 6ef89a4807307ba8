"""This process as a member of a run: its connection to the coordinator, and the barriers at which it waits for others.

JAX's coordination service runs in the first process, behind the coordinator's port. Its C++ client aborts with a stack
trace when its connection closes, so a forwarder in each process keeps that connection open.
"""

import asyncio
import contextlib
import errno
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence

from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.machine import coordinator
from lowrank_jax.machine.console import say
from lowrank_jax.machine.coordinator import GONE, SILENT, Coordinator, copy, heartbeats, send
from lowrank_jax.machine.processes import names

LOST_SECONDS, ENDED_SECONDS = 2, 6  # for this process to end by itself, after another one was lost or has ended
ANSWER_SECONDS = 5  # for a stranger at the coordinator's port to show what it is
END_SECONDS = 30  # for all to end, with the state saved
FIRST_NOTE_SECONDS, NOTE_SECONDS = 5, 30  # of waiting, until a line names the missing processes, and names them again
LONGEST_LINE = 2**26  # bytes; a config has a few thousand
JOIN, END = "join", "end"


class Member:
    """A connection to the coordinator, in a thread of its own."""

    def __init__(self, address: str, index: int, count: int):
        host, _, port = address.rpartition(":")
        if not (host and port.isdigit() and int(port) < 2**16):
            raise UsageError(f"--coordinator={address} must be HOST:PORT, the first process's host and a free port")
        self._address, self._index, self._count = (host.strip("[]"), int(port)), index, count
        self._loop, self._changed = asyncio.new_event_loop(), threading.Event()
        self._coordinator, self._port_error = None, None
        self._writer, self._last_heard, self._reason = None, 0.0, "no answer yet"  # 0 while it is not connected
        self._missing, self._done, self._stop = {}, set(), None
        self._is_joined, self._has_left, self._last_progress = False, False, 0.0  # 0 before the first step
        self.lost, self.ended = "", ""  # one line each about another process
        threading.Thread(target=self._loop.run_forever, name="membership", daemon=True).start()
        opening = asyncio.run_coroutine_threadsafe(self._open(), self._loop)
        self.service = opening.result()  # the address of JAX's coordination service for this process

    async def _open(self) -> str:
        """Start the coordinator in the first process, and the forwarder in the others; return `service`."""
        if self._index:
            self._never = asyncio.Event()  # `self` keeps it, and with it the connections that wait for it
            server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
            return f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            service_port = s.getsockname()[1]
        self._coordinator, port = Coordinator(self._count, service_port), self._address[1]
        try:
            await asyncio.start_server(self._coordinator.serve, "", port, limit=LONGEST_LINE)
            self._watch = asyncio.ensure_future(self._coordinator.watch())
        except OSError as e:
            reason = os.strerror(e.errno or errno.EADDRINUSE)
            remedy = "choose a free port for --coordinator"
            self._port_error = UsageError(f"port {port} cannot be used here ({reason}); {remedy}")
        return f"127.0.0.1:{service_port}"

    async def _forward(self, reader, writer) -> None:
        with contextlib.suppress(OSError):
            from_service, to_service = await asyncio.open_connection(*self._address)
            send(to_service, forward=True)
            await asyncio.gather(copy(reader, to_service), copy(from_service, writer))
        await self._never.wait()  # JAX's client must not see the connection close

    async def _follow(self, facts: dict, remedy: str) -> None:
        """Connect, and again until all have joined; then take what the coordinator sends."""
        self._heartbeat = asyncio.ensure_future(self._send_heartbeats())
        while True:
            try:
                reader, self._writer = await asyncio.open_connection(*self._address, limit=LONGEST_LINE)
                send(self._writer, index=self._index, host=socket.gethostname())
                send(self._writer, barrier=JOIN, facts=facts, remedy=remedy)
                most = ANSWER_SECONDS if self._port_error else None
                while line := await asyncio.wait_for(reader.readline(), most):
                    self._last_heard = time.monotonic()
                    self._take(json.loads(line))
                self._reason = SILENT if self._is_silent() else GONE
            except OSError as e:
                is_unknown = isinstance(e, socket.gaierror)  # the host; its errno is none of the system's
                reason = e.strerror if is_unknown else os.strerror(e.errno or errno.ECONNREFUSED)
                self._reason = SILENT if self._is_silent() else reason
            except (ValueError, AttributeError, TypeError, RecursionError):
                self._reason = "something else answers there"
            if self._port_error:  # and no other process 0 answered there, which would have said so
                self._stop = self._stop or self._port_error
                self._changed.set()
                return
            if self._is_joined:
                self._take({"lost": f"the first process {SILENT if self._is_silent() else GONE}"})
                return
            self._last_heard = 0.0
            await asyncio.sleep(0.3)

    async def _send_heartbeats(self) -> None:
        async for paused in heartbeats():
            if self._last_heard:
                self._last_heard += paused
                send(self._writer, idle=time.monotonic() - self._last_progress if self._last_progress else 0)
                if self._is_silent():
                    self._writer.transport.abort()

    def _is_silent(self) -> bool:
        return 0 < self._last_heard < time.monotonic() - coordinator.SILENT_SECONDS

    def _take(self, message: dict) -> None:
        self._missing = message.get("missing", self._missing)
        if "done" in message:
            self._done.add(message["done"])
            self._is_joined = True
        if "stop" in message:
            kind = {1: RunFailure, 2: UsageError}.get(message["status"])
            self._stop = kind(message["stop"]) if kind else SystemExit(message["status"])
            if not kind:
                self._loop.call_later(ENDED_SECONDS, self._quit, "")
        for kind, seconds in (("lost", LOST_SECONDS), ("ended", ENDED_SECONDS)):
            if kind in message and not (self.lost or self.ended or self._has_left):
                setattr(self, kind, message[kind])
                self._loop.call_later(seconds, self._quit, message[kind])
        self._has_left |= "goodbye" in message or message.get("done") == END
        self._changed.set()

    def _quit(self, line: str) -> None:
        """End this process, whose main thread waits for the other one in JAX, where no exception reaches it."""
        if isinstance(self._stop, SystemExit):  # a signal, which has been said
            os._exit(self._stop.code)
        say(f"error: {line}", everyone=True)
        os._exit(1)

    def _send(self, **message) -> None:
        self._loop.call_soon_threadsafe(lambda: send(self._writer, **message))

    def join(self, facts: dict, remedy: str, wait: float, received: Sequence[int]) -> None:
        """Wait until all processes are present and have the same facts.

        Raises UsageError where they differ, RunFailure after `wait` seconds, and SystemExit for a signal in `received`,
        here and at all barriers before the first step.
        """
        self._received = received
        self._following = asyncio.run_coroutine_threadsafe(self._follow(as_json(facts), remedy), self._loop)
        if not self._wait(JOIN, wait):
            advice = "start it, or wait longer with --wait=SECONDS"
            line = f"{self._absent(JOIN)} did not join within {wait:g} s; {advice}"
            if self._coordinator:
                self._loop.call_soon_threadsafe(self._coordinator.stop, line, 1)
            raise RunFailure(line)

    def barrier(self, name: str, facts: dict | None = None, remedy: str = "", seconds: float = float("inf")) -> bool:
        """Return whether all processes come to this barrier within so many seconds, with the same facts.

        Raises UsageError where the facts differ, and RunFailure where another process is lost.
        """
        self._send(barrier=name, facts=as_json(facts or {}), remedy=remedy)
        is_open = self._wait(name, seconds)
        self.record_progress()
        if not is_open:
            self._send(withdraw=name)
        return is_open

    def lost_process(self, seconds: float, also_ended: bool) -> str:
        """Return one line about a lost process, perhaps within so many seconds; quit where a signal is the cause."""
        deadline = time.monotonic() + seconds
        while not (line := self.lost or (also_ended and self.ended) or ""):
            if isinstance(self._stop, SystemExit):
                self._quit("")
            if time.monotonic() >= deadline:
                break
            time.sleep(0.05)
        return line

    def record_progress(self, is_step: bool = False) -> None:
        """Note that a step has ended, or after the first step a part of other long work."""
        if is_step or self._last_progress:
            self._last_progress = time.monotonic()

    def _absent(self, barrier: str) -> str:
        if not self._last_heard and self._index:
            host, port = self._address
            return f"the first process, at {host}:{port} ({self._reason}),"
        others = [i for i in range(self._count) if i != self._index]
        return names([i for i in self._missing.get(barrier, []) if i != self._index] or others)

    def _wait(self, barrier: str, seconds: float) -> bool:
        started, next_note = time.monotonic(), FIRST_NOTE_SECONDS
        while barrier not in self._done:
            if self._stop or self.lost or self.ended:
                raise self._stop or RunFailure(self.lost or self.ended)
            if self._received and not self._last_progress:  # no step is lost; later all save and end at the same step
                self._end_by_signal(barrier)
            waited = time.monotonic() - started
            if waited > seconds:
                return False
            if waited > next_note:
                next_note += NOTE_SECONDS
                missing = self._missing.get(barrier, [])
                if not self._last_heard or set(range(self._index)) <= set(missing) != set():  # the first that waits
                    limit = f" of at most {seconds:g} s" if seconds < float("inf") else ""
                    say(f"waiting for {self._absent(barrier)} since {waited:.0f} s{limit}", everyone=True)
            self._changed.wait(0.1)
            self._changed.clear()
        self._done.discard(barrier)  # a later barrier may have the same name
        return True

    def _end_by_signal(self, barrier: str) -> None:
        """Exit where not all have joined yet; otherwise let the coordinator stop all processes alike."""
        number, self._received = self._received[0], ()
        say(f"{signal.Signals(number).name}: ending, while {self._absent(barrier)} had not come", everyone=True)
        if not self._is_joined:
            raise SystemExit(128 + number)
        self._send(signal=number)

    def leave(self, status: int) -> None:
        """Tell the others that this process ends: once all are about to end, or at once where it fails."""
        if self._is_joined and (status == 0 or status > 128) and not (self._stop or self.lost or self.ended):
            self.barrier(END, seconds=END_SECONDS)
            self._has_left = True
        elif self._last_heard:
            self._send(bye=status)
            deadline = time.monotonic() + 1
            while not self._has_left and time.monotonic() < deadline:
                self._changed.wait(0.05)
                self._changed.clear()


def as_json(facts: dict) -> dict[str, str]:
    """Return facts as JSON, in which 0 is not False."""
    return {key: json.dumps(value, sort_keys=True) for key, value in facts.items()}
