"""Agreement between the processes of a run, on what one of them alone knows: a signal, a file, a lack of memory.

Without it, a process that acts by itself would leave the others waiting forever.
"""

import contextlib
import itertools
import json
import os
import time
import uuid
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.machine import processes, unstable

SHARED_SECONDS = 10  # for a file of the first process to appear on other hosts; NFS may show it late
_gathers = itertools.count()


def gather(value) -> list:
    """Return the JSON values of all processes, in the processes' order. Every process waits for the others."""
    if processes.count() == 1:
        return [value]
    processes.barrier(f"gather {next(_gathers)}")  # says who is missing; the devices would wait in silence, and forever
    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    allgather = unstable.part("jax.experimental.multihost_utils").process_allgather
    sizes = allgather(np.asarray(encoded.size)).tolist()
    rows = allgather(np.pad(encoded, (0, max(sizes) - encoded.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


def on_first(action: Callable[[], object]):
    """Run `action` on the first process alone and return its JSON value on all; its errors are raised on all, too."""
    if processes.count() == 1:
        return action()
    outcome = {}
    if processes.is_first():
        try:
            outcome = {"value": action()}
        except (UsageError, RunFailure, OSError) as e:
            outcome = {"error": str(e), "usage": isinstance(e, UsageError)}
    outcome = gather(outcome)[0]
    if "error" in outcome:
        raise (UsageError if outcome["usage"] else RunFailure)(outcome["error"])
    return outcome["value"]


def share_folder(folder: str, remedy: str) -> None:
    """Raise UsageError, on all processes, where one of them does not see what the first one writes into the folder."""
    if processes.count() == 1:
        return
    path = os.path.join(folder, ".shared")

    def write() -> str:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
        with open(path, "x") as f:
            f.write(text := uuid.uuid4().hex)
        return text

    text, deadline, is_seen = on_first(write), time.monotonic() + SHARED_SECONDS, False
    while not is_seen and time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError), open(path) as f:
            is_seen = f.read() == text
        time.sleep(0 if is_seen else 0.2)
    absent = [i for i, sees in enumerate(gather(is_seen)) if not sees]
    if processes.is_first():
        with contextlib.suppress(OSError):
            os.remove(path)
    if absent:
        line = f"--workdir={folder} is another folder in {processes.names(absent)} than in the first process"
        raise UsageError(f"{line}; {remedy}")


class Signals:
    """Wishes of any process after a step: to stop because of a signal, or to save because it is time.

    All processes learn them at the same step. One process alone acts at once on the numbers in `received`. With many,
    a program of two integers follows each step on the devices, and its result is read after the next step, when nobody
    has to wait for it.
    """

    def __init__(self, received: Sequence[int]):
        self._received, self._agreed, self._sent = received, 0, None
        if processes.count() > 1:
            everywhere = Mesh(np.asarray(jax.devices()), "all")
            self._sharding = NamedSharding(everywhere, PartitionSpec("all"))
            # `after` is unused, but the program waits until it is computed.
            largest = lambda numbers, after: numbers.max(axis=0)
            self._largest = jax.jit(largest, keep_unused=True, out_shardings=NamedSharding(everywhere, PartitionSpec()))

    @property
    def agreed(self) -> int:
        """Return the number of a signal that all processes know of, or 0."""
        return self._agreed if processes.count() > 1 else next(iter(self._received), 0)

    def exchange(self, save: bool, after: jax.Array) -> bool:
        """Return whether it is time to save. All processes call this after each step, with a result of the step."""
        if processes.count() == 1:
            return save
        processes.record_progress(is_step=True)
        signal, any_save = (0, 0) if self._sent is None else np.asarray(self._sent).tolist()
        self._agreed = self._agreed or signal
        wishes = np.array([[next(iter(self._received), 0), save]], np.int32)
        rows = jax.make_array_from_callback((jax.device_count(), 2), self._sharding, lambda _: wishes)
        self._sent = self._largest(rows, after)
        return bool(any_save)

    def forget(self) -> None:
        """Drop the wishes that were sent after a step that failed."""
        self._sent = None
