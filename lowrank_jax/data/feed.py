"""Prepares batches in the background while the device trains on earlier ones."""

import collections
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from lowrank_jax.data.stream import Stream
from lowrank_jax.machine import interrupt

PATIENCE = 5.0  # seconds that a batch may take before a signal is looked for
AHEAD = 2  # batches that are placed on the device before they are used


class Feed:
    """(place(step, batch), the cursor after the batch) for each step, prepared up to AHEAD steps before its use.

    `shape_at(step)` gives the arguments of `Stream.next`; `place` may put the batch on a device.
    """

    def __init__(self, stream: Stream, steps: range, shape_at: Callable, place: Callable):
        self._stream, self._batches = stream, _prepare(stream, steps, shape_at, place)
        self._thread = ThreadPoolExecutor(1, "feed")
        self._ahead, self._waits = collections.deque(self._submit() for _ in range(AHEAD)), False

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> tuple:
        return self.take()

    def take(self, stop: Callable[[], bool] = lambda: False) -> tuple:
        """Return the next batch; raises Interrupted if `stop()` returns True before it is ready: a read may hang."""
        if len(self._ahead) <= AHEAD:
            self._ahead.append(self._submit())
        self._waits = True
        prepared = interrupt.wait(self._ahead[0], stop, PATIENCE)
        self._waits = False
        self._ahead.popleft()
        return prepared

    def close(self) -> None:
        hangs = self._waits and not self._ahead[0].done()
        self._thread.shutdown(wait=not hangs, cancel_futures=True)
        self._stream.close()

    def _submit(self):
        return self._thread.submit(next, self._batches)


def _prepare(stream: Stream, steps: range, shape_at: Callable, place: Callable) -> Iterator[tuple]:
    """Yield what `Feed` gives. An error ends this generator, so nothing is read after it."""
    for step in steps:
        batch = place(step, stream.next(*shape_at(step)))
        yield batch, stream.cursor()
