"""float8 matmuls: their errors, the program that a compiler for an H100 makes, and the fallback to bf16."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import described, run_config

from lowrank_jax.machine import hlo
from lowrank_jax.model import precision
from lowrank_jax.model.precision import fp8_matmul
from lowrank_jax.training import recovery, step
from lowrank_jax.training.plan import make, stages_of, unchanged


def forward_and_backward(matmul):
    """Return a function of (x, w, the gradient of y) that returns (y, dx, dw)."""

    def run(x, w, g):
        y, pull = jax.vjp(matmul, x, w)
        return y, *pull(g)

    return run


@pytest.fixture(scope="module")
def arrays():
    """x, w and the gradient of x @ w, each with values of another size, as in a layer."""
    kx, kw, kg = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(kx, (4, 128, 256))
    return x, 0.04 * jax.random.normal(kw, (256, 512)), 1e-3 * jax.random.normal(kg, (4, 128, 512))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients_are_within_8_percent_of_fp32(arrays, dtype):
    exact = forward_and_backward(jnp.matmul)(*arrays)
    ours = jax.jit(forward_and_backward(fp8_matmul))(*(a.astype(dtype) for a in arrays))
    for name, a, b in zip(("y", "dx", "dw"), ours, exact):
        error = float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
        assert a.dtype == dtype and 1e-3 < error < 0.08, f"{name}: {error}"  # at least 1e-3: it was rounded


def test_the_size_of_a_tensor_does_not_matter(arrays):
    """float8 alone holds 2^-9 to 448 (e4m3): without a scale these would be zero or NaN."""
    run = jax.jit(forward_and_backward(fp8_matmul))
    x, w, g = arrays
    for y, again, factor in zip(run(x, w, g), run(2.0**20 * x, 2.0**-20 * w, 2.0**-30 * g), (1, 2.0**-50, 2.0**-10)):
        assert jnp.array_equal(factor * y, again)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_values_that_are_not_finite_stay_visible(arrays, bad):
    x, w, g = arrays
    run = jax.jit(forward_and_backward(fp8_matmul))
    spoil = lambda a: a.at[(0,) * a.ndim].set(bad)
    y, _, dw = run(spoil(x), w, g)
    assert not jnp.isfinite(y).all() and not jnp.isfinite(dw).all()
    y, dx, _ = run(x, spoil(w), g)
    assert not jnp.isfinite(y).all() and not jnp.isfinite(dx).all()
    _, dx, dw = run(x, w, spoil(g))
    assert not jnp.isfinite(dx).all() and not jnp.isfinite(dw).all()


def test_zeros_give_zeros(arrays):
    zeros = [jnp.zeros_like(a) for a in arrays]
    assert all(not a.any() for a in forward_and_backward(fp8_matmul)(*zeros))


def test_what_is_kept_for_the_backward_pass_is_f8(arrays):
    x, w, _ = arrays
    _, pull = jax.vjp(fp8_matmul, x, w)
    kept = {a.shape: a.dtype for a in jax.tree.leaves(pull) if a.size > 1}
    assert kept == {x.shape: jnp.float8_e4m3fn, w.shape: jnp.float8_e4m3fn}


# ---------------------------------------------------------------------------------------------- what a compiler makes


TRITON, CUBLASLT = {}, {"xla_gpu_enable_triton_gemm": False}  # the defaults of XLA; what a GPU may choose by measuring


@pytest.fixture(scope="module")
def compiled():
    """The text of a layer's forward and backward pass, compiled for an H100."""
    one = jax.sharding.SingleDeviceSharding(described("h100:1")[0])
    shapes = [(8, 1024, 1024), (1024, 4096), (8, 1024, 4096)]
    specs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=one) for shape in shapes]

    def text(matmul, options: dict) -> str:
        return jax.jit(forward_and_backward(matmul)).lower(*specs).compile(options).as_text()

    return text


@pytest.mark.parametrize("options", [TRITON, CUBLASLT])
def test_an_h100_multiplies_in_f8_forward_and_backward(compiled, options):
    text = compiled(fp8_matmul, options)
    assert hlo.f8_matmuls(text) == 3
    assert ("__cublas$lt$matmul$f8" in text) == (options == CUBLASLT)


@pytest.mark.slow
@pytest.mark.parametrize("options, count", [({"xla_gpu_dot_merger_threshold_mb": 0}, 3 * 3), ({}, 7)])
def test_the_training_step_has_three_f8_matmuls_for_each_fp8_layer(options, count):
    """A block has three (gate, up, out). By default XLA merges two matmuls that share an operand."""
    sizes = {"model__d": 256, "model__rank": 32, "model__heads": 4, "model__vocab": 512, "model__layers": 3}
    sizes |= {"pretrain__block": 128, "pretrain__tokens_per_step": 512, "optim__name": "adamw"}
    config = run_config(precision="fp8", **sizes)
    plan = make(config, described("h100:1"))
    compiled = step.lower(config, unchanged(plan.stages[0]), plan.mesh).compile(options)
    assert hlo.f8_matmuls(compiled.as_text()) == count


def test_rounding_to_f8_before_a_bf16_matmul_is_not_the_same(compiled):
    """The control: XLA turns this pattern into bf16 matmuls."""
    rounded = lambda a: a.astype(jnp.float8_e4m3fn).astype(a.dtype)
    assert hlo.f8_matmuls(compiled(lambda x, w: rounded(x) @ rounded(w), TRITON)) == 0


def test_bf16_matmuls_are_not_counted(compiled):
    assert all(hlo.f8_matmuls(compiled(jnp.matmul, options)) == 0 for options in (TRITON, CUBLASLT))


ROWS, LENGTH = 4, 16  # two rows per microbatch


@pytest.fixture(scope="module")
def beside_bf16():
    """`disagreement` on a model of width 256, where only the MLP's products are fp8 and can be spoilt.

    Their values are multiplied by `forward`, their weights' gradients by `weights`; tokens of `nan_rows` weigh NaN.
    """
    sizes = {"model__d": 256, "model__mlp": 256, "model__rank": 32, "model__layers": 1, "model__vocab": 64}
    sizes |= {"pretrain__block": LENGTH, "pretrain__tokens_per_step": ROWS * LENGTH}
    config = run_config(precision="fp8", pretrain__microbatch_tokens=2 * LENGTH, **sizes)
    (stage,) = stages_of(config)
    rng = np.random.default_rng(0)
    draw = lambda x: (0.06 * rng.standard_normal(x.shape) + (x.size == 256)).astype(np.float32)
    params = jax.tree.map(draw, jax.eval_shape(lambda: step._init(config)))
    ids = rng.integers(0, 64, (2, ROWS, LENGTH)).astype(np.int32)
    batch = {"tokens": ids[0], "targets": ids[1], "segments": np.zeros((ROWS, LENGTH), np.int32)}

    def run(params, batch, forward, weights):
        def spoilt(x, w):
            y = fp8_matmul(x, weights.astype(w.dtype) * w + jax.lax.stop_gradient((1 - weights).astype(w.dtype) * w))
            return y + jax.lax.stop_gradient((forward - 1).astype(y.dtype) * y)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(precision, "fp8_matmul", spoilt)
            return step.disagreement(config, unchanged(stage), params, batch)

    compiled = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})

    def compare(forward=1.0, weights=1.0, nan_rows=()):
        trained = np.ones((ROWS, LENGTH), np.float32)
        trained[list(nan_rows)] = np.nan
        return compiled(params, batch | {"weights": trained}, np.float32(forward), np.float32(weights))

    return compare


def leaves_fp8(folder, check, done: int = 4, every: int = 4) -> bool:
    """Return whether training leaves fp8 after this comparison with bf16."""
    programs = types.SimpleNamespace(running=types.SimpleNamespace(check=check))
    config = types.SimpleNamespace(every=types.SimpleNamespace(fp8_check=every))
    run = types.SimpleNamespace(programs=programs, config=config, folder=str(folder))
    meter = types.SimpleNamespace(restart_clock=lambda: None)
    return recovery.must_leave_fp8(run, meter, {}, {}, done)


def test_healthy_fp8_is_near_bf16_and_training_leaves_a_spoilt_one(beside_bf16, tmp_path):
    """Values of four times their size; weights' gradients of zero, which leave the loss unchanged."""
    healthy, scaled, untrained = beside_bf16(), beside_bf16(forward=4.0), beside_bf16(weights=0.0)
    assert healthy["known"] and 0 < healthy["loss"] < 0.005 and 0.01 < healthy["gradient"] < 0.15
    assert scaled["known"] and scaled["loss"] > 0.015 and scaled["gradient"] > 0.25
    assert untrained["known"] and untrained["loss"] == healthy["loss"] and untrained["gradient"] > 0.35
    assert [leaves_fp8(tmp_path, lambda *_, x=x: x) for x in (healthy, scaled, untrained)] == [False, True, True]


def test_the_first_rows_alone_are_compared_and_only_where_bf16_is_finite(beside_bf16):
    healthy, ours_not_finite = beside_bf16(nan_rows=(2, 3)), beside_bf16(forward=np.inf)
    assert healthy == beside_bf16()  # only the first microbatch is compared
    assert not beside_bf16(nan_rows=(1,))["known"]
    assert ours_not_finite["known"] and not np.isfinite(ours_not_finite["loss"])


@pytest.mark.parametrize(
    "loss, gradient, known, is_off",
    [
        (0.0099, 0.249, True, False),
        (0.0101, 0.0, True, True),  # the loss by more than 1%
        (0.0, 0.251, True, True),  # the gradient by more than a quarter of its norm
        (np.nan, 0.0, True, True),
        (0.0, np.nan, True, True),
        (np.inf, np.inf, True, True),
        (np.nan, np.nan, False, False),  # bf16 is not finite either
    ],
)
def test_training_leaves_fp8_where_the_loss_or_the_gradient_is_off(tmp_path, loss, gradient, known, is_off):
    assert leaves_fp8(tmp_path, lambda *_: {"loss": loss, "gradient": gradient, "known": known}) == is_off
    events = [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").open()] if known else []
    assert events == ([] if not known else ["fallback"] if is_off else ["fp8_check"])


def test_fp8_alone_is_compared_with_bf16_every_few_steps(tmp_path):
    comparisons = []
    check = lambda *_: comparisons.append(1) or {"loss": 1.0, "gradient": 1.0, "known": True}
    assert [leaves_fp8(tmp_path, check, done=k, every=3) for k in range(5)] == [True, False, False, True, False]
    assert len(comparisons) == 2 and not leaves_fp8(tmp_path, None)
