"""The circle of a run's processes: who is present, what all must share, and who is lost. It needs no JAX.

The first process opens a hub at HOST:PORT. Every process has one connection to it, and sends one JSON object per line.
JAX's coordination service runs in the first process, and its traffic passes through the same port. Its C++ client
aborts with a stack trace when its connection closes, so a forwarder in each process keeps that connection open. The hub
notices a process that ends by its closed connection, and one that is stopped or unreachable by its silence.
"""

import asyncio
import contextlib
import errno
import functools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.machine.console import say
from lowrank_jax.machine.processes import difference, names

WAIT_SECONDS = 300  # for all processes to join
SILENT_SECONDS = 60  # after which a process that sends nothing is lost; JAX's own limit is 100
STUCK_SECONDS = 3600  # in which no process ends a step, an evaluated batch or a save, after the first step
BEAT_SECONDS = 2
LATE_SECONDS = 5  # for more processes to come and learn why the run ends, after two were found to differ
LOST_SECONDS, ENDED_SECONDS = 2, 6  # for this process to end by itself, after another one was lost or has ended
END_SECONDS = 30  # for all to end, with the state saved
FIRST_WORD_SECONDS, WORD_SECONDS = 5, 30  # of waiting, until it is said, and until it is said again
LONGEST_LINE = 2**26  # bytes; a config has a few thousand
JOIN, END = "join", "end"
SILENT = f"has not answered for {SILENT_SECONDS} s: it is stopped, or its host cannot be reached"
STUCK = f"no process has ended a step, an evaluated batch or a save for {STUCK_SECONDS} s; is a file system stuck?"
GONE = "has ended without a word"  # SIGKILL, a crash, or no memory


def _send(writer: asyncio.StreamWriter, **message) -> None:
    if writer and not writer.is_closing():  # where the other end is gone, the reader notices
        writer.write(json.dumps(message).encode() + b"\n")


async def _ticks() -> AsyncIterator[float]:
    """Yield every BEAT_SECONDS the seconds for which this process itself was stopped, so that it blames no other."""
    ticked = time.monotonic()
    while True:
        await asyncio.sleep(BEAT_SECONDS)
        paused, ticked = time.monotonic() - ticked - BEAT_SECONDS, time.monotonic()
        yield paused if paused > BEAT_SECONDS else 0.0


def _texts(facts: dict) -> dict[str, str]:
    """Return facts as JSON, in which 0 is not False."""
    return {key: json.dumps(value, sort_keys=True) for key, value in facts.items()}


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()


@dataclass
class _Guest:
    """A process's connection, as the hub sees it."""

    writer: asyncio.StreamWriter
    host: str
    heard: float = field(default_factory=time.monotonic)
    idle: float = 0.0  # seconds since it last got on
    has_left: bool = False


class Hub:
    """The end of all connections, in the first process. All of it runs in the thread of the circle's event loop."""

    def __init__(self, count: int, service_port: int):
        self._count, self._service_port = count, service_port
        self._guests: dict[int, _Guest] = {}
        self._places: dict[str, dict[int, dict]] = {}  # facts of the processes that wait there
        self._remedy, self._is_joined, self._end = "", False, {}

    async def receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a connection until it closes: a process's own, or one to JAX's coordination service."""
        try:
            hello = json.loads(await reader.readline())
            if "forward" in hello:
                back, onward = await self._reach_service()
                ways = [asyncio.ensure_future(_pass_on(*way)) for way in ((reader, onward), (back, writer))]
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                onward.close()
            else:
                await self._attend(hello, reader, writer)
        except Exception:  # a stranger may send anything
            pass
        finally:
            writer.close()

    async def _reach_service(self) -> tuple:
        while True:
            with contextlib.suppress(ConnectionRefusedError):  # others may be ready before this process has started it
                return await asyncio.open_connection("127.0.0.1", self._service_port)
            await asyncio.sleep(0.05)

    async def _attend(self, hello: dict, reader, writer) -> None:
        index, guest = int(hello["index"]), _Guest(writer, str(hello["host"]))
        other = self._guests.get(index)
        if other and not self._is_joined and guest.heard - other.heard > 5 * BEAT_SECONDS:
            other.writer.transport.abort()  # its host has restarted, and it comes again
        elif other or self._is_joined:
            line = (
                f"the run of {self._count} processes at this address has begun; start process {index} with the others"
            )
            if other:
                hosts = f"on {other.host} and {guest.host}"
                line = f"two processes have the number {index}, {hosts}; give each a --process=I of its own"
            _send(writer, stop=line, status=2)
            if not self._is_joined:
                self.stop(line, 2)
            return
        self._guests[index] = guest
        _send(writer, **(self._end or {"missing": {}}))
        self._arrive(index, hello)
        with contextlib.suppress(OSError, ValueError):
            while line := await reader.readline():
                guest.heard, message = time.monotonic(), json.loads(line)
                guest.idle = message.get("idle", guest.idle)
                if "place" in message:
                    self._arrive(index, message)
                elif "signal" in message:
                    self.stop("", 128 + message["signal"])
                elif "bye" in message:
                    guest.has_left = True
                    if message["bye"] and self._is_joined and not self._end:
                        self._tell(ended=f"process {index} has ended with status {message['bye']}; its output says why")
                    _send(writer, goodbye=True)
        if not guest.has_left:
            self._lose(index, guest, GONE)

    def _arrive(self, index: int, message: dict) -> None:
        place = message["place"]
        if message.get("left"):
            self._places.get(place, {}).pop(index, None)
            return
        facts = self._places.setdefault(place, {})
        facts[index] = message.get("facts", {})
        self._remedy = message.get("remedy", "") if index == 0 else self._remedy
        if len(facts) == self._count and not self._end:
            self._conclude(place)
        elif difference({i: facts[i] for i in facts if index in (0, i) or i == 0}):  # with what is new alone
            asyncio.get_running_loop().call_later(LATE_SECONDS, self._conclude, place)

    def _conclude(self, place: str) -> None:
        facts = self._places.pop(place, {})
        if line := difference(facts):
            self.stop(f"{line}; {self._remedy}", 2)
        elif len(facts) == self._count:
            self._is_joined = True
            self._tell(done=place)
        elif facts:  # the process that differed has left
            self._places[place] = facts

    def stop(self, line: str, status: int) -> None:
        """End the run in all processes that wait for each other, and in those that still come."""
        self._end = {"stop": line, "status": status}
        self._tell(**self._end)

    def _tell(self, **message) -> None:
        for guest in self._guests.values():
            _send(guest.writer, **message)

    def _lose(self, index: int, guest: _Guest, how: str) -> None:
        if self._guests.get(index) is not guest:
            return
        del self._guests[index]
        for facts in self._places.values():
            facts.pop(index, None)
        if self._is_joined:  # before, it may come again
            self._tell(lost=f"process {index} {how}")

    async def watch(self) -> None:
        """Notice processes that send nothing, and tell all who is missing where."""
        async for paused in _ticks():
            for index, guest in list(self._guests.items()):
                guest.heard += paused
                if time.monotonic() - guest.heard > SILENT_SECONDS and not guest.has_left:
                    guest.writer.transport.abort()
                    self._lose(index, guest, SILENT)
            if self._guests and min(guest.idle for guest in self._guests.values()) > STUCK_SECONDS:
                self._tell(lost=STUCK)
            absent = lambda facts: [i for i in range(self._count) if i not in facts]
            self._tell(missing={place: absent(facts) for place, facts in self._places.items()})


class Circle:
    """This process's part: its connection to the hub, in a thread of its own, and the waiting for others."""

    def __init__(self, address: str, index: int, count: int):
        host, _, port = address.rpartition(":")
        if not (host and port.isdigit() and int(port) < 2**16):
            raise UsageError(f"--coordinator={address} must be HOST:PORT, the first process's host and a free port")
        self._address, self._index, self._count = (host.strip("[]"), int(port)), index, count
        self._loop, self._changed = asyncio.new_event_loop(), threading.Event()
        self._writer, self._reason, self._heard, self._hub = None, "no answer yet", 0.0, None
        self._missing, self._done, self._stop = {}, set(), None
        self._is_joined, self._is_silent, self._has_left, self._no_hub = False, False, False, None
        self._got_on = 0.0  # when a step or the like last ended; 0 before the first step
        self.lost, self.ended = "", ""  # one line each about another process
        threading.Thread(target=self._loop.run_forever, name="circle", daemon=True).start()
        self.service = self._call(self._open())  # the address of JAX's coordination service for this process

    def _call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _open(self) -> str:
        never = self._never = asyncio.Event()  # `self` keeps it, and with it the connections that wait for it

        async def forward(reader, writer):
            with contextlib.suppress(OSError):
                back, onward = await asyncio.open_connection(*self._address)
                _send(onward, forward=True)
                await asyncio.gather(_pass_on(reader, onward), _pass_on(back, writer))
            await never.wait()  # an open end, for the reason at the top of this file

        if self._index:
            server = await asyncio.start_server(forward, "127.0.0.1", 0)
            return f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self._hub = Hub(self._count, port)
        try:
            await asyncio.start_server(self._hub.receive, "", self._address[1], limit=LONGEST_LINE)
        except OSError as e:
            why = f"port {self._address[1]} cannot be used here ({os.strerror(e.errno or errno.EADDRINUSE)})"
            self._no_hub = UsageError(f"{why}; choose a free port for --coordinator")
        else:
            self._watch = asyncio.ensure_future(self._hub.watch())
        return f"127.0.0.1:{port}"

    async def _follow(self, hello: dict) -> None:
        """Connect, and again until all have joined; then take what the hub sends."""
        self._beats = asyncio.ensure_future(self._beat())
        while True:
            try:
                reader, self._writer = await asyncio.open_connection(*self._address, limit=LONGEST_LINE)
                _send(self._writer, **hello)
                most = LATE_SECONDS if self._no_hub else None  # for a stranger at this port to show what it is
                while line := await asyncio.wait_for(reader.readline(), most):
                    self._heard = time.monotonic()
                    self._take(json.loads(line))
                self._reason = GONE
            except OSError as e:
                is_unknown = isinstance(e, socket.gaierror)  # the host; its errno is none of the system's
                reason = e.strerror if is_unknown else os.strerror(e.errno or errno.ECONNREFUSED)
                self._reason = SILENT if self._is_silent else reason
            except (ValueError, AttributeError, TypeError, RecursionError):
                self._reason = "something else answers there"
            self._heard = 0.0
            if self._no_hub:  # and no other process 0 answered there, which would have said so
                self._stop = self._stop or self._no_hub
                self._changed.set()
                return
            if self._is_joined:
                self._take({"lost": f"the first process {SILENT if self._is_silent else GONE}"})
                return
            await asyncio.sleep(0.3)

    async def _beat(self) -> None:
        async for paused in _ticks():
            if self._heard:
                self._heard += paused
                _send(self._writer, idle=time.monotonic() - self._got_on if self._got_on else 0)
                self._is_silent = time.monotonic() - self._heard > SILENT_SECONDS
                if self._is_silent:
                    self._writer.transport.abort()

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
        self._has_left |= "goodbye" in message
        self._changed.set()

    def _quit(self, line: str) -> None:
        """End this process, whose main thread waits for the other one in JAX, where no exception reaches it."""
        if isinstance(self._stop, SystemExit):  # a signal, which has been said
            os._exit(self._stop.code)
        say(f"error: {line}", everyone=True)
        os._exit(1)

    def join(self, facts: dict, remedy: str, wait: float, received: Sequence[int]) -> None:
        """Wait until all processes are present and have the same facts.

        Raises UsageError where they differ, RunFailure after `wait` seconds, SystemExit for a signal in `received`,
        here and in all meetings before the first step.
        """
        hello = {"index": self._index, "host": socket.gethostname(), "place": JOIN}
        hello |= {"facts": _texts(facts), "remedy": remedy}
        self._received = received
        self._following = asyncio.run_coroutine_threadsafe(self._follow(hello), self._loop)
        if not self._wait(JOIN, wait):
            missing, advice = self._absent(JOIN), "start it, or wait longer with --wait=SECONDS"
            line = f"{missing} did not join within {wait:g} s; {advice}"
            if self._hub:
                self._loop.call_soon_threadsafe(self._hub.stop, line, 1)
            raise RunFailure(line)

    def meet(self, place: str, facts: dict | None = None, remedy: str = "", seconds: float = float("inf")) -> bool:
        """Return whether all processes come to this place within so many seconds, with the same facts.

        Raises UsageError where the facts differ, and RunFailure where another process is lost.
        """
        tell = lambda **more: self._loop.call_soon_threadsafe(lambda: _send(self._writer, place=place, **more))
        tell(facts=_texts(facts or {}), remedy=remedy)
        all_came = self._wait(place, seconds)
        self.get_on()
        if not all_came:
            tell(left=True)
        return all_came

    def explain(self, seconds: float, also_ended: bool) -> str:
        """Return one line about a lost process, perhaps within so many seconds; quit where a signal is the cause."""
        deadline = time.monotonic() + seconds
        while not (line := self.lost or (also_ended and self.ended) or ""):
            if isinstance(self._stop, SystemExit):
                self._quit("")
            if time.monotonic() >= deadline:
                break
            time.sleep(0.05)
        return line

    def get_on(self, is_step: bool = False) -> None:
        """Note that a step has ended, or after the first step a part of other long work."""
        if is_step or self._got_on:
            self._got_on = time.monotonic()

    def _absent(self, place: str) -> str:
        if not self._heard and self._index:
            host, port = self._address
            return f"the first process, at {host}:{port} ({self._reason}),"
        others = [i for i in range(self._count) if i != self._index]
        return names([i for i in self._missing.get(place, []) if i != self._index] or others)

    def _wait(self, place: str, seconds: float) -> bool:
        started, words = time.monotonic(), 0
        while place not in self._done:
            if self._stop or self.lost or self.ended:
                raise self._stop or RunFailure(self.lost or self.ended)
            if self._received and not self._got_on:  # no step is lost; later all save and end after the same step
                number = self._received[0]
                say(f"{signal.Signals(number).name}: ending, while {self._absent(place)} had not come", everyone=True)
                if not self._is_joined:
                    raise SystemExit(128 + number)
                self._received = ()  # the hub stops all alike, before or after this place
                self._loop.call_soon_threadsafe(functools.partial(_send, self._writer, signal=number))
            waited = time.monotonic() - started
            if waited > seconds:
                return False
            if waited > FIRST_WORD_SECONDS + words * WORD_SECONDS:
                words += 1
                missing = self._missing.get(place, [])
                if not self._heard or set(range(self._index)) <= set(missing) != set():  # one process speaks
                    limit = f" of at most {seconds:g} s" if seconds < float("inf") else ""
                    say(f"waiting for {self._absent(place)} since {waited:.0f} s{limit}", everyone=True)
            self._changed.wait(0.1)
            self._changed.clear()
        self._done.discard(place)  # a later meeting may have the same name
        return True

    def leave(self, status: int) -> None:
        """Tell the others that this process ends: after all have come so far, or at once where it fails."""
        if self._is_joined and (status == 0 or status > 128) and not (self._stop or self.lost or self.ended):
            self.meet(END, seconds=END_SECONDS)
            self._has_left = True
        elif self._heard:
            self._loop.call_soon_threadsafe(lambda: _send(self._writer, bye=status))
            deadline = time.monotonic() + 1
            while not self._has_left and time.monotonic() < deadline:
                self._changed.wait(0.05)
                self._changed.clear()
