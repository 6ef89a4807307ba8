"""ALiBi against the paper's formula, and the two backends against it, each other and causality."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax import attention

BACKENDS = ["reference", "chunked"]
attend = jax.jit(attention.attend, static_argnames="backend")
both_backends = pytest.mark.parametrize("backend", BACKENDS)


def paper_slopes(heads: int) -> list[float]:
    """`get_slopes` of the ALiBi authors' code (ofirpress/attention_with_linear_biases)."""

    def of_power_of_two(n):
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(heads).is_integer():
        return of_power_of_two(heads)
    closest = 2 ** math.floor(math.log2(heads))
    return of_power_of_two(closest) + paper_slopes(2 * closest)[0::2][: heads - closest]


def normal(*shape, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def qkv(B: int, T: int, H: int, K: int) -> list[np.ndarray]:
    return [normal(B, T, H, K, seed=i) for i in range(3)]


def random_segments(B: int, T: int) -> np.ndarray:
    """Documents of about 20 tokens, each row cut at its own places."""
    return np.cumsum(np.random.default_rng(9).random((B, T)) < 0.05, axis=1)


def weighted_output(q, k, v, segments_BT, weights, backend) -> jax.Array:
    return (attention.attend(q, k, v, segments_BT, backend) * weights).sum()


qkv_gradients = jax.jit(jax.grad(weighted_output, (0, 1, 2)), static_argnames="backend")


def shapes_within(jaxpr) -> list[tuple[int, ...]]:
    """Shapes of all values that a traced program makes, inner programs included."""
    inner = [getattr(p, "jaxpr", p) for e in jaxpr.eqns for p in e.params.values()]
    nested = [shape for j in inner if hasattr(j, "eqns") for shape in shapes_within(j)]
    return [v.aval.shape for e in jaxpr.eqns for v in e.outvars] + nested


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 16, 20, 24, 32])
def test_slopes_are_the_papers(heads):
    np.testing.assert_allclose(attention.alibi_slopes(heads), paper_slopes(heads), rtol=1e-6)


def test_slopes_of_8_and_of_6_heads_are_the_published_numbers():
    np.testing.assert_array_equal(attention.alibi_slopes(8), [2.0**-n for n in range(1, 9)])
    np.testing.assert_array_equal(attention.alibi_slopes(6), [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3])


def test_bias_falls_with_distance_and_ignores_a_common_shift():
    slopes, at = attention.alibi_slopes(6), jnp.arange(40)
    bias = attention.alibi_bias(slopes, at, at)
    expected = [[[-m * (i - j) for j in range(40)] for i in range(40)] for m in paper_slopes(6)]
    np.testing.assert_allclose(bias, expected, rtol=1e-6)
    np.testing.assert_array_equal(bias, attention.alibi_bias(slopes, at + 100_000, at + 100_000))


@both_backends
@pytest.mark.parametrize("T, H", [(300, 6), (129, 8)])
def test_probabilities_of_zero_scores_are_the_softmax_of_the_bias(backend, T, H):
    zeros = np.zeros((1, T, H, T), np.float32)
    one_hot_values = zeros + np.eye(T, dtype=np.float32)[:, None]
    probs_THS = np.asarray(attend(zeros, zeros, one_hot_values, backend=backend))[0]
    for i in range(T):
        bias_HS = -np.outer(paper_slopes(H), i - np.arange(i + 1))
        expected = np.exp(bias_HS) / np.exp(bias_HS).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(probs_THS[i, :, : i + 1], expected, rtol=2e-5, atol=1e-12)
        assert (probs_THS[i, :, i + 1 :] == 0).all()


@pytest.mark.parametrize("T", [1, 7, 128, 300])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_chunked_equals_reference_in_outputs_and_gradients(T, packed):
    q, k, v = qkv(2, T, 6, 8)
    segments = random_segments(2, T) if packed else None
    weights = normal(2, T, 6, 8, seed=3)
    outputs, grads = [], []
    for backend in BACKENDS:
        outputs.append(attend(q, k, v, segments, backend=backend))
        grads.append(qkv_gradients(q, k, v, segments, weights, backend=backend))
    np.testing.assert_allclose(outputs[0], outputs[1], atol=2e-5)
    for of_reference, of_chunked in zip(*grads):
        np.testing.assert_allclose(of_reference, of_chunked, atol=5e-5)


def test_auto_is_one_of_the_backends_in_bfloat16_too():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv(1, 140, 4, 8))
    auto, reference = (attend(q, k, v, backend=backend) for backend in ("auto", "reference"))
    assert auto.dtype == jnp.bfloat16
    np.testing.assert_allclose(auto.astype(jnp.float32), reference.astype(jnp.float32), atol=0.05)


@both_backends
@pytest.mark.parametrize("T, t", [(7, 3), (300, 127), (300, 128), (300, 299)])
def test_no_gradient_flows_from_later_tokens_and_some_from_every_earlier_one(backend, T, t):
    q, k, v = qkv(1, T, 4, 8)
    only_t = normal(1, T, 4, 8, seed=5) * (np.arange(T) == t)[:, None, None]
    of_q, of_k, of_v = qkv_gradients(q, k, v, None, only_t, backend=backend)
    reach = lambda g: np.abs(np.asarray(g)[0]).sum(axis=(1, 2)) > 0
    np.testing.assert_array_equal(reach(of_q), np.arange(T) == t)
    np.testing.assert_array_equal(reach(of_k), np.arange(T) <= t)
    np.testing.assert_array_equal(reach(of_v), np.arange(T) <= t)


@both_backends
def test_packed_documents_equal_separate_ones(backend):
    lengths = [1, 130, 64]
    documents = [[normal(1, n, 6, 8, seed=10 * i + part) for part in range(3)] for i, n in enumerate(lengths)]
    packed = [np.concatenate(parts, axis=1) for parts in zip(*documents)]
    segments = np.repeat(np.arange(len(lengths)), lengths)[None]
    separate = [attend(*document, backend=backend) for document in documents]
    together = attend(*packed, segments, backend=backend)
    np.testing.assert_allclose(together, np.concatenate(separate, axis=1), atol=1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "backward"])
def test_chunked_never_makes_a_square_of_the_sequence(packed, differentiated):
    T, H = 1024, 2
    segments = random_segments(1, T) if packed else None

    def largest(backend):
        run = lambda q, k, v: weighted_output(q, k, v, segments, 1.0, backend)
        run = jax.grad(run, (0, 1, 2)) if differentiated else run
        shapes = shapes_within(jax.make_jaxpr(run)(*qkv(1, T, H, 8)).jaxpr)
        return max(math.prod(shape) for shape in shapes)

    assert largest("reference") >= H * T * T
    assert largest("chunked") <= H * T * T / 8
