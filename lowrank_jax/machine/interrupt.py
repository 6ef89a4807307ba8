"""SIGTERM and SIGINT: noted at once, acted on where nothing can be lost."""

import contextlib
import os
import signal
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future

LOOK_SECONDS = 0.1  # between two looks at whether a signal has come


class Interrupted(Exception):
    """A signal came while something took long: whoever worked gives up, and the loop saves and leaves."""


def wait(future: Future, stop: Callable[[], bool], look: float = LOOK_SECONDS):
    """The future's result; raises Interrupted where `stop()` says so at one of the looks every so many seconds."""
    while not futures.wait([future], look).done:
        if stop():
            raise Interrupted
    return future.result()


@contextlib.contextmanager
def signals():
    """Collects the numbers of SIGTERM and SIGINT; a second SIGINT ends the process at once.

    Entered first of all: the KeyboardInterrupt that Python raises by itself is lost when it strikes in a callback of
    the garbage collector, of which JAX has one.
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
            with contextlib.suppress(OSError):  # nobody reads any more
                os.write(2, f"{name}: stopping after this step, with the state saved{again}\n".encode())

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
