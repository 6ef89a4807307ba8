"""Numerical policies: weights and optimizer state are always fp32, and a policy chooses the precision of the matmuls.

fp8 is stateless: the current maximum of a tensor is its scale, so checkpoints hold nothing of it. Its matmuls hand
float8 arrays to `dot_general` and scale the result. The other way, rounding to float8 and back before a bf16 matmul, is
a pattern that XLA removes silently, rounding included (tests/model/test_fp8.py).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# The smallest dimension of a weight whose matmul gains from float8. Below about 300 (an H100's 989 TFLOP/s over its
# 3.35 TB/s) a bf16 matmul waits for memory, not for the tensor cores. The nearest width that models have is 256.
FP8_WIDTH = 256

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2  # more precision for values, more range for gradients


class Policy(NamedTuple):
    """The `dtype` of a model's activations, and a `matmul` of activations [..., K] by a block's weight [K, N]."""

    name: str
    dtype: jnp.dtype
    matmul: Callable


def resolve(precision: str, platform: str | None = None) -> str:
    """Replace `auto` by bf16 on an accelerator and by fp32 on a CPU, where bf16 matmuls are slower and no smaller.

    `platform` defaults to that of JAX's first device.
    """
    if precision != "auto":
        return precision
    return "fp32" if (platform or jax.default_backend()) == "cpu" else "bf16"


def policy(precision: str) -> Policy:
    precision = resolve(precision)
    dtype = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16, "fp8": jnp.bfloat16}[precision]
    return Policy(precision, jnp.dtype(dtype), fp8_where_wide if precision == "fp8" else matmul)


@jax.custom_vjp
def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """Return x [..., K] @ w [K, N], with a gradient of w in w's own layout in memory.

    JAX's own gradient is transposed, and XLA's CPU compiler then transposes the gradients of x inside the fusions that
    compute them: SwiGLU forward and backward, 2048 x 512 x 1408, took 182 ms on 2 cores instead of 122.
    """
    return x @ w


def _matmul_backward(saved, g):
    (x, w), rows = saved, tuple(range(g.ndim - 1))
    product = lambda a, b, *contract: jax.lax.dot_general(a, b, (contract, ((), ())))
    return product(g, w, (g.ndim - 1,), (1,)), product(x, g, rows, rows)


matmul.defvjp(lambda x, w: (x @ w, (x, w)), _matmul_backward)


def fp8_where_wide(x: jax.Array, w: jax.Array) -> jax.Array:
    return fp8_matmul(x, w) if min(w.shape) >= FP8_WIDTH else matmul(x, w)


@jax.custom_vjp
def fp8_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """Return x [..., K] @ w [K, N] in x.dtype, with both rounded to e4m3; gradients multiply e5m2 by e4m3.

    The recipe of Micikevicius et al. (arXiv 2209.05433, section 3) with per-tensor current scaling.
    """
    return _forward(x, w)[0]


def _forward(x, w):
    (x8, x_scale), (w8, w_scale) = _quantize(x, FORWARD), _quantize(w, FORWARD)
    y = _scaled_dot(x8, w8, ((x.ndim - 1,), (0,)), x_scale * w_scale, x.dtype)
    return y, (x8, x_scale, w8, w_scale)


def _backward(saved, g):
    (x8, x_scale, w8, w_scale), (g8, g_scale) = saved, _quantize(g, BACKWARD)
    rows, highest = tuple(range(g.ndim - 1)), jax.lax.Precision.HIGHEST  # no short accumulators for gradients
    dx = _scaled_dot(g8, w8, ((g.ndim - 1,), (1,)), g_scale * w_scale, g.dtype, highest)
    return dx, _scaled_dot(x8, g8, (rows, rows), x_scale * g_scale, g.dtype, highest)


fp8_matmul.defvjp(_forward, _backward)


def _quantize(x: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """Return (x / scale rounded to `dtype`, scale); the largest value of x becomes the largest of `dtype`.

    The floor keeps a tensor of zeros finite. NaN and infinity pass into the scale and so into the loss, where the guard
    sees them. The clip guards against rounding up: e4m3fn has no infinity, and too large a value becomes NaN.
    """
    largest, x = float(jnp.finfo(dtype).max), x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x)), 1e-30) / largest
    return jnp.clip(x / scale, -largest, largest).astype(dtype), scale


def _scaled_dot(a, b, contract, scale, dtype, precision=None) -> jax.Array:
    y = jax.lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=dtype)
    return (y.astype(jnp.float32) * scale).astype(dtype)
