"""JAX's backend in pytest's processes, which conftest.py starts before anything else."""

import os

import runs

# Each of pytest's processes has a core to itself. On two cores the suite took 1,186 s so, and 1,418 s without.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
# What compiles quickly for commands does so for tests, and what one process has compiled the others load.
FLAGS = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{FLAGS} {runs.ENVIRONMENT['XLA_FLAGS']}"
os.environ["JAX_COMPILATION_CACHE_DIR"] = runs.CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
import jax  # noqa: E402

jax.devices()  # reads the flags. The compilers for TPUs and GPUs end a process that has flags which they do not know.
os.environ["XLA_FLAGS"] = FLAGS
