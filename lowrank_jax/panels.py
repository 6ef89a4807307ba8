"""Matrices in panels, for a CPU's C++ (native.cc), which multiplies by them as they lie in memory, in 32 to 4 bits.

The code is compiled for this machine at its first use, by the C++ compiler that is there ($CXX, g++, clang++, c++, or
Zig's out of `pip install ziglang`), and kept in $LOWRANK_CACHE or ~/.cache/lowrank_jax.
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
from dataclasses import dataclass

import jax
import jax.numpy as jnp

COLUMNS = 32  # outputs of a panel
SOURCE = os.path.join(os.path.dirname(__file__), "native.cc")
FLAGS = ("-O3", "-march=native", "-std=gnu++17", "-ffp-contract=fast", "-shared", "-fPIC")
TARGETS = ("lowrank_read", "lowrank_times")


@functools.partial(jax.tree_util.register_dataclass, data_fields=("panels", "scales"), meta_fields=("outputs",))
@dataclass(frozen=True)
class Matrix:
    """Matrices [in, outputs] of the same shape, of float32, bfloat16, int8 or int4: one, or more beside each other."""

    panels: jax.Array  # [count, P, in, COLUMNS], the last panel filled up with zeros; of int4 uint8, two to a byte
    scales: jax.Array | None  # of integers: [count, P, groups of inputs, COLUMNS] in float32
    outputs: int


@jax.jit
def matrix(w: jax.Array, scales: jax.Array | None = None) -> Matrix:
    """Of [in, out] or [count, in, out], integers with `scales` of [groups, out] or [count, groups, out]."""
    panels = _panels(w)
    if w.dtype == jnp.bfloat16:  # two to a word, so that one load is two vectors
        panels = panels.reshape(*panels.shape[:3], 2, -1).swapaxes(3, 4).reshape(panels.shape)
    elif w.dtype == jnp.int4:
        low, high = jnp.split((panels.astype(jnp.int8) + 8).astype(jnp.uint8), 2, axis=-1)
        panels = low | high << 4
    return Matrix(panels, None if scales is None else _panels(scales.astype(jnp.float32)), w.shape[-1])


def _panels(w: jax.Array) -> jax.Array:
    w = w if w.ndim == 3 else w[None]
    w = jnp.pad(w, ((0, 0), (0, 0), (0, -w.shape[2] % COLUMNS)))
    return w.reshape(*w.shape[:2], -1, COLUMNS).swapaxes(1, 2)


def times(x: jax.Array, m: Matrix) -> jax.Array:
    """x [..., in] in float32 times one matrix, or several: [..., count * outputs]."""
    rows = x.reshape(-1, x.shape[-1])
    result = jax.ShapeDtypeStruct((len(rows), len(m.panels) * m.outputs), jnp.float32)
    (y,) = jax.ffi.ffi_call("lowrank_times", [result])(rows, *jax.tree.leaves(m))
    return y.reshape(*x.shape[:-1], -1)


def columns(m: Matrix, at: jax.Array) -> jax.Array:
    """What belongs to some outputs of one matrix of float32, bfloat16 or int8: [..., in]."""
    place = at % COLUMNS
    if m.panels.dtype == jnp.bfloat16:
        place = place % (COLUMNS // 2) * 2 + place // (COLUMNS // 2)
    taken = m.panels[0, at // COLUMNS, :, place].astype(jnp.float32)
    return taken if m.scales is None else taken * m.scales[0, at // COLUMNS, 0, at % COLUMNS][..., None]


@functools.cache
def load() -> bool:
    """Whether the C++ is there: compiled, if it was not, and known to JAX. Warns where it cannot be."""
    try:
        library = ctypes.CDLL(_built())
    except (OSError, ValueError, subprocess.SubprocessError) as e:  # ValueError: $CXX with half a quotation
        told = (getattr(e, "stderr", None) or b"").decode(errors="replace").strip() or str(e)
        reason = told.splitlines()[-1]
        warnings.warn(f"decoding on this CPU will be slow, as native.cc is not compiled: {reason}", stacklevel=2)
        return False
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return True


def compiler() -> list[str]:
    """The command of the C++ compiler; raises FileNotFoundError where there is none."""
    if found := shlex.split(os.environ.get("CXX", "")) or list(filter(shutil.which, ("g++", "clang++", "c++")))[:1]:
        return found
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++"]
    raise FileNotFoundError("there is no C++ compiler; install g++, or pip install ziglang")


def _built() -> str:
    """The path of the library; raises OSError or subprocess.SubprocessError where it cannot be made."""
    command = compiler()
    with open(SOURCE, "rb") as f:
        parts = (f.read(), *map(str.encode, (*command, *FLAGS, jax.__version__, _processor())))
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder = os.environ.get("LOWRANK_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "lowrank_jax")
    path = os.path.join(folder, f"native-{name}.so")
    if os.path.exists(path):
        return path
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as hidden:
        made = os.path.join(hidden, "native.so")
        line = [*command, *FLAGS, f"-I{jax.ffi.include_dir()}", SOURCE, "-o", made]
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
