"""The C++ of this package (cpp/), compiled for this machine at its first use and known to JAX on CPUs.

The compiler is the one that is there ($CXX, g++, clang++, c++, or Zig's out of `pip install ziglang`); what it makes is
kept in $LOWRANK_CACHE or ~/.cache/lowrank_jax.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings

import jax

SOURCES = os.path.dirname(__file__)
FLAGS = ("-O3", "-march=native", "-std=gnu++17", "-ffp-contract=fast", "-shared", "-fPIC")
TARGETS = {"decode": ("lowrank_read", "lowrank_times"), "attend": ("lowrank_attend", "lowrank_attend_gradient")}


@functools.cache
def load(source: str) -> bool:
    """Whether the C++ of a source is there: compiled, if it was not, and known to JAX. Warns where it cannot be."""
    try:
        library = ctypes.CDLL(_built(source))
    except (OSError, ValueError, subprocess.SubprocessError) as e:  # ValueError: $CXX with half a quotation
        told = (getattr(e, "stderr", None) or b"").decode(errors="replace").strip() or str(e)
        reason = told.splitlines()[-1]
        warnings.warn(f"this CPU will be slow, as {source}.cc is not compiled: {reason}", stacklevel=2)
        return False
    for name in TARGETS[source]:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return True


def compiler() -> list[str]:
    """The command of the C++ compiler; raises FileNotFoundError where there is none."""
    if found := shlex.split(os.environ.get("CXX", "")) or list(filter(shutil.which, ("g++", "clang++", "c++")))[:1]:
        return found
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++"]
    raise FileNotFoundError("there is no C++ compiler; install g++, or pip install ziglang")


def _built(source: str) -> str:
    """The path of the library; raises OSError or subprocess.SubprocessError where it cannot be made."""
    command = compiler()
    parts = [part.encode() for part in (*command, *FLAGS, jax.__version__, _processor())]
    files = [os.path.join(SOURCES, name) for name in (f"{source}.cc", "common.h")]
    for path in files:
        with open(path, "rb") as f:
            parts.append(f.read())
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder = os.environ.get("LOWRANK_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "lowrank_jax")
    path = os.path.join(folder, f"{source}-{name}.so")
    if os.path.exists(path):
        return path
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as hidden:
        made = os.path.join(hidden, "made.so")
        line = [*command, *FLAGS, f"-I{jax.ffi.include_dir()}", files[0], "-o", made]
        subprocess.run(line, check=True, capture_output=True, timeout=600)
        os.rename(made, path)
    return path


def _processor() -> str:
    """What -march=native depends on."""
    try:
        with open("/proc/cpuinfo") as f:
            return next((line for line in f if line.startswith(("flags", "Features"))), platform.processor())
    except OSError:
        return platform.processor()
