"""The package's C++ kernels, compiled for this machine at their first use and registered with JAX for CPUs.

The compiler is $CXX, g++, clang++, c++ or Zig's (`pip install ziglang`). Libraries are kept in $LOWRANK_CACHE or
~/.cache/lowrank_jax.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings

import jax

from lowrank_jax.machine import startup

SOURCES = pathlib.Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=gnu++17", "-ffp-contract=fast", "-shared", "-fPIC")
LANES = 16  # the most floats in a vector register: the kernels' widths are multiples of it
TARGETS = {"decode": ("lowrank_read", "lowrank_times"), "attend": ("lowrank_attend", "lowrank_attend_gradient")}


@functools.cache
def load(source: str) -> bool:
    """Register a source's functions with JAX, compiling it first where needed; warn and return False where it fails."""
    try:
        library = ctypes.CDLL(_library(source))
    except (OSError, ValueError, subprocess.SubprocessError) as e:  # ValueError: an unclosed quotation mark in $CXX
        output = (getattr(e, "stderr", None) or b"").decode(errors="replace").strip() or str(e)
        warnings.warn(f"this CPU will be slow, as {source}.cc is not compiled: {output.splitlines()[-1]}", stacklevel=2)
        return False
    for name in TARGETS[source]:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return True


def compiler() -> list[str]:
    """Return the command of the C++ compiler; raises FileNotFoundError where there is none."""
    if command := shlex.split(os.environ.get("CXX", "")) or list(filter(shutil.which, ("g++", "clang++", "c++")))[:1]:
        return command
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++"]
    raise FileNotFoundError("there is no C++ compiler; install g++, or pip install ziglang")


def _library(source: str) -> str:
    """Return the library's path, compiling it where needed; raises OSError or subprocess.SubprocessError."""
    command = compiler()
    built_with = (*command, *FLAGS, jax.__version__, startup.cpu_features())  # which -march=native reads
    files = [SOURCES / f"{source}.cc", SOURCES / "common.h"]
    parts = [*map(str.encode, built_with), *(file.read_bytes() for file in files)]
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder = os.environ.get("LOWRANK_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "lowrank_jax")
    path = os.path.join(folder, f"{source}-{name}.so")
    if os.path.exists(path):
        return path
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as hidden:
        unfinished = os.path.join(hidden, f"{source}.so")
        line = [*command, *FLAGS, f"-I{jax.ffi.include_dir()}", files[0], "-o", unfinished]
        subprocess.run(line, check=True, capture_output=True, timeout=600)
        os.rename(unfinished, path)
    return path
