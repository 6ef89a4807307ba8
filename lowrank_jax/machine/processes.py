"""The processes that train one run, one on every host or GPU: the number of this one, and how they join.

Only the first process writes the run's text files and prints. JAX is imported only to join processes, so a process that
reads data never pays for it.
"""

import hashlib
import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Sequence

from lowrank_jax.config import UsageError
from lowrank_jax.machine import unstable

PACKAGE = pathlib.Path(__file__).parents[1]
LIBRARIES = "jax jaxlib numpy flax orbax-checkpoint sentencepiece tokenizers".split()  # what decides numbers and data
ADVICE = "pass --coordinator=HOST:PORT, --processes=N and --process=I"

_index, _count, _member = 0, 1, None


def start(
    coordinator: str = "",
    processes: int = 0,
    process: int = -1,
    cluster: bool = False,
    facts: dict | None = None,
    wait: float = 300,
    received: Sequence[int] = (),
) -> None:
    """Join the other processes, at the address of the first one or by the environment of the cluster.

    Without arguments, processes join where SLURM, Open MPI or GKE started several. All must have the same `facts` and
    software. Raises UsageError in one line where they do not, RunFailure where not all come within `wait` seconds, and
    SystemExit for a signal in `received`.
    """
    global _index, _count, _member
    is_explicit = bool(coordinator or processes or process >= 0)
    if is_explicit and not (coordinator and processes >= 1 and 0 <= process < processes):
        raise UsageError(
            f"--coordinator=HOST:PORT, --processes=N and --process=I (from 0 to N-1) go together, not {coordinator!r}, "
            f"{processes} and {process}"
        )
    if not wait > 0:
        raise UsageError(f"--wait={wait:g} must be above 0 seconds")
    env = os.environ
    by_srun = "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS") or 1) > 1  # not a batch script's own shell
    many = by_srun or int(env.get("OMPI_COMM_WORLD_SIZE") or 1) > 1 or "," in env.get("TPU_WORKER_HOSTNAMES", "")
    if not (is_explicit or cluster or many):
        return
    from lowrank_jax.machine.membership import Member

    address, _count, _index, local_devices = _detect(coordinator, processes, process, wait)
    if _count == 1:
        return
    _member = Member(address, _index, _count)
    remedy = "start all processes with the same command and the same software"
    _member.join({"--processes": _count} | (facts or {}) | _software(), remedy, wait, received)
    _start_jax(local_devices)


def _start_jax(local_devices) -> None:
    """Start JAX's coordination service, behind the coordinator's port; raises UsageError where devices differ."""
    import jax

    # JAX's preemption service would take SIGTERM. interrupt.py handles it, and `Signals` informs the other processes.
    unstable.configure("jax_enable_preemption_service", False)
    unstable.configure("jax_check_proxy_envs", False)  # no proxy stands between a process and its own forwarder
    env = os.environ
    env["no_grpc_proxy"] = f"{env.get('no_grpc_proxy') or env.get('no_proxy') or ''},127.0.0.1".strip(",")
    bind = {} if _index else {"coordinator_bind_address": _member.service}
    if "JAX_LOCAL_DEVICE_IDS" in env:
        local_devices = None  # JAX reads the variable
    try:
        jax.distributed.initialize(_member.service, _count, _index, local_devices, **bind)
    except (RuntimeError, ValueError) as e:
        raise UsageError(f"the processes cannot join: {' '.join(str(e).split())[:200]}") from None
    devices = {"backend": jax.default_backend(), "devices of a process": jax.local_device_count()}
    devices["kind of device"] = jax.local_devices()[0].device_kind
    agree("devices", devices, "give all processes the same devices")


def _detect(coordinator: str, processes: int, process: int, wait: float) -> tuple:
    """Return (the first process's address, processes, this one, its devices or None) as set, or else by the cluster."""
    import jax

    address = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    explicit = (address or None, processes or None, process if process >= 0 else None, None)
    try:
        # jax.distributed.initialize has no public way to detect without joining.
        detected = unstable.part("jax._src.clusters.ClusterEnv").auto_detect_unset_distributed_params(
            *explicit, None, round(min(max(wait, 1), 1e6))
        )
    except (UsageError, AttributeError, TypeError):
        if None in explicit[:3]:
            raise UsageError(f"JAX {jax.__version__} detects clusters in an unknown way; {ADVICE}") from None
        return explicit
    except Exception as e:  # each cluster asks its own services
        raise UsageError(f"the cluster cannot be detected: {' '.join(str(e).split())[:200]}") from None
    if None in detected[:3]:
        raise UsageError(f"no cluster is detected; {ADVICE}")
    return detected


def _software() -> dict[str, str]:
    """Return the versions of what computes: this package, by its source text, and the libraries that decide numbers."""
    digest = hashlib.sha256()
    for path in sorted(p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".cc", ".h")):
        digest.update(f"{path.relative_to(PACKAGE)} {path.stat().st_size} ".encode() + path.read_bytes())
    facts = {"hash of lowrank_jax's source": digest.hexdigest()[:12], "Python": platform.python_version()}
    return facts | {f"version of {name}": importlib.metadata.version(name) for name in LIBRARIES}


def names(indices: Sequence[int]) -> str:
    """Return "process 1" or "processes 1, 2, 3"."""
    shown = ", ".join(map(str, indices[:20])) + ", ..." * (len(indices) > 20)
    return f"process{'es' * (len(indices) > 1)} {shown}"


def agree(barrier: str, facts: dict, remedy: str) -> None:
    """Wait for all processes at a barrier; raises UsageError on all where one has other facts than the first."""
    if _member:
        _member.barrier(barrier, facts, remedy)


def barrier(name: str, seconds: float = float("inf")) -> bool:
    """Return whether all processes reach this barrier within so many seconds; it does not involve the devices.

    Raises RunFailure where another process has ended or does not answer.
    """
    return _member.barrier(name, seconds=seconds) if _member else True


def record_progress(is_step: bool = False) -> None:
    """Note that a step has ended, or after it a part of other long work: a run without progress is ended."""
    if _member:
        _member.record_progress(is_step)


def lost(seconds: float = 0, also_ended: bool = False) -> str:
    """Return one line about a process that was lost, perhaps within so many seconds; empty where none was."""
    return _member.lost_process(seconds, also_ended) if _member else ""


def leave(status: int) -> None:
    """Tell the other processes that this one ends, and wait for them where it does not fail."""
    if _member and status == 0:
        import jax

        barrier("finished")
        jax.distributed.shutdown()  # while all are present: its traffic needs the first process
    if _member:
        _member.leave(status)


def count() -> int:
    return _count


def index() -> int:
    return _index


def is_first() -> bool:
    return _index == 0


def name() -> str:
    """Return a prefix for this process's lines, empty where it is the only process."""
    return f"process {_index}: " if _count > 1 else ""
