"""One update: accumulation, clipping, what each optimizer touches, the learning rate, precision and weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from lowrank_jax import model, optim, stages, step
from lowrank_jax.config import RunConfig

ROWS, LENGTH = 8, 16
TOY = {"vocab": 31, "d": 32, "layers": 2, "heads": 4, "rank": 8, "mlp": 24}
PHASE = {"tokens_per_step": ROWS * LENGTH, "block": LENGTH, "steps": 100, "warmup": 0.0, "lr": 1e-2}

TINY_CHANGE = 1e-4  # a hundredth of the rate: Adam divides gradients of about 0 by themselves, rounding included

# Compiling is nearly all that these tests do, and takes half the time without LLVM's passes.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def toy(precision: str = "fp32", name: str = "muon", clip: float = 1.0, decay: float = 0.1, **phase) -> RunConfig:
    values = default.get_config().to_dict()
    values["model"].update(TOY)
    values["pretrain"].update(PHASE | phase)
    values["optim"].update(name=name, clip=clip, weight_decay=decay)
    return RunConfig.from_dict(values | {"precision": precision})


def params_away_from_init() -> dict:
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(toy().model, jax.random.key(0)))
    return jax.tree.map(lambda x: (0.2 * rng.standard_normal(x.shape)).astype(np.float32), shapes)


def state_of(config: RunConfig, at: int = 0) -> step.TrainState:
    params = params_away_from_init()
    return step.TrainState(params, optim.make(config.optim).init(params), np.int32(at))


def ragged_batch() -> dict:
    """Rows with two documents each and from none to all of their tokens trained."""
    rng = np.random.default_rng(1)
    shape = (ROWS, LENGTH)
    weights = (rng.random(shape) < np.linspace(0, 1, ROWS)[:, None]).astype(np.float32)
    segments = np.broadcast_to(np.arange(LENGTH) >= 6, shape).astype(np.int32)
    tokens, targets = (rng.integers(0, 31, shape).astype(np.int32) for _ in range(2))
    return {"tokens": tokens, "targets": targets, "segments": segments, "weights": weights}


@functools.cache
def compiled(config: RunConfig):
    (stage,) = stages.plan(config)
    return stage, jit(lambda state, batch: step.train_step(config, stage, state, batch))


def updated(config: RunConfig, batch: dict, at: int = 0) -> tuple[step.TrainState, dict]:
    stage, run = compiled(config)
    return run(state_of(config, at), step.to_device(batch, stage))


def close(a, b, **tolerance) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), a, b)


def changes_of(state: step.TrainState) -> dict:
    return jax.tree.map(lambda new, old: np.asarray(new) - old, state.params, params_away_from_init())


def test_loss_and_gradient_are_those_of_the_mean_over_trained_tokens_alone():
    config, batch = toy(), ragged_batch()

    def mean_loss(params):
        x, _ = model.features(config.model, params, batch["tokens"], batch["segments"])
        log_probs = jax.nn.log_softmax(model.logits(config.model, params, x))
        return -log_probs[np.arange(ROWS)[:, None], np.arange(LENGTH), batch["targets"]][batch["weights"] == 1].mean()

    expected, grads = jit(jax.value_and_grad(mean_loss))(params_away_from_init())
    _, metrics = updated(config, batch)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optim.global_norm(grads), rtol=1e-4)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_four_ragged_microbatches_make_the_update_of_one(name):
    whole, its_metrics = updated(toy(name=name), ragged_batch())
    cut_config = toy(name=name, microbatch_tokens=2 * LENGTH)
    assert compiled(cut_config)[0].microbatch == 2
    cut, metrics = updated(cut_config, ragged_batch())
    close(metrics, its_metrics, rtol=1e-6)
    close(cut.opt_state, whole.opt_state, rtol=1e-4, atol=1e-7)
    close(cut.params, whole.params, atol=TINY_CHANGE)


def test_tokens_of_weight_zero_influence_nothing():
    batch = ragged_batch()
    batch["weights"] *= batch["segments"]  # the first document of every row is context that nobody sees
    other = {name: values.copy() for name, values in batch.items()}
    other["tokens"][:, :6] = (other["tokens"][:, :6] + 1) % 31
    other["targets"][batch["weights"] == 0] = 0
    ours, theirs = updated(toy(), batch), updated(toy(), other)
    close(ours[1]["loss"], theirs[1]["loss"], rtol=0)
    close(ours[0], theirs[0], rtol=0)


def test_a_batch_without_trained_tokens_leaves_finite_parameters_and_no_loss():
    batch = ragged_batch() | {"weights": np.zeros((ROWS, LENGTH), np.float32)}
    state, metrics = updated(toy(), batch)
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_loss_falls_on_a_repeated_batch(name):
    stage, run = compiled(toy(name=name))
    state, batch, losses = state_of(toy(name=name)), step.to_device(ragged_batch(), stage), []
    for _ in range(20):
        state, metrics = run(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 1 and int(state.step) == 20


def test_compiled_step_consumes_its_state_and_makes_the_same_update():
    config = toy(name="adamw")
    (stage,) = stages.plan(config)
    state = jax.device_put(state_of(config))
    run, seconds = step.compile_step(config, stage, state)
    after, metrics = run(state, step.to_device(ragged_batch(), stage))
    expected, its_metrics = updated(config, ragged_batch())
    close(after.params, expected.params, atol=TINY_CHANGE)
    close(metrics, its_metrics, rtol=1e-5)
    assert seconds > 0
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state)))


def test_learning_rate_of_the_states_own_step_multiplies_the_whole_update():
    config = toy(warmup=0.5, cooldown=0.3)  # of 100 steps
    (early, metrics), (late, late_metrics) = (updated(config, ragged_batch(), at) for at in (0, 24))
    np.testing.assert_allclose([metrics["lr"], late_metrics["lr"]], [1e-2 / 50, 1e-2 / 2], rtol=1e-5)
    close(jax.tree.map(lambda x: 25 * x, changes_of(early)), changes_of(late), atol=2e-5)
    assert all(np.abs(x).max() > 1e-4 for x in jax.tree.leaves(changes_of(late)))
    after_the_end, metrics = updated(config, ragged_batch(), at=100)
    assert metrics["lr"] == 0 and int(after_the_end.step) == 101
    close(after_the_end.params, params_away_from_init(), rtol=0)


def test_bfloat16_keeps_float32_parameters_and_a_loss_close_to_float32():
    state, metrics = updated(toy("bf16", name="adamw"), ragged_batch())
    _, exact = updated(toy("fp32", name="adamw"), ragged_batch())
    kept = jax.tree.leaves((state.params, state.opt_state))
    assert {x.dtype for x in kept if jnp.issubdtype(x.dtype, jnp.floating)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(metrics["loss"], exact["loss"], atol=0.03)
    np.testing.assert_allclose(metrics["grad_norm"], exact["grad_norm"], rtol=0.05)
    assert metrics["loss"] != exact["loss"]  # the matmuls did run in bfloat16


def test_abstract_state_has_the_shapes_and_types_of_a_real_one():
    config = toy()
    real = jax.eval_shape(lambda: step.init_state(config))
    describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert describe(step.abstract_state(config)) == describe(real) == describe(jax.eval_shape(lambda: state_of(config)))


# ------------------------------------------------------------------------------------------------ optimizers alone


def random_gradients(scale: float, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    draw = lambda x: scale * rng.standard_normal(x.shape, np.float32)
    return jax.tree.map(draw, params_away_from_init())


@functools.cache
def updater(**optimizer):
    """Compiled: the last of the updates that a sequence of gradients makes."""
    rule = optim.make(toy(**optimizer).optim)

    def run(gradients, params):
        state = rule.init(params)
        for grads in gradients:
            updates, state = rule.update(grads, state, params)
        return updates

    return jit(run)


def updates_of(gradients: list[dict], name: str, clip: float = 0.0, decay: float = 0.0) -> dict:
    return updater(name=name, clip=clip, decay=decay)(gradients, params_away_from_init())


def is_block_matrix(path, x) -> bool:
    return path[0].key == "blocks" and x.ndim == 3


def split(tree: dict) -> tuple[list, list]:
    """The stacked matrices of the blocks, and all the rest."""
    leaves = jax.tree.leaves_with_path(tree)
    return [x for p, x in leaves if is_block_matrix(p, x)], [x for p, x in leaves if not is_block_matrix(p, x)]


def test_muon_orthogonalises_each_layers_matrices_and_nothing_else():
    matrices, others = split(updates_of([random_gradients(1.0, 0)], name="muon"))
    assert len(matrices) == 11 and len(others) == 4
    for update in matrices:
        for layer in np.asarray(update):
            values = np.linalg.svd(layer, compute_uv=False) / (0.2 * max(layer.shape) ** 0.5)
            assert 0.6 < values.min() and values.max() < 1.3
    for update in others:  # the first update of AdamW has one size for every element
        assert 0.9 < np.abs(update).min() and np.ptp(np.abs(update)) < 1e-3


def test_muon_treats_each_layer_on_its_own():
    grads, other = random_gradients(1.0, 0), random_gradients(1.0, 0)
    for w in jax.tree.leaves(other["blocks"]):
        w[1] *= np.random.default_rng(5).standard_normal(w[1].shape, np.float32)
    ours, theirs = (split(updates_of([g], name="muon"))[0] for g in (grads, other))
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a[0], b[0], atol=1e-6)
        assert np.abs(a[1] - b[1]).max() > 0.01


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_updates_go_against_the_gradient(name):
    grads = random_gradients(1.0, 0)
    jax.tree.map(lambda u, g: np.testing.assert_array_less(np.vdot(u, g), 0), updates_of([grads], name=name), grads)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_weight_decay_acts_on_the_matrices_of_the_blocks_alone(name):
    nothing = jax.tree.map(np.zeros_like, params_away_from_init())
    matrices, others = split(updates_of([nothing], name=name, decay=0.1))
    params, _ = split(params_away_from_init())
    close(matrices, [-0.1 * w for w in params], rtol=1e-5)
    assert not any(np.any(x) for x in others)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_clipping_bounds_the_gradient_norm_and_leaves_small_gradients_alone(name):
    small, large, huge = random_gradients(1e-4, 0), random_gradients(1.0, 1), random_gradients(1.0, 1)
    huge = jax.tree.map(lambda g: 100 * g, huge)
    assert optim.global_norm(small) < 0.5 < optim.global_norm(large)
    after = lambda grads, clip: updates_of([grads, small], name=name, clip=clip)  # what a gradient leaves behind
    close(after(large, 0.5), after(huge, 0.5), atol=1e-4)
    norm = float(optim.global_norm(large))
    close(after(large, 0.5), after(jax.tree.map(lambda g: g * 0.5 / norm, large), 0.0), atol=1e-4)
    close(after(small, 0.5), after(small, 0.0), rtol=1e-6)
    off = jax.tree.map(lambda a, b: np.abs(a - b).max(), after(large, 0.0), after(huge, 0.0))
    assert max(jax.tree.leaves(off)) > 1e-2


def test_reported_gradient_norm_is_the_one_before_clipping():
    (_, lightly), (_, hard) = (updated(toy(name="adamw", clip=clip), ragged_batch()) for clip in (1.0, 1e-3))
    np.testing.assert_allclose(lightly["grad_norm"], hard["grad_norm"], rtol=1e-6)
    assert hard["grad_norm"] > 0.1
