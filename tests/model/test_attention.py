"""ALiBi and its five backends against the paper's formula: values, gradients, causality, packing and limits."""

import functools
import hashlib
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import AxisType

from lowrank_jax.config import UsageError
from lowrank_jax.model import attention

BACKENDS = ["reference", "chunked", "cudnn", "splash", "native"]
ODD = [(b, T) for b in ("reference", "chunked", "native") for T in (7, 300)]  # lengths that splash refuses
TESTS = pathlib.Path(__file__).parents[1]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
whether_packed = pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Run the TPU's kernel in Pallas's interpreter, on a CPU."""
    kernel = functools.partial(splash_attention.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(splash_attention, "make_splash_mha_single_device", kernel)


def attend_on_cpu(q, k, v, segments_BT=None, backend="auto") -> jax.Array:
    """Call `attend` with XLA's attention in place of cuDNN's: the same call, and the same q, k and v."""
    if backend != "cudnn":
        return attention.attend(q, k, v, segments_BT, backend)
    of_jax = jax.nn.dot_product_attention

    def by_xla(*qkv, implementation: str, **options):
        assert implementation == "cudnn"
        return of_jax(*qkv, implementation="xla", **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.nn, "dot_product_attention", by_xla)
        return attention._cudnn(q, k, v, attention.alibi_slopes(q.shape[2]), segments_BT)


attend = jax.jit(attend_on_cpu, static_argnames="backend")


def paper_slopes(heads: int) -> list[float]:
    """Return the slopes as the ALiBi authors' code does (ofirpress/attention_with_linear_biases, `get_slopes`)."""

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
    """Return documents of about 20 tokens; the last document of each row is padding, which is 0."""
    segments = 1 + np.cumsum(np.random.default_rng(9).random((B, T)) < 0.05, axis=1)
    return np.where(segments == segments[:, -1:], 0, segments).astype(np.int32)


def paper(q, k, v, segments_BT=None) -> jax.Array:
    """Return softmax(q k / sqrt(K) - m (i - j)) v over j <= i of the same document, in fp32."""
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    i, j = jnp.meshgrid(jnp.arange(q.shape[1]), jnp.arange(q.shape[1]), indexing="ij")
    scores = jnp.einsum("bihd,bjhd->bhij", q, k, precision="highest") / math.sqrt(q.shape[-1])
    scores -= jnp.array(paper_slopes(q.shape[2]))[:, None, None] * (i - j)
    seen = (j <= i)[None] if segments_BT is None else (j <= i) & (segments_BT[:, :, None] == segments_BT[:, None, :])
    probs = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhij,bjhd->bihd", probs, v, precision="highest")


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(run, q, k, v, segments_BT, weights) -> list[jax.Array]:
    """Return [output, dq, dk, dv] in fp32, for a loss of sum(output * weights)."""
    out, pull = jax.vjp(lambda q, k, v: run(q, k, v, segments_BT), q, k, v)
    return [x.astype(jnp.float32) for x in (out, *pull(weights.astype(out.dtype)))]


OF = {backend: functools.partial(attend_on_cpu, backend=backend) for backend in BACKENDS}  # for `with_gradients`


def relative_errors(ours, exact) -> np.ndarray:
    return np.array([float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in zip(ours, exact)])


def shapes_within(jaxpr) -> list[tuple[int, ...]]:
    """Return the shapes of all values in a traced program, inner programs included."""
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
    slopes, positions = attention.alibi_slopes(6), jnp.arange(40)
    bias = attention.alibi_bias(slopes, positions, positions)
    expected = [[[-m * (i - j) for j in range(40)] for i in range(40)] for m in paper_slopes(6)]
    np.testing.assert_allclose(bias, expected, rtol=1e-6)
    shifted = positions + 100_000
    np.testing.assert_array_equal(bias, attention.alibi_bias(slopes, shifted, shifted))


@pytest.mark.parametrize(
    "backend, T, H",
    [("reference", 300, 6), ("chunked", 129, 8), ("native", 144, 6), *((b, 256, H) for b in BACKENDS for H in (6, 8))],
)
def test_probabilities_of_zero_scores_are_the_softmax_of_the_bias(backend, T, H):
    zeros = np.zeros((1, T, H, T), np.float32)
    one_hot_values = zeros + np.eye(T, dtype=np.float32)[:, None]
    probs_THS = np.asarray(attend(zeros, zeros, one_hot_values, backend=backend))[0]
    for i in range(T):
        bias_HS = -np.outer(paper_slopes(H), i - np.arange(i + 1))
        expected = np.exp(bias_HS) / np.exp(bias_HS).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(probs_THS[i, :, : i + 1], expected, rtol=1e-4, atol=1e-12)
        assert (probs_THS[i, :, i + 1 :] == 0).all()


@every_backend
@whether_packed
@pytest.mark.parametrize("T, H, K", [(256, 2, 32), (384, 8, 32), (640, 6, 16)])  # 1, 1 and 25 blocks of splash
def test_outputs_and_gradients_are_the_papers(backend, packed, T, H, K):
    arrays = *qkv(2, T, H, K), random_segments(2, T) if packed else None, normal(2, T, H, K, seed=3)
    assert (relative_errors(with_gradients(OF[backend], *arrays), with_gradients(paper, *arrays)) < 1e-4).all()


@pytest.mark.parametrize("backend", ["chunked", "cudnn", "splash"])
@whether_packed
def test_in_bfloat16_errors_are_those_of_the_reference(backend, packed):
    T, H, K = 256, 6, 32
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv(1, T, H, K))
    arrays = q, k, v, random_segments(1, T) if packed else None, normal(1, T, H, K, seed=3)
    exact = with_gradients(paper, *arrays)
    assert attend(q, k, v, backend=backend).dtype == jnp.bfloat16
    # Splash receives q divided by sqrt(K), which is rounded once more.
    errors, reference = (relative_errors(with_gradients(OF[b], *arrays), exact) for b in (backend, "reference"))
    assert (errors < (1.1 if backend == "cudnn" else 2) * reference).all(), errors / reference


@pytest.mark.parametrize("backend, K", [("chunked", 8), ("native", 16), ("native", 48)])
@pytest.mark.parametrize("T", [1, 7, 128, 300, 520])
@whether_packed
def test_chunked_and_native_take_any_length(backend, K, T, packed):
    arrays = *qkv(2, T, 6, K), random_segments(2, T) if packed else None, normal(2, T, 6, K, seed=3)
    for ours, exact in zip(with_gradients(OF[backend], *arrays), with_gradients(paper, *arrays)):
        np.testing.assert_allclose(ours, exact, atol=5e-5)


def test_nan_passes_through_native_and_its_gradients():
    """The guard must see it."""
    for place in range(3):
        arrays = qkv(1, 40, 2, 16)
        arrays[place][0, 5] = np.nan
        out, *grads = with_gradients(OF["native"], *arrays, None, normal(1, 40, 2, 16, seed=3))
        assert np.isnan(out[0, 5]).all()
        assert all(np.isnan(g).any() for g in grads[:2])


@pytest.mark.parametrize("threads", [1, 2])
def test_native_computes_the_same_bits_with_any_number_of_threads(threads):
    code = f"""
import os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{threads}])
import hashlib, jax, numpy as np, test_attention as t
run = t.with_gradients(t.OF["native"], *t.qkv(2, 200, 6, 32), None, t.normal(2, 200, 6, 32, seed=3))
print(hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in run)).hexdigest())
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / "model")))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=TESTS, env=environment, capture_output=True, text=True, check=True
    )
    mine = with_gradients(OF["native"], *qkv(2, 200, 6, 32), None, normal(2, 200, 6, 32, seed=3))
    assert done.stdout.split()[-1] == hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in mine)).hexdigest()


@pytest.mark.parametrize(
    "backend, T, t", [(b, T, T // 2) for b, T in ODD] + [(b, 256, t) for b in BACKENDS for t in (127, 255)]
)
def test_no_gradient_flows_from_later_tokens_and_some_from_every_earlier_one(backend, T, t):
    only_t = normal(1, T, 4, 16, seed=5) * (np.arange(T) == t)[:, None, None]
    _, of_q, of_k, of_v = with_gradients(OF[backend], *qkv(1, T, 4, 16), None, only_t)
    reach = lambda g: np.abs(np.asarray(g)[0]).sum(axis=(1, 2)) > 0
    np.testing.assert_array_equal(reach(of_q), np.arange(T) == t)
    np.testing.assert_array_equal(reach(of_k), np.arange(T) <= t)
    np.testing.assert_array_equal(reach(of_v), np.arange(T) <= t)


@every_backend
def test_packed_documents_equal_separate_ones(backend):
    lengths = [1, 130, 64, 61]
    documents = [[normal(1, n, 6, 16, seed=10 * i + part) for part in range(3)] for i, n in enumerate(lengths)]
    packed = [np.concatenate(parts, axis=1) for parts in zip(*documents)]
    together = attend(*packed, np.repeat([1, 2, 3, 0], lengths)[None], backend=backend)
    separate = [attend(*document, backend="reference") for document in documents]
    # cuDNN's channels raise scores up to 1536, where fp32 has steps of 1/8192.
    np.testing.assert_allclose(together, np.concatenate(separate, axis=1), atol=3e-4 if backend == "cudnn" else 2e-5)


@every_backend
@pytest.mark.parametrize("first, step", [(1, 1), (1, 128), (4080, 1)])
def test_not_one_bit_comes_from_another_document(backend, first, step):
    """This holds even where the other document's scores are far higher, up to 100."""
    T = 256
    q, k, v = qkv(1, T, 2, 16)
    document = np.arange(T)[None] // 8
    odd = ((document % 2 == 1) ^ (document >= 16))[..., None, None]  # of two documents that are 16 apart, one is odd
    segments = first + step * document
    spoilt = np.where(odd, 20 * q, q), np.where(odd, 20 * k, k), np.where(odd, 1e4 * v, v)
    scores = jnp.einsum("BTHK,BSHK->BHTS", q, spoilt[1]) / math.sqrt(16)
    assert 50 < jnp.abs(scores).max() < 150
    own = ~odd[0, :, 0, 0]
    before, after = (attend(*arrays, segments, backend=backend)[:, own] for arrays in ((q, k, v), spoilt))
    np.testing.assert_array_equal(before, after)
    own_gradient = normal(1, T, 2, 16, seed=4) * ~odd
    assert all(not g[:, ~own].any() for g in with_gradients(OF[backend], *spoilt, segments, own_gradient)[1:])


@pytest.mark.parametrize("dtype, error", [(jnp.bfloat16, 2**-16), (jnp.float16, 2**-16), (jnp.float32, 2**-22)])
def test_the_channels_multiply_to_the_slope_times_the_position(dtype, error):
    T, H, K = 8192, 6, 8
    zeros = jnp.zeros((1, T, H, K), dtype)
    augment = jax.jit(lambda q, k: attention._augment(q, k, attention.alibi_slopes(H), 1 / math.sqrt(K)))
    q, k = (np.asarray(x[0], np.float64) for x in augment(zeros, zeros))
    scores_TH = (q[:1] * k).sum(axis=-1) / math.sqrt(K)
    expected_TH = np.arange(T)[:, None] * np.array(paper_slopes(H))
    np.testing.assert_allclose(scores_TH, expected_TH, rtol=error)


@pytest.mark.parametrize("documents", [5, 300])
def test_cudnns_precision_does_not_depend_on_the_number_of_documents(documents):
    T, H, K = 2048, 2, 32
    cuts = np.sort(np.random.default_rng(0).choice(np.arange(1, T), documents - 1, replace=False))
    segments = 1 + np.searchsorted(cuts, np.arange(T), side="right")[None]
    arrays = *qkv(1, T, H, K), segments, normal(1, T, H, K, seed=3)
    assert (relative_errors(with_gradients(OF["cudnn"], *arrays), with_gradients(paper, *arrays)) < 1e-4).all()


@pytest.mark.parametrize(
    "backend, platform, dtype, head_dim, seq_len, kernel, why_not",
    [
        ("auto", "cpu", "float32", 32, 300, "native", ""),
        ("auto", "cpu", "bfloat16", 32, 300, "chunked", "float32"),
        ("auto", "cpu", "float32", 24, 300, "chunked", "multiple of 16, not float32 and 24"),
        ("auto", "tpu", "bfloat16", 32, 2048, "splash", ""),
        ("auto", "tpu", "float32", 12, 128, "splash", ""),
        ("auto", "tpu", "bfloat16", 32, 2000, "chunked", "multiple of 128, not 2000"),
        ("auto", "tpu", "float16", 32, 2048, "chunked", "bfloat16 and float32, not float16"),
        ("auto", "gpu", "bfloat16", 32, 300, "cudnn", ""),
        ("auto", "cuda", "float16", 240, 2048, "cudnn", ""),
        ("auto", "gpu", "float32", 32, 2048, "chunked", "bfloat16 and float16, not float32"),
        ("auto", "gpu", "bfloat16", 36, 2048, "chunked", "multiple of 8 and at most 240, not 36"),
        ("auto", "gpu", "bfloat16", 256, 2048, "chunked", "at most 240, not 256"),
        ("chunked", "tpu", "float16", 12, 7, "chunked", ""),
        ("reference", "gpu", "float32", 12, 7, "reference", ""),
        ("cudnn", "cuda", "bfloat16", 32, 7, "cudnn", ""),
        ("splash", "tpu", "bfloat16", 32, 256, "splash", ""),
    ],
)
def test_resolve(backend, platform, dtype, head_dim, seq_len, kernel, why_not):
    resolved, reason = attention.resolve(backend, platform, dtype, head_dim, seq_len)
    assert resolved == kernel and bool(reason) == bool(why_not) and why_not in reason


@pytest.mark.parametrize(
    "backend, platform, dtype, head_dim, seq_len, refusal",
    [
        ("cudnn", "cpu", "bfloat16", 32, 256, "cudnn is for a GPU, not a CPU"),
        ("splash", "cuda", "bfloat16", 32, 256, "splash is for a TPU, not a GPU"),
        ("native", "tpu", "float32", 32, 256, "native is for a CPU, not a TPU"),
        ("native", "cpu", "float32", 8, 256, "not float32 and 8"),
        ("splash", "tpu", "bfloat16", 32, 200, "a multiple of 128, not 200"),
        ("cudnn", "gpu", "float32", 32, 256, "not float32"),
    ],
)
def test_a_named_kernel_that_cannot_run_is_refused(backend, platform, dtype, head_dim, seq_len, refusal):
    with pytest.raises(UsageError, match=f"^config.model.attention={backend}: .*{refusal}; set .*attention=auto$"):
        attention.resolve(backend, platform, dtype, head_dim, seq_len)


def test_without_a_compiler_a_cpu_runs_chunked(monkeypatch):
    monkeypatch.setattr(attention.build, "load", lambda source: False)
    assert attention.resolve("auto", "cpu", "float32", 32, 256) == ("chunked", "native is not compiled on this machine")


REFUSALS = [RuntimeError("INTERNAL: no cuDNN engine"), NotImplementedError("the head dim"), ValueError("Q must be")]


@pytest.mark.parametrize("error", [*REFUSALS, None, RuntimeError("RESOURCE_EXHAUSTED: memory of another process")])
def test_cudnn_is_chosen_where_it_compiles_on_this_gpu(error, monkeypatch):
    """The answer holds in traces and on meshes too, and cuDNN is asked once."""
    shapes = []

    def of_cudnn(q, k, v, implementation: str, **options):
        shapes.append((q.shape, q.dtype.name, jax.sharding.get_abstract_mesh().empty))
        if error:
            raise error
        return by_xla(q, k, v, implementation="xla", **options)

    by_xla = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", of_cudnn)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    attention._refused_by_cudnn.cache_clear()
    resolved = []

    def traced(x):
        resolved.append(attention.resolve("auto", "gpu", jnp.bfloat16, 128, 4096))
        return x * x

    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))):
        jax.jit(jax.grad(lambda x: jax.lax.scan(lambda c, _: (traced(c), None), x, length=2)[0])).lower(1.0)
    resolved.append(attention.resolve("auto", "gpu", jnp.bfloat16, 128, 2048))
    refused = error in REFUSALS
    assert {kernel for kernel, _ in resolved} == {"chunked" if refused else "cudnn"}
    assert all((str(error) in reason) if refused else not reason for _, reason in resolved)
    assert shapes == [((1, 64, 1, 144), "bfloat16", True)]
    attention._refused_by_cudnn.cache_clear()


def test_attend_refuses_shapes_too():
    with pytest.raises(UsageError, match="multiple of 128, not 300"):
        attention.attend(*qkv(1, 300, 2, 8), backend="splash")


@pytest.mark.parametrize(
    "platform, T, kernel", [("cpu", 256, "native"), ("tpu", 256, "splash"), ("tpu", 140, "chunked")]
)
def test_auto_runs_what_resolve_says(platform, T, kernel, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    arrays = qkv(1, T, 2, 16)
    np.testing.assert_array_equal(attention.attend(*arrays), attention.attend(*arrays, backend=kernel))


@whether_packed
@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "backward"])
def test_chunked_and_native_have_no_square_of_the_sequence(packed, differentiated):
    T, H = 1024, 2
    segments = random_segments(1, T) if packed else None

    def largest(backend):
        run = lambda q, k, v: attention.attend(q, k, v, segments, backend).sum()
        run = jax.grad(run, (0, 1, 2)) if differentiated else run
        shapes = shapes_within(jax.make_jaxpr(run)(*qkv(1, T, H, 16)).jaxpr)
        return max(math.prod(shape) for shape in shapes)

    assert largest("reference") >= H * T * T
    assert largest("chunked") <= H * T * T / 8
    assert largest("native") == T * H * 16
