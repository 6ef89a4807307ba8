"""The processes that train one run, one on every host or GPU: the number of this one, and how they join.

Only the first process writes the run's text files and prints. JAX is imported only to join processes, so a process that
reads data never pays for it.
"""

import os

from lowrank_jax.config import UsageError

_index, _count = 0, 1


def start(coordinator: str = "", processes: int = 0, process: int = -1, cluster: bool = False) -> None:
    """Join the other processes, at the address of the first one or by the environment of the cluster.

    Without arguments, processes join where SLURM, Open MPI or GKE started several. Raises UsageError in one line.
    """
    global _index, _count
    is_explicit = bool(coordinator or processes or process >= 0)
    if is_explicit and not (coordinator and processes >= 1 and 0 <= process < processes):
        raise UsageError(
            f"--coordinator=HOST:PORT, --processes=N and --process=I (from 0 to N-1) go together, not {coordinator!r}, "
            f"{processes} and {process}"
        )
    env = os.environ
    by_srun = "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS") or 1) > 1  # not a batch script's own shell
    many = by_srun or int(env.get("OMPI_COMM_WORLD_SIZE") or 1) > 1 or "," in env.get("TPU_WORKER_HOSTNAMES", "")
    if not (is_explicit or cluster or many):
        return
    import jax

    # JAX's preemption service would take SIGTERM. interrupt.py handles it, and `Signals` informs the other processes.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator or None, processes or None, process if is_explicit else None)
    except (RuntimeError, ValueError) as e:
        raise UsageError(f"the processes cannot join: {' '.join(str(e).split())[:200]}") from None
    _index, _count = jax.process_index(), jax.process_count()


def count() -> int:
    return _count


def index() -> int:
    return _index


def is_first() -> bool:
    return _index == 0


def name() -> str:
    """Return a prefix for this process's lines, empty where it is the only process."""
    return f"process {_index}: " if _count > 1 else ""
