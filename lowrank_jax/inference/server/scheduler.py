"""One thread that runs the engine, for requests of an asyncio loop: first come, first served, as slots become free.

Nothing else touches the engine. Orders go in under a lock; pieces come out through the loop that waits for them.
"""

import asyncio
import collections
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.inference.engine import CHUNKS, Engine, Piece
from lowrank_jax.inference.sampling import Sampling


class Full(Exception):
    """More is waiting already than may."""


class Stopping(Exception):
    """The server is about to end."""


class Order(NamedTuple):
    """What Engine.add takes."""

    ids: list[int]
    max_new: int
    sampling: Sampling
    logprobs: int


class Ticket:
    """The orders of one request: where their pieces come out. For the loop that it was made in."""

    def __init__(self):
        self._cancelled: set[int | None] = set()
        self._loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue()

    async def pieces(self, deadline: float) -> AsyncIterator[tuple[int, Piece]]:
        """Pieces and the number of the order that each belongs to, as long as it is read.

        Raises what the engine raised, Stopping, or at the loop's time `deadline` TimeoutError.
        """
        while True:
            async with asyncio.timeout_at(deadline):
                i, piece = await self._pieces.get()
            if isinstance(piece, Exception):
                raise piece
            yield i, piece

    def cancel(self, i: int | None = None) -> None:
        """Ends order i, or all that are not finished: what waits is forgotten, slots are freed before the next step."""
        self._cancelled.add(i)

    def is_cancelled(self, i: int) -> bool:
        return None in self._cancelled or i in self._cancelled

    def put(self, i: int, piece: Piece | Exception) -> None:
        """From the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, (i, piece))
        except RuntimeError:  # the loop is closed: nobody waits any more
            self.cancel()


class _Job(NamedTuple):
    ticket: Ticket
    i: int
    order: Order


class Scheduler:
    """Runs what `make` makes, anew after a failure. `waiting` and `active` tell how many orders are where."""

    def __init__(self, make: Callable[[], Engine], slots: int, queue: int):
        self.room = slots + queue
        self.failures = 0
        self._make, self._engine = make, None
        self._changed = threading.Condition()
        self._waiting: collections.deque[_Job] = collections.deque()
        self._active: dict[int, _Job] = {}  # by slot
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Makes the engine, and compiles for it what requests will need, before the thread begins."""
        self._engine = self._make()
        _warm_up(self._engine)
        self._thread.start()

    def submit(self, orders: Sequence[Order]) -> Ticket:
        """Takes all of the orders or, raising Full or Stopping, none."""
        with self._changed:
            if self._stopping:
                raise Stopping
            if len(self._waiting) + len(self._active) + len(orders) > self.room:
                raise Full
            ticket = Ticket()
            self._waiting += [_Job(ticket, i, order) for i, order in enumerate(orders)]
            self._changed.notify()
        return ticket

    def close(self) -> None:
        """Ends what is waiting or under way with Stopping, after the step that is being done."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def join(self, seconds: float) -> bool:
        """Whether the thread has ended within the time."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def active(self) -> int:
        return len(self._active)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        while self._wait():
            failure = self._turn()
            if failure:
                self._recover(failure)
        self._end_all(Stopping())

    def _wait(self) -> bool:
        """Returns once there is something to do, with whether there is anything but to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._active or self._stopping)
            return not self._stopping

    def _turn(self) -> str | None:
        """Drops, admits, and one step; what went wrong, as text: an exception would keep the engine's arrays alive."""
        try:
            if self._engine is None:
                self._engine = self._make()
            self._drop_cancelled()
            self._admit()
            if self._active:
                self._hand_out(self._engine.step())
        except Exception as e:
            traceback.print_exc(file=sys.stderr)
            return f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"

    def _drop_cancelled(self) -> None:
        for slot in [slot for slot, job in self._active.items() if job.ticket.is_cancelled(job.i)]:
            self._engine.drop(slot)
            del self._active[slot]
        with self._changed:
            self._waiting = collections.deque(job for job in self._waiting if not job.ticket.is_cancelled(job.i))

    def _admit(self) -> None:
        while self._waiting and self._engine.free:
            with self._changed:  # so that the job is counted in one place or the other
                job = self._waiting.popleft()
                try:
                    self._active[self._engine.add(*job.order)] = job
                except UsageError as e:
                    job.ticket.put(job.i, e)
                except Exception:
                    job.ticket.put(job.i, RunFailure("the engine failed to take the request"))
                    raise

    def _hand_out(self, pieces: dict[int, Piece]) -> None:
        for slot, piece in pieces.items():
            # Whoever hears of the end may ask again at once: by then its place is free.
            job = self._active.pop(slot) if piece.finish else self._active[slot]
            job.ticket.put(job.i, piece)

    def _recover(self, failure: str) -> None:
        """Ends with an error what was under way, whose state is lost, and lets the next turn make a new engine."""
        self.failures += 1
        self._engine = None
        if not self._active:  # not even an engine could be made
            time.sleep(1)
        self._end_all(RunFailure(f"the engine failed ({failure})"), waiting=not self._active)

    def _end_all(self, reason: Exception, waiting: bool = True) -> None:
        with self._changed:
            jobs = [*self._active.values(), *(self._waiting if waiting else ())]
            self._active = {}
            if waiting:
                self._waiting = collections.deque()
        for job in jobs:
            job.ticket.put(job.i, reason)


def _warm_up(engine: Engine) -> None:
    """Fills all slots, and reads a chunk of every size: what is compiled now, no request waits for."""
    slots = engine.free
    for lengths in ([2] * slots, [min(CHUNKS[0], engine.context - 2)]):
        for length in lengths:
            engine.add([0] * length, 2, Sampling(), 0)
        while engine.free < slots:
            engine.step()
