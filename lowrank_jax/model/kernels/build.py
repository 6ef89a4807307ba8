"""The package's C++ kernels, compiled for this machine at their first use and registered with JAX for CPUs.

The compiler is $CXX, g++, clang++, c++ or Zig's (`pip install ziglang`). Libraries are kept in $LOWRANK_CACHE, or below
$XDG_CACHE_HOME or ~/.cache. Each ends in its own SHA-256, as a library that is cut short would kill the process.
"""

import contextlib
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
from collections.abc import Iterator

import jax

from lowrank_jax.machine import console, startup

SOURCES = pathlib.Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=gnu++17", "-ffp-contract=fast", "-shared", "-fPIC")
LANES = 16  # the most floats in a vector register: the kernels' widths are multiples of it
TARGETS = {"decode": ("lowrank_read", "lowrank_times"), "attend": ("lowrank_attend", "lowrank_attend_gradient")}


@functools.cache
def load(source: str) -> bool:
    """Register a source's functions with JAX, compiling it first where needed; say why if it fails."""
    try:
        with _library(source) as path:
            library = ctypes.CDLL(path)
    except (OSError, ValueError, subprocess.SubprocessError) as e:  # ValueError: an unclosed quotation mark in $CXX
        output = (getattr(e, "stderr", None) or b"").decode(errors="replace").strip() or str(e)
        console.say(f"this CPU will be slow, as {source}.cc is not compiled: {output.splitlines()[-1]}", everyone=True)
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


@contextlib.contextmanager
def _library(source: str) -> Iterator[str]:
    """Yield the library's path, compiling it where needed; raises OSError or subprocess.SubprocessError.

    Where it cannot be kept, as on a full disk, it is compiled into a temporary folder for this process alone.
    """
    command = compiler()
    built_with = (*command, *FLAGS, jax.__version__, startup.cpu_features())  # which -march=native reads
    files = [SOURCES / f"{source}.cc", SOURCES / "common.h"]
    parts = [*map(str.encode, built_with), *(file.read_bytes() for file in files)]
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    path = os.path.join(os.environ.get("LOWRANK_CACHE") or startup.cache_folder(), f"{source}-{name}.so")
    if _is_whole(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as hidden:
        library = os.path.join(hidden, f"{source}.so")
        line = [*command, *FLAGS, f"-I{jax.ffi.include_dir()}", files[0], "-o", library]
        subprocess.run(line, check=True, capture_output=True, timeout=600)
        with open(library, "r+b") as f:
            f.write(hashlib.sha256(f.read()).digest())  # behind all that the loader reads
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as beside:
                os.replace(shutil.copy(library, beside), path)
        except OSError as e:
            console.say(f"{path} cannot be written ({e.strerror}), so every start compiles {source}.cc again")
            path = library
        yield path


def _is_whole(path: str) -> bool:
    """Return whether the path is a library that ends in the SHA-256 of all before; a link or a folder is none."""
    if os.path.islink(path) or not os.path.isfile(path):
        return False
    try:
        content = pathlib.Path(path).read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]
