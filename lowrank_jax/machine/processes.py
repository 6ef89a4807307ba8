"""Many processes that train one run: how they find each other, and how they come to do the same.

A process a host (or a GPU), each with the same command; JAX makes one of all their devices. The first process alone
writes a run's text files and speaks. Where what a process does depends on what only it knows (a signal, a file, a lack
of memory), it is agreed on here first: a process that goes its own way leaves the others waiting for ever.

Nothing here asks JAX for a device before `start`, and with one process nothing costs anything.
"""

import json
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lowrank_jax.config import RunFailure, UsageError

_index, _count = 0, 1


def start(coordinator: str = "", processes: int = 0, process: int = -1, cluster: bool = False) -> None:
    """Joins the other processes: by the address of the first one, or as the cluster's environment says.

    Without any of these it joins where SLURM, Open MPI or GKE have started several. Raises UsageError in one line.
    """
    global _index, _count
    given = coordinator or processes or process >= 0
    if given and not (coordinator and processes >= 1 and 0 <= process < processes):
        raise UsageError(
            f"--coordinator=HOST:PORT, --processes=N and --process=I (from 0 to N-1) go together, not {coordinator!r}, "
            f"{processes} and {process}"
        )
    if not given and not cluster and not _is_one_of_many():
        return
    # Its preemption service would take SIGTERM for itself; interrupt.py does that, and `Signals` tells the others.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator or None, processes or None, process if given else None)
    except (RuntimeError, ValueError) as e:
        raise UsageError(f"the processes did not find each other: {' '.join(str(e).split())[:200]}") from None
    _index, _count = jax.process_index(), jax.process_count()


def _is_one_of_many() -> bool:
    env = os.environ
    by_srun = "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS") or 1) > 1  # not a batch script's own shell
    return by_srun or int(env.get("OMPI_COMM_WORLD_SIZE") or 1) > 1 or "," in env.get("TPU_WORKER_HOSTNAMES", "")


def count() -> int:
    return _count


def index() -> int:
    return _index


def is_first() -> bool:
    return _index == 0


def name() -> str:
    """Empty where there is one alone."""
    return f"process {_index}: " if _count > 1 else ""


# ----------------------------------------------------------------------------------------------------------- agreement


def gather(value) -> list:
    """The JSON values of all processes, in their order; each waits for the others."""
    if _count == 1:
        return [value]
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(mine.size)).tolist()
    padded = np.zeros(max(sizes), np.uint8)
    padded[: mine.size] = mine
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


def on_first(do: Callable[[], object]):
    """What `do` gives on the first process, as JSON values, on all; a UsageError, RunFailure or OSError likewise."""
    if _count == 1:
        return do()
    told = {}
    if is_first():
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
        if _count > 1:
            everywhere = Mesh(np.asarray(jax.devices()), "all")
            self._places = NamedSharding(everywhere, PartitionSpec("all"))
            # `after` is not used, but has to be there before the program runs.
            most = lambda numbers, after: numbers.max(axis=0)
            self._most = jax.jit(most, keep_unused=True, out_shardings=NamedSharding(everywhere, PartitionSpec()))

    @property
    def agreed(self) -> int:
        """The number of a signal that all know of, or 0."""
        return self._heard if _count > 1 else next(iter(self._mine), 0)

    def exchange(self, save: bool, after: jax.Array) -> bool:
        """Whether it is time to save; to be called by all processes after each step, with a result of it."""
        if _count == 1:
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
    if _count == 1:
        return True
    from jax._src import distributed  # the coordination service has no public barrier with a time limit

    try:
        distributed.global_state.client.wait_at_barrier(place, round(1000 * seconds))
    except jax.errors.JaxRuntimeError:
        return False
    return True
