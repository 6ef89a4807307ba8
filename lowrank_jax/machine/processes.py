"""The processes that train one run: which one this is, and how they find each other.

One process a host (or a GPU), each with the same command; JAX makes one machine of all their devices. Only the first
process writes a run's text files and speaks. This file imports JAX only to join several processes, so that a process
that reads data never does.
"""

import os

from lowrank_jax.config import UsageError

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
    import jax

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
