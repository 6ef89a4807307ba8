"""Matrix products with weights of 32, 16, 8 or 4 bits; the other factor keeps its precision.

Small weights are qwix's: int8 has one scale per output, int4 one per output and GROUP inputs. GPUs and TPUs widen the
integers inside the product. XLA's CPU backend widens them in memory first, which costs more than they save, but
multiplies int8 by int8 at full speed. There x becomes two int8 numbers, which together are within 1/64,516 of a row's
largest value. Milliseconds for 24 matrices [2048, 768] and one row on 2 cores: float32 4.7, int8 widened 39, int8 in
two parts 2.1. The CPU decoder's C++ (model/kernels/decode.cc) reads weights of all kinds as Panels.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import qwix

KINDS = ("fp32", "bf16", "fp16", "int8", "int4")
GROUP = 64  # inputs per scale of int4; if it does not divide their number, the largest divisor of 64 that does
COLUMNS = 32  # outputs of a panel


@functools.partial(jax.tree_util.register_dataclass, data_fields=("panels", "scales"), meta_fields=("outputs",))
@dataclass(frozen=True)
class Panels:
    """A stack of matrices [in, outputs] of one shape, in float32, bfloat16, int8 or int4."""

    panels: jax.Array  # [count, P, in, COLUMNS], the last panel padded with zeros; int4 as uint8, two to a byte
    scales: jax.Array | None  # of integers: [count, P, groups of inputs, COLUMNS] in float32
    outputs: int


def pack(w: jax.Array, kind: str, outputs: int = 1) -> qwix.QArray:
    """Return a weight matrix as int8 or int4; its axis `outputs` holds the outputs."""
    if kind == "int8":
        return qwix.quantize(w, jnp.int8, channelwise_axes=(outputs,))
    inputs = 1 - outputs
    group = math.gcd(w.shape[inputs], GROUP)
    return qwix.quantize(w, jnp.int4, channelwise_axes=(outputs,), tiled_axes={inputs: group})


@functools.partial(jax.jit, static_argnums=(1, 2))
def in_panels(weights, outputs: int = 1, parts: int = 1):
    """Return a weight matrix, a stack of them [count, inputs, outputs], or a tree of both, in panels.

    A matrix whose outputs are `parts` concatenated matrices becomes a stack of them.
    """

    def cut(x):
        x = x if outputs else x.T
        x = x if x.ndim == 3 else jnp.stack(jnp.split(x, parts, axis=1))
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % COLUMNS)))
        return x.reshape(*x.shape[:2], -1, COLUMNS).swapaxes(1, 2)

    def pack(w: jax.Array | qwix.QArray) -> Panels:
        w, scales = (w.qvalue, cut(w.scale.astype(jnp.float32))) if isinstance(w, qwix.QArray) else (w, None)
        panels = cut(w)
        if w.dtype == jnp.bfloat16:  # two to a word, so that one load fills two vectors
            panels = panels.reshape(*panels.shape[:3], 2, -1).swapaxes(3, 4).reshape(panels.shape)
        elif w.dtype == jnp.int4:
            low, high = jnp.split((panels.astype(jnp.int8) + 8).astype(jnp.uint8), 2, axis=-1)
            panels = low | high << 4
        return Panels(panels, scales, w.shape[-1 if outputs else 0] // parts)

    return jax.tree.map(pack, weights, is_leaf=lambda w: isinstance(w, qwix.QArray))


def times(x: jax.Array, w, outputs: int = 1) -> jax.Array:
    """Return x [..., inputs] times a matrix whose axis `outputs` holds its outputs, in x's precision."""
    if isinstance(w, Panels):  # x is in float32; the products with a stack of matrices are concatenated
        rows = x.reshape(-1, x.shape[-1])
        result = jax.ShapeDtypeStruct((len(rows), len(w.panels) * w.outputs), jnp.float32)
        (y,) = jax.ffi.ffi_call("lowrank_times", [result])(rows, *jax.tree.leaves(w))
        return y.reshape(*x.shape[:-1], -1)
    if isinstance(w, qwix.QArray):
        if w.qvalue.dtype == jnp.int8:
            widened = lambda x, w: _product(x, w.qvalue.astype(x.dtype), outputs) * w.scale.reshape(-1).astype(x.dtype)
            in_parts = lambda x, w: _int8_product(x, w, outputs).astype(x.dtype)
            return jax.lax.platform_dependent(x, w, cpu=in_parts, default=widened)
        return _product(x, qwix.dequantize(w).astype(x.dtype), outputs)
    if x.dtype == jnp.bfloat16 and math.prod(x.shape[:-1]) == 1:
        # XLA's CPU backend has a fast bfloat16 product for two rows or more: a second row made 73 ms 7 ms.
        twice = lambda x, w: _product(jnp.concatenate([x, x]), w, outputs)[:1]
        return jax.lax.platform_dependent(x, w, cpu=twice, default=lambda x, w: _product(x, w, outputs))
    return _product(x, w, outputs)


def rows(w, ids: jax.Array, dtype) -> jax.Array:
    """Return rows of a matrix that is an array, in panels, or int8 with its outputs on axis 0."""
    if isinstance(w, Panels):
        column = ids % COLUMNS
        if w.panels.dtype == jnp.bfloat16:
            column = column % (COLUMNS // 2) * 2 + column // (COLUMNS // 2)
        taken = w.panels[0, ids // COLUMNS, :, column].astype(jnp.float32)
        return taken if w.scales is None else taken * w.scales[0, ids // COLUMNS, 0, ids % COLUMNS][..., None]
    if isinstance(w, qwix.QArray):
        return w.qvalue[ids].astype(dtype) * w.scale[ids].astype(dtype)
    return w[ids].astype(dtype)


def bytes_of(weights) -> int:
    """Return the bytes that arrays take in memory; two int4 share a byte."""
    bits = lambda x: 4 if x.dtype == jnp.int4 else 8 * x.dtype.itemsize
    return sum(x.size * bits(x) for x in jax.tree.leaves(weights)) // 8


def _product(x, w, outputs: int):
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (1 - outputs,)), ((), ())))


def _int8_product(x, w: qwix.QArray, outputs: int):
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    step = jnp.maximum(jnp.max(jnp.abs(rows), axis=-1, keepdims=True), 1e-30) / 127
    whole = jnp.round(rows / step)
    part = jnp.round((rows / step - whole) * 254)
    both = jnp.concatenate([whole, part]).astype(jnp.int8)
    dims = (((1,), (1 - outputs,)), ((), ()))
    y = jax.lax.dot_general(both, w.qvalue, dims, preferred_element_type=jnp.int32).astype(jnp.float32)
    y = (y[: len(rows)] + y[len(rows) :] / 254) * step * w.scale.reshape(-1)
    return y.reshape(*x.shape[:-1], -1)
