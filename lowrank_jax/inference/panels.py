"""Weight matrices in the layout that the CPU decoder's C++ (model/kernels/decode.cc) reads, in 32 to 4 bits."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

COLUMNS = 32  # outputs of a panel


@functools.partial(jax.tree_util.register_dataclass, data_fields=("panels", "scales"), meta_fields=("outputs",))
@dataclass(frozen=True)
class Matrix:
    """A stack of matrices [in, outputs] of one shape, in float32, bfloat16, int8 or int4."""

    panels: jax.Array  # [count, P, in, COLUMNS], the last panel padded with zeros; int4 as uint8, two to a byte
    scales: jax.Array | None  # of integers: [count, P, groups of inputs, COLUMNS] in float32
    outputs: int


@jax.jit
def matrix(w: jax.Array, scales: jax.Array | None = None) -> Matrix:
    """Return [in, out] or [count, in, out] in panels; integers have `scales` [groups, out] or [count, groups, out]."""
    panels = _panels(w)
    if w.dtype == jnp.bfloat16:  # two to a word, so that one load fills two vectors
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
    """Return x [..., in], in float32, times the matrices: [..., count * outputs]."""
    rows = x.reshape(-1, x.shape[-1])
    result = jax.ShapeDtypeStruct((len(rows), len(m.panels) * m.outputs), jnp.float32)
    (y,) = jax.ffi.ffi_call("lowrank_times", [result])(rows, *jax.tree.leaves(m))
    return y.reshape(*x.shape[:-1], -1)


def columns(m: Matrix, ids: jax.Array) -> jax.Array:
    """Return the weights [..., in] of some outputs of one matrix, in float32, bfloat16 or int8."""
    place = ids % COLUMNS
    if m.panels.dtype == jnp.bfloat16:
        place = place % (COLUMNS // 2) * 2 + place // (COLUMNS // 2)
    taken = m.panels[0, ids // COLUMNS, :, place].astype(jnp.float32)
    return taken if m.scales is None else taken * m.scales[0, ids // COLUMNS, 0, ids % COLUMNS][..., None]
