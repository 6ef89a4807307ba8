"""SIGTERM and SIGINT: noted at once, acted on where nothing can be lost."""

import contextlib
import os
import signal
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future

POLL_SECONDS = 0.1  # between two checks for a signal


class Interrupted(Exception):
    """A signal arrived during long work: the work is abandoned, and the loop saves and ends."""


def wait(future: Future, stop: Callable[[], bool], poll_seconds: float = POLL_SECONDS):
    """Return the future's result; raises Interrupted once `stop()` is true, checked every `poll_seconds`."""
    while not futures.wait([future], poll_seconds).done:
        if stop():
            raise Interrupted
    return future.result()


@contextlib.contextmanager
def signals():
    """Collect the numbers of SIGTERM and SIGINT in a list; a second SIGINT ends the process at once.

    Enter it before anything else: Python's own KeyboardInterrupt is lost when it strikes inside a callback of the
    garbage collector, and JAX has such a callback.
    """
    received: list[int] = []

    def note(number, _):
        name = signal.Signals(number).name
        if signal.SIGINT in received and number == signal.SIGINT:
            os._exit(128 + number)
        again = "; once more to quit at once" if number == signal.SIGINT else ""
        is_new = number not in received
        received.append(number)
        if is_new:
            with contextlib.suppress(OSError):  # nobody reads stderr any more
                os.write(2, f"{name}: stopping after this step, with the state saved{again}\n".encode())

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
