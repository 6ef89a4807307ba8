"""SIGTERM, SIGINT and SIGHUP: noted at once, acted on where nothing can be lost."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future


class Interrupted(Exception):
    """A signal arrived during long work: the work is abandoned, and the loop saves and ends."""


def wait(future: Future, stop: Callable[[], bool], poll_seconds: float = 0.1):
    """Return the future's result; raises Interrupted once `stop()` is true, checked every `poll_seconds`."""
    while not futures.wait([future], poll_seconds).done:
        if stop():
            raise Interrupted
    return future.result()


@contextlib.contextmanager
def signals(may_quit: bool = True):
    """Collect the numbers of SIGTERM, SIGINT and SIGHUP in a list; a second SIGINT ends the process at once.

    If it may not quit, the second SIGINT raises KeyboardInterrupt. Only the main thread gets signals: in another one
    the list stays empty. A terminal that closes sends SIGHUP; under nohup it is ignored, and stays so.

    Enter it before anything else: Python's own KeyboardInterrupt is lost when it strikes inside a callback of the
    garbage collector, and JAX has such a callback.
    """
    received: list[int] = []

    def note(number, _):
        name, is_interrupt = signal.Signals(number).name, number == signal.SIGINT
        if number not in received:
            received.append(number)
            again = "; once more to quit at once" if is_interrupt else ""
            with contextlib.suppress(OSError):  # nobody reads stderr any more
                os.write(2, f"{name}: stopping after this step, with the state saved{again}\n".encode())
        elif is_interrupt and may_quit:
            os._exit(128 + number)
        elif is_interrupt:
            raise KeyboardInterrupt

    numbers = [signal.SIGTERM, signal.SIGINT]
    numbers += [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
