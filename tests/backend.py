"""The start of JAX's backend in pytest's processes, which conftest.py imports before anything else."""

import os

import runs

# Each of pytest's processes gets its own core: on two cores the suite took 1,186 s instead of 1,418 s.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
# The flags that make commands compile quickly, and a cache that all processes share.
FLAGS = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{FLAGS} {runs.ENVIRONMENT['XLA_FLAGS']}"
os.environ["JAX_COMPILATION_CACHE_DIR"] = runs.CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
import jax  # noqa: E402

jax.devices()  # reads the flags, which are then removed: the compilers for TPUs and GPUs abort on unknown flags
os.environ["XLA_FLAGS"] = FLAGS
