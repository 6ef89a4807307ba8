"""How the processes of a run come to do the same.

Where the next action depends on something that only one process knows (a signal, a file, a lack of memory), all
processes agree on it here first: a process that goes its own way leaves the others waiting for ever. With one process
nothing here costs anything.
"""

import json
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.machine import processes


def gather(value) -> list:
    """The JSON values of all processes, in their order; each waits for the others."""
    if processes.count() == 1:
        return [value]
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(mine.size)).tolist()
    padded = np.zeros(max(sizes), np.uint8)
    padded[: mine.size] = mine
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


def on_first(do: Callable[[], object]):
    """What `do` gives on the first process, as JSON values, on all; a UsageError, RunFailure or OSError likewise."""
    if processes.count() == 1:
        return do()
    told = {}
    if processes.is_first():
        try:
            told = {"value": do()}
        except (UsageError, RunFailure, OSError) as e:
            told = {"error": str(e), "usage": isinstance(e, UsageError)}
    told = gather(told)[0]
    if "error" in told:
        raise (UsageError if told["usage"] else RunFailure)(told["error"])
    return told["value"]


class Signals:
    """What one process or more want after a step: to stop, as they got a signal, or to save, as it is time.

    All come to know it at the same step. With one process it counts at once; `mine` gets the numbers of its signals.
    With many, each tells the others after every step, in a program of two integers that follows the step on the
    devices, and what was told after one step is read after the next: then it is there, and nothing waits for it.
    """

    def __init__(self, mine: Sequence[int]):
        self._mine, self._heard, self._told = mine, 0, None
        if processes.count() > 1:
            everywhere = Mesh(np.asarray(jax.devices()), "all")
            self._places = NamedSharding(everywhere, PartitionSpec("all"))
            # `after` is not used, but has to be there before the program runs.
            most = lambda numbers, after: numbers.max(axis=0)
            self._most = jax.jit(most, keep_unused=True, out_shardings=NamedSharding(everywhere, PartitionSpec()))

    @property
    def agreed(self) -> int:
        """The number of a signal that all know of, or 0."""
        return self._heard if processes.count() > 1 else next(iter(self._mine), 0)

    def exchange(self, save: bool, after: jax.Array) -> bool:
        """Whether it is time to save; to be called by all processes after each step, with a result of it."""
        if processes.count() == 1:
            return save
        heard, heard_save = (0, 0) if self._told is None else np.asarray(self._told).tolist()
        self._heard = self._heard or heard
        mine = np.array([[next(iter(self._mine), 0), save]], np.int32)
        told = jax.make_array_from_callback((jax.device_count(), 2), self._places, lambda _: mine)
        self._told = self._most(told, after)
        return bool(heard_save)

    def forget(self) -> None:
        """What was told after a step that failed is not to be read."""
        self._told = None


def meet(place: str, seconds: float) -> bool:
    """Whether all processes come to this place within so many seconds; without a word to the devices."""
    if processes.count() == 1:
        return True
    from jax._src import distributed  # the coordination service has no public barrier with a time limit

    try:
        distributed.global_state.client.wait_at_barrier(place, round(1000 * seconds))
    except jax.errors.JaxRuntimeError:
        return False
    return True
