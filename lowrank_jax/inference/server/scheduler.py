"""The engine's thread: requests of an asyncio loop get slots first come, first served.

No other thread touches the engine. Requests enter under a lock; pieces leave through the loop that waits for them.
"""

import asyncio
import collections
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence

from lowrank_jax.config import UsageError
from lowrank_jax.inference.engine import CHUNKS, MOST_DECODED, Engine, Piece, Request
from lowrank_jax.inference.server.api import Problem
from lowrank_jax.machine import console

SHORT, LONG = 0.008, 0.05  # seconds of a decoding loop, if a request may wait for its end, and if none does
STOPPING = 503, "the server is stopping", None, "stopping"
SLOW = 408, "the stream is read too slowly: too many of its tokens wait", None, "slow_reader"
MOST_UNREAD = 1_500_000  # tokens and alternatives that wait for readers of all streams: 170 MB


class Ticket:
    """The outlet of some requests' pieces, for the asyncio loop that is running when it is created."""

    unread_of_all = 0

    def __init__(self, requests: Sequence[Request]):
        self.requests = tuple(requests)
        self.cancelled: set[int] = set()  # numbers of requests
        self._loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue()
        self._unread, self._is_over = 0, False

    async def pieces(self, deadline: float) -> AsyncIterator[tuple[int, Piece]]:
        """Yield (number of the request, piece) for as long as it is read.

        Raises the Problem that ended a request, or TimeoutError at the loop's time `deadline`.
        """
        while True:
            async with asyncio.timeout_at(deadline):
                i, piece = await self._pieces.get()
            if isinstance(piece, Problem):
                raise piece
            self._count(-_size(piece))
            yield i, piece

    def cancel(self, i: int | None = None) -> None:
        """End request i, or all of them: waiting ones are forgotten, slots are freed before the next step."""
        self.cancelled.update(range(len(self.requests)) if i is None else [i])
        if i is None:
            self._is_over, self._pieces = True, asyncio.Queue()
            self._count(-self._unread)

    def put(self, i: int, piece: Piece | Problem) -> None:
        """Hand over a piece of request i, from the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._arrive, i, piece)
        except RuntimeError:  # the loop is closed: nobody waits any more
            self.cancel()

    def _arrive(self, i: int, piece: Piece | Problem) -> None:
        if self._is_over:
            return
        if isinstance(piece, Piece):
            self._count(_size(piece))
        self._pieces.put_nowait((i, piece))
        if self._unread > MOST_UNREAD - Ticket.unread_of_all:  # nobody takes more than is left for others
            self.cancel()
            self._pieces.put_nowait((i, Problem(*SLOW)))

    def _count(self, change: int) -> None:
        self._unread += change
        Ticket.unread_of_all += change


def _size(piece: Piece) -> int:
    return len(piece.ids) + sum(len(top) for _, top in piece.logprobs)


class Scheduler:
    """Runs an engine for at most `room` requests, `waiting` or `active`, and makes a new one after a failure."""

    def __init__(self, make: Callable[[], Engine], room: int):
        self.room, self.failures = room, 0
        self._make, self._engine = make, None
        self._pace = 0.0  # seconds per decoding step
        self._changed, self._stopping = threading.Condition(), False
        self.waiting: collections.deque[tuple[Ticket, int]] = collections.deque()  # (ticket, number of the request)
        self.active: dict[int, tuple[Ticket, int]] = {}  # by slot
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Make the engine, fill each number of slots and read chunks of every size: later, nothing is compiled."""
        engine = self._engine = self._make()
        slots, sizes = engine.free, [1 << n for n in range(engine.free.bit_length())]
        rounds = [[2] * size for size in {*sizes, slots}] + [[min(size, engine.context - 2)] for size in CHUNKS]
        for lengths in rounds:
            for length in lengths:
                engine.add(Request([0] * length, 2))
            while engine.free < slots:
                engine.step()
        self.thread.start()

    def submit(self, requests: Sequence[Request]) -> Ticket:
        """Queue all of the requests, or none of them and raise Problem."""
        with self._changed:
            if self._stopping:
                raise Problem(*STOPPING)
            if len(self.waiting) + len(self.active) + len(requests) > self.room:
                raise Problem(429, "too many requests are waiting; try again soon", code="queue_full")
            ticket = Ticket(requests)
            self.waiting += [(ticket, i) for i in range(len(requests))]
            self._changed.notify()
        return ticket

    def close(self) -> None:
        """End all requests once the current step is done, and refuse new ones."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.waiting or self.active or self._stopping)
                if self._stopping:
                    break
            if failure := self._turn():
                self._recover(failure)
        self._end_all(Problem(*STOPPING))

    def _turn(self) -> str | None:
        """Drop, admit and step; return a failure as text, because an exception would keep the engine's arrays alive."""
        try:
            if self._engine is None:
                self._engine = self._make()
            self._drop_cancelled()
            self._admit()
            if self.active:
                for slot, piece in self._step().items():
                    # A client may send its next request as soon as it sees the end: its slot must be free by then.
                    ticket, i = self.active.pop(slot) if piece.finish else self.active[slot]
                    ticket.put(i, piece)
        except Exception as e:
            console.say(traceback.format_exc())
            return f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"

    def _step(self) -> dict[int, Piece]:
        """Do the engine's step, with a decoding loop as long as nobody waits for: newcomers join at its end."""
        seconds = SHORT if self._engine.free or self._engine.is_reading else LONG
        began = time.perf_counter()
        pieces = self._engine.step(int(seconds / self._pace) if self._pace else MOST_DECODED)
        if pieces:  # a step that also reads prompts takes longer: the pace follows such steps slowly
            pace = (time.perf_counter() - began) / max(len(piece.ids) for piece in pieces.values())
            self._pace = min(pace, 1.2 * self._pace) if self._pace else pace
        return pieces

    def _drop_cancelled(self) -> None:
        for slot in [slot for slot, (ticket, i) in self.active.items() if i in ticket.cancelled]:
            self._engine.drop(slot)
            del self.active[slot]
        with self._changed:
            self.waiting = collections.deque((ticket, i) for ticket, i in self.waiting if i not in ticket.cancelled)

    def _admit(self) -> None:
        while self.waiting and self._engine.free:
            with self._changed:  # so that the request is counted in one place or the other
                ticket, i = self.waiting.popleft()
                try:
                    self.active[self._engine.add(ticket.requests[i])] = ticket, i
                except UsageError as e:
                    ticket.put(i, Problem(400, str(e)))
                except Exception:
                    ticket.put(i, Problem(500, "the engine failed to take the request", code="engine_failure"))
                    raise

    def _recover(self, failure: str) -> None:
        """End the active requests, whose state is lost, with an error; the next turn makes a new engine."""
        self.failures += 1
        self._engine = None
        if not self.active:  # not even an engine could be made
            time.sleep(1)
        problem = Problem(500, f"the engine failed ({failure})", code="engine_failure")
        self._end_all(problem, with_waiting=not self.active)

    def _end_all(self, reason: Problem, with_waiting: bool = True) -> None:
        with self._changed:
            ended = [*self.active.values(), *(self.waiting if with_waiting else ())]
            self.active.clear()
            if with_waiting:
                self.waiting.clear()
        for ticket, i in ended:
            ticket.put(i, reason)
