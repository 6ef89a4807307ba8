"""Weights of 8 and 4 bits: the error of each column and group, and of products with them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.inference import quantize
from lowrank_jax.model.kernels import build

OUTPUTS = 50
GROUPS = {96: 32, 128: 64, 257: 1}  # inputs, and how many of them share a scale of int4
BIG, BIG_GROUP, ZERO = 7, 9, 11  # columns

# Compiling takes nearly all of these tests' time, and less without LLVM's passes.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
pack = jit(quantize.pack, static_argnums=(1, 2))
product = jit(quantize.times, static_argnums=2)


def uneven(inputs: int) -> np.ndarray:
    """Return [inputs, OUTPUTS] in which a column, and a group of another one, are 100 times larger, and one is 0."""
    w = np.random.default_rng(0).standard_normal((inputs, OUTPUTS)).astype(np.float32)
    w[:, BIG] *= 100
    w[: GROUPS[inputs], BIG_GROUP] *= 100
    w[:, ZERO] = 0
    return w


@functools.cache
def packed(inputs: int, kind: str, outputs: int):
    """Return (weights, the matrix [inputs, OUTPUTS] that they represent: integers times scales)."""
    w = pack(uneven(inputs) if outputs else uneven(inputs).T, kind, outputs)
    whole, scales = (np.asarray(x).astype(np.float32) for x in (w.qvalue, w.scale))
    whole, scales = (whole, scales) if outputs else (whole.T, scales.T)
    return w, whole * np.repeat(scales, inputs // len(scales), axis=0)


@pytest.mark.parametrize("outputs", [0, 1])
@pytest.mark.parametrize("inputs", GROUPS)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_no_weight_is_off_by_more_than_half_a_step_of_its_column_or_group(kind, inputs, outputs):
    w, dense = packed(inputs, kind, outputs)
    assert w.qvalue.dtype == kind and w.scale.dtype == jnp.float32
    # Steps of int8 go from -127.5 to 127.5 times the scale of a column, those of int4 from -7.5 to 7.5 in a group.
    group, steps = (inputs, 255) if kind == "int8" else (GROUPS[inputs], 15)
    in_groups = lambda x: np.abs(x).reshape(-1, group, OUTPUTS).max(axis=1)
    largest, error = in_groups(uneven(inputs)), in_groups(dense - uneven(inputs))
    assert (error <= largest / steps * (1 + 1e-4)).all()
    assert (dense[:, ZERO] == 0).all() and w.scale.size == OUTPUTS * inputs // group


@pytest.mark.parametrize("outputs", [0, 1])
@pytest.mark.parametrize("inputs, rows", [(96, 1), (96, 3), (128, 3), (257, 3)])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_products_are_those_of_the_represented_matrix(kind, inputs, rows, outputs):
    """Each column is within 2e-5 times its largest weight times the largest x: the error of a product of floats.

    A CPU computes int8 with integers, and panels in C++.
    """
    assert build.load("decode")
    r = np.random.default_rng(1)
    x = (r.standard_normal((rows, inputs)) * 10.0 ** r.integers(-3, 3, (rows, 1))).astype(np.float32)
    w, dense = packed(inputs, kind, outputs)
    most = 2e-5 * math.sqrt(inputs) * np.abs(x).max(axis=-1, keepdims=True) * np.abs(dense).max(axis=0)
    in_panels = quantize.in_panels(w, outputs)
    for y in (product(x, w, outputs), product(x, in_panels)):
        assert (np.abs(np.asarray(y) - x.astype(float) @ dense) <= most).all()


@pytest.mark.parametrize("outputs", [0, 1])
def test_rows_are_the_weights_of_an_output(outputs):
    w, dense = packed(96, "int8", outputs)
    at = np.array([[BIG, ZERO, OUTPUTS - 1]])
    for weights in [quantize.in_panels(w, outputs), *[w] * (1 - outputs)]:
        np.testing.assert_allclose(quantize.rows(weights, at, jnp.float32)[0], dense.T[at[0]], rtol=1e-6)
