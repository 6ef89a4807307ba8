"""The coordinator of a run's processes, in the first of them: who is present, what all must share, and who is lost.

Every process keeps one connection to it (membership.py), on which both sides send one JSON object per line:

from a process   {index, host} at first, {barrier, facts, remedy}, {withdraw}, {idle}, {signal}, {bye}
to a process     {missing}, {done}, {stop, status}, {lost}, {ended}, {goodbye}

{idle} and {missing} are the heartbeats. A process has ended when its connection closes; when it is silent, it is
stopped or cannot be reached. A connection that begins with {forward} leads to JAX's coordination service.
"""

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

HEARTBEAT_SECONDS = 2
SILENT_SECONDS = 60  # after which a process that sends nothing is lost; JAX's own limit is 100
STUCK_SECONDS = 3600  # in which no process ends a step, an evaluated batch or a save, after the first step
DIFFERENCE_SECONDS = 5  # in which further processes may join and learn of a difference, before all end
SILENT = f"has not answered for {SILENT_SECONDS} s: it is stopped, or its host cannot be reached"
STUCK = f"no process has ended a step, an evaluated batch or a save for {STUCK_SECONDS} s; is a file system stuck?"
GONE = "has ended without a word"  # SIGKILL, a crash, or no memory


def send(writer: asyncio.StreamWriter, **message) -> None:
    if not writer.is_closing():  # where the other end is gone, the reader notices
        writer.write(json.dumps(message).encode() + b"\n")


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()


async def heartbeats() -> AsyncIterator[float]:
    """Yield every HEARTBEAT_SECONDS how long this process itself was stopped, so that it blames no other."""
    last = time.monotonic()
    while True:
        await asyncio.sleep(HEARTBEAT_SECONDS)
        paused, last = time.monotonic() - last - HEARTBEAT_SECONDS, time.monotonic()
        yield paused if paused > HEARTBEAT_SECONDS else 0.0


def difference(facts: dict[int, dict[str, str]]) -> str:
    """Return one line about the first process whose facts, as JSON, are not process 0's; empty where all agree."""
    for index in sorted(facts):
        first, other = facts.get(0, facts[index]), facts[index]
        keys = [key for key in first | other if first.get(key) != other.get(key)]
        if keys:
            mine, firsts = (each.get(keys[0], "nothing") for each in (other, first))
            begin = max(len(os.path.commonprefix([mine, firsts])) - 20, 0)  # long values may differ at their end
            if max(len(mine), len(firsts)) > 80:
                mine, firsts = ("..." * (begin > 0) + text[begin : begin + 80] for text in (mine, firsts))
            more = f" (and {len(keys) - 1} more: {', '.join(keys[1:6])})" if keys[1:] else ""
            return f"process {index} has {keys[0]}={mine}, the first process has {firsts}{more}"
    return ""


@dataclass
class _Peer:
    """A process's connection."""

    writer: asyncio.StreamWriter
    host: str
    last_heard: float = field(default_factory=time.monotonic)
    idle: float = 0.0  # seconds without progress
    has_left: bool = False


class Coordinator:
    """The state of the run's connections and barriers, in the thread of one event loop."""

    def __init__(self, count: int, service_port: int):
        self._count, self._service_port = count, service_port
        self._peers: dict[int, _Peer] = {}
        self._barriers: dict[str, dict[int, dict]] = {}  # the facts of the processes that wait at each barrier
        self._remedy, self._is_joined, self._stop = "", False, {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a connection until it closes."""
        try:
            hello = json.loads(await reader.readline())
            if "forward" in hello:
                await self._forward(reader, writer)
            else:
                await self._serve_process(int(hello["index"]), _Peer(writer, str(hello["host"])), reader)
        except Exception:  # a stranger's first line may be anything, and a connection may break
            pass
        finally:
            writer.close()

    async def _forward(self, reader, writer) -> None:
        """Connect a process to JAX's coordination service, which this process may start a little later."""
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                from_service, to_service = await asyncio.open_connection("127.0.0.1", self._service_port)
                break
            await asyncio.sleep(0.05)
        copies = [asyncio.ensure_future(copy(*ends)) for ends in ((reader, to_service), (from_service, writer))]
        await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
        to_service.close()

    async def _serve_process(self, index: int, peer: _Peer, reader) -> None:
        other = self._peers.get(index)
        if other and not self._is_joined and peer.last_heard - other.last_heard > 5 * HEARTBEAT_SECONDS:
            other.writer.transport.abort()  # its host has restarted, and this is the same process again
        elif other or self._is_joined:
            self._refuse(index, peer, other)
            return
        self._peers[index] = peer
        send(peer.writer, **(self._stop or {"missing": {}}))
        reason = GONE
        try:
            while line := await reader.readline():
                peer.last_heard = time.monotonic()
                self._take(index, peer, json.loads(line))
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            reason = f"has sent a message that cannot be read ({type(e).__name__}: {e})"
        finally:
            if not peer.has_left:
                self._lose(index, peer, reason)

    def _refuse(self, index: int, peer: _Peer, other: _Peer | None) -> None:
        line = f"the run of {self._count} processes at this address has begun; start process {index} with the others"
        if other:
            hosts = f"on {other.host} and {peer.host}"
            line = f"two processes have the number {index}, {hosts}; give each a --process=I of its own"
        send(peer.writer, stop=line, status=2)
        if not self._is_joined:
            self.stop(line, 2)

    def _take(self, index: int, peer: _Peer, message: dict) -> None:
        peer.idle = message.get("idle", peer.idle)
        if "barrier" in message:
            self._arrive(message["barrier"], index, message["facts"], message["remedy"])
        elif "withdraw" in message:
            self._barriers.get(message["withdraw"], {}).pop(index, None)
        elif "signal" in message:
            self.stop("", 128 + message["signal"])
        elif "bye" in message:
            peer.has_left = True
            if message["bye"] and self._is_joined and not self._stop:
                self._broadcast(ended=f"process {index} has ended with status {message['bye']}; its output says why")
            send(peer.writer, goodbye=True)

    def _arrive(self, barrier: str, index: int, own_facts: dict, remedy: str) -> None:
        facts = self._barriers.setdefault(barrier, {})
        facts[index] = own_facts
        self._remedy = self._remedy if index else remedy
        compared = {i: facts[i] for i in (0, index) if i in facts} if index else facts
        if len(facts) == self._count and not self._stop:
            self._conclude(barrier)
        elif difference(compared):
            asyncio.get_running_loop().call_later(DIFFERENCE_SECONDS, self._conclude, barrier)

    def _conclude(self, barrier: str) -> None:
        """Open a barrier at which all processes wait, or stop the run where their facts differ."""
        facts = self._barriers.get(barrier, {})
        if line := difference(facts):
            self.stop(f"{line}; {self._remedy}", 2)
        elif len(facts) == self._count:
            self._is_joined = True
            self._broadcast(done=barrier)
        else:  # the process that differed has left
            return
        del self._barriers[barrier]

    def stop(self, line: str, status: int) -> None:
        """End the run in all processes that wait for each other, and in those that join later."""
        self._stop = {"stop": line, "status": status}
        self._broadcast(**self._stop)

    def _broadcast(self, **message) -> None:
        for peer in self._peers.values():
            send(peer.writer, **message)

    def _lose(self, index: int, peer: _Peer, reason: str) -> None:
        if self._peers.get(index) is not peer:
            return
        del self._peers[index]
        for facts in self._barriers.values():
            facts.pop(index, None)
        if self._is_joined:  # before, it may join again
            self._broadcast(lost=f"process {index} {reason}")

    async def watch(self) -> None:
        """Notice silent processes and a run without progress, and send all processes the missing ones per barrier."""
        async for paused in heartbeats():
            for index, peer in list(self._peers.items()):
                peer.last_heard += paused
                if time.monotonic() - peer.last_heard > SILENT_SECONDS and not peer.has_left:
                    peer.writer.transport.abort()
                    self._lose(index, peer, SILENT)
            if self._peers and min(peer.idle for peer in self._peers.values()) > STUCK_SECONDS:
                self._broadcast(lost=STUCK)
            absent = lambda facts: [i for i in range(self._count) if i not in facts]
            self._broadcast(missing={barrier: absent(facts) for barrier, facts in self._barriers.items()})
