"""The train step: accumulation, clipping, optimizers, learning rate, precision, and averaged weights."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs

from configs import default
from lowrank_jax.config import RunConfig, UsageError
from lowrank_jax.model import network
from lowrank_jax.training import optim, run_folder, step
from lowrank_jax.training.metrics import Meter
from lowrank_jax.training.plan import FittedStage, Progress, stages_of, unchanged

ROWS, LENGTH = 8, 16
TOY = {"vocab": 31, "d": 32, "layers": 2, "heads": 4, "rank": 8, "latent_norm": True, "mlp": 24}
PHASE = {"tokens_per_step": ROWS * LENGTH, "block": LENGTH, "steps": 100, "warmup": 0.0, "lr": 1e-2}

# Adam divides a gradient of about 0 by itself + 1e-8. Rounding moves gradients by 3e-10, a millionth of their root mean
# square, and so an update of up to the rate of 1e-2 by up to 3%. (XLA of JAX 0.12 rounds otherwise: 1.3e-4, not 3e-5.)
TINY_CHANGE = 3e-4

# Compiling is nearly all that these tests do, and takes half the time without LLVM's passes.
QUICK = {"xla_backend_optimization_level": 0}
jit = functools.partial(jax.jit, compiler_options=QUICK)


def toy(precision: str = "fp32", name: str = "muon", clip: float = 1.0, decay: float = 0.1, **phase) -> RunConfig:
    values = default.get_config().to_dict()
    values["model"].update(TOY)
    values["pretrain"].update(PHASE | phase)
    values["optim"].update(name=name, clip=clip, weight_decay=decay)
    return RunConfig.from_dict(values | {"precision": precision})


def params_away_from_init() -> dict:
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: network.init(toy().model, jax.random.key(0)))
    return jax.tree.map(lambda x: (0.2 * rng.standard_normal(x.shape)).astype(np.float32), shapes)


def state_of(config: RunConfig, at: int = 0) -> step.TrainState:
    return step.first_state(config, params_away_from_init(), at)


def ragged_batch() -> dict:
    """Return rows of two documents each, with none to all of their tokens trained."""
    rng = np.random.default_rng(1)
    shape = (ROWS, LENGTH)
    weights = (rng.random(shape) < np.linspace(0, 1, ROWS)[:, None]).astype(np.float32)
    segments = np.broadcast_to(np.arange(LENGTH) >= 6, shape).astype(np.int32)
    tokens, targets = (rng.integers(0, 31, shape).astype(np.int32) for _ in range(2))
    return {"tokens": tokens, "targets": targets, "segments": segments, "weights": weights}


def fitted_of(config: RunConfig) -> FittedStage:
    """The config's only stage, with every setting as the config asks."""
    (stage,) = stages_of(config)
    return unchanged(stage)


@functools.cache
def compiled(config: RunConfig):
    fitted = fitted_of(config)
    return fitted, jit(lambda state, batch: step.train_step(config, fitted, state, batch))


def updated(config: RunConfig, batch: dict, at: int = 0) -> tuple[step.TrainState, dict]:
    _, run = compiled(config)
    return run(state_of(config, at), batch)


def close(a, b, **tolerance) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), a, b)


def changes_of(state: step.TrainState) -> dict:
    return jax.tree.map(lambda new, old: np.asarray(new) - old, state.params, params_away_from_init())


@functools.cache
def by_definition(smoothing: float = 0.0, z_loss: float = 0.0) -> tuple:
    """Return (objective, its gradient): the mean over the trained tokens of `ragged_batch`, with all rows at once."""
    return _by_definition()(params_away_from_init(), smoothing, z_loss)


@functools.cache
def _by_definition():
    config, batch = toy(), ragged_batch()

    def objective(params, smoothing, z_loss):
        x = network.features(config.model, params, batch["tokens"], batch["segments"])
        logits = network.logits(config.model, params, x)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        log_probs = logits - log_z[..., None]
        of_target = log_probs[np.arange(ROWS)[:, None], np.arange(LENGTH), batch["targets"]]
        per_token = z_loss * log_z**2 - (1 - smoothing) * of_target - smoothing * log_probs.mean(axis=-1)
        return per_token[batch["weights"] == 1].mean()

    return jit(jax.value_and_grad(objective))


def test_loss_and_gradient_are_those_of_the_mean_over_trained_tokens_alone():
    expected, grads = by_definition()
    _, metrics = updated(toy(), ragged_batch())
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)


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
    _, run = compiled(toy(name=name))
    state, batch, losses = state_of(toy(name=name)), ragged_batch(), []
    for _ in range(20):
        state, metrics = run(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 1 and int(state.step) == 20


def test_compiled_step_consumes_its_state_and_makes_the_same_update():
    config = toy(name="adamw")
    state = state_of(config)
    after, metrics = step.lower(config, fitted_of(config)).compile()(state, jax.device_put(ragged_batch()))
    expected, its_metrics = updated(config, ragged_batch())
    close(after.opt_state, expected.opt_state, rtol=1e-4, atol=1e-7)
    of_noise = jax.tree.map(lambda mu: np.abs(mu) < 1e-6, optax.tree.get(expected.opt_state, "mu"))
    assert np.mean([x.mean() for x in jax.tree.leaves(of_noise)]) < 0.1
    kept = lambda params: jax.tree.map(lambda p, noise: np.where(noise, 0, p), params, of_noise)
    close(kept(after.params), kept(expected.params), atol=TINY_CHANGE)
    close(metrics, its_metrics, rtol=1e-5)
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
    real = jax.eval_shape(lambda: step.first_state(config, step.init_params(config)))
    describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert describe(step.abstract_state(config)) == describe(real) == describe(jax.eval_shape(lambda: state_of(config)))


# ------------------------------------------------------------------------------------------------ optimizers alone


def random_gradients(scale: float, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    draw = lambda x: scale * rng.standard_normal(x.shape, np.float32)
    return jax.tree.map(draw, params_away_from_init())


@functools.cache
def updater(**optimizer):
    """Return a compiled function from a sequence of gradients to the last of its updates."""
    rule = optim.make(toy(**optimizer).optim)

    def run(gradients, params):
        state = rule.init(params)
        for grads in gradients:
            updates, state = rule.update(grads, state, params)
        return updates

    # With XLA's own fusions, without which the same update with and without a clip is rounded differently.
    return jit(run, compiler_options=QUICK | runs.FUSIONS)


def updates_of(gradients: list[dict], name: str, clip: float = 0.0, decay: float = 0.0) -> dict:
    return updater(name=name, clip=clip, decay=decay)(gradients, params_away_from_init())


def is_block_matrix(path, x) -> bool:
    return path[0].key == "blocks" and x.ndim == 3


def split(tree: dict) -> tuple[list, list]:
    """Return the stacked matrices of the blocks, and all other arrays."""
    leaves = jax.tree.leaves_with_path(tree)
    return [x for p, x in leaves if is_block_matrix(p, x)], [x for p, x in leaves if not is_block_matrix(p, x)]


def newton_schulz(x: np.ndarray) -> np.ndarray:
    """The five iterations of Muon's author, which take every singular value to about 1 (0.7 to 1.2)."""
    x = x / np.linalg.norm(x)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def test_muon_orthogonalises_each_layers_matrices_and_nothing_else():
    gradients = random_gradients(1.0, 0)
    (matrices, others), (of_matrices, _) = split(updates_of([gradients], name="muon")), split(gradients)
    assert len(matrices) == 11 and len(others) == 4
    for update, gradient in zip(matrices, of_matrices):
        for layer, g in zip(np.asarray(update), gradient):
            size = 0.2 * max(layer.shape) ** 0.5
            values = np.linalg.svd(layer, compute_uv=False) / size
            assert 0.6 < values.min() and values.max() < 1.3
            expected = newton_schulz(g) if g.shape[0] <= g.shape[1] else newton_schulz(g.T).T
            np.testing.assert_allclose(layer, -size * expected, atol=1e-3 * size)
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
    assert optax.tree.norm(small) < 0.5 < optax.tree.norm(large)
    after = lambda grads, clip: updates_of([grads, small], name=name, clip=clip)  # what a gradient leaves behind
    close(after(large, 0.5), after(huge, 0.5), atol=1e-4)
    norm = float(optax.tree.norm(large))
    close(after(large, 0.5), after(jax.tree.map(lambda g: g * 0.5 / norm, large), 0.0), atol=1e-4)
    close(after(small, 0.5), after(small, 0.0), rtol=1e-6)
    off = jax.tree.map(lambda a, b: np.abs(a - b).max(), after(large, 0.0), after(huge, 0.0))
    assert max(jax.tree.leaves(off)) > 1e-2


def test_reported_gradient_norm_is_the_one_before_clipping():
    _, metrics = updated(toy(name="adamw", clip=1e-3), ragged_batch())
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(by_definition()[1]), rtol=1e-4)
    assert metrics["grad_norm"] > 0.1


# ------------------------------------------------------------------------------- groups, freezing, averages, objectives


def with_optim(**changes) -> RunConfig:
    values = toy(name="adamw").to_dict()
    values["optim"].update(changes)
    return RunConfig.from_dict(values)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_each_group_moves_at_its_own_rate_and_zero_means_the_phases(name):
    base = changes_of(updated(toy(name=name, decay=0.0), ragged_batch())[0])
    config = toy(name=name, decay=0.0, lr_core=3e-2, lr_head=1e-3)
    after, metrics = updated(config, ragged_batch())
    np.testing.assert_allclose(metrics["lr"], 1e-2, rtol=1e-6)
    for group, ratio in (("blocks", 3.0), ("embed", 0.1), ("norm", 0.1)):
        expected = jax.tree.map(lambda x, ratio=ratio: ratio * x, base[group])
        close(changes_of(after)[group], expected, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_head_of_its_own_is_updated_as_the_embedding_is(name):
    config, params = toy(name=name, lr_core=3e-2, lr_head=1e-3), params_away_from_init()
    params["head"] = params["embed"]
    rule = optim.make(config.optim)
    updates = jit(lambda params: rule.update(params, rule.init(params), params)[0])(params)
    np.testing.assert_array_equal(updates["head"]["table"], updates["embed"]["table"])
    assert optim.rates(config.pretrain, params)["head"] == {"table": 0.1}


@pytest.mark.parametrize("pattern, frozen", [("embed|norm", "embed norm"), ("^blocks", "blocks"), ("q/(up|down)", "")])
def test_frozen_weights_do_not_move_by_a_bit_and_the_others_do(pattern, frozen):
    after, metrics = updated(toy(freeze=pattern), ragged_batch())
    for path, change in jax.tree_util.tree_leaves_with_path(changes_of(after)):
        matched = bool(re.search(pattern, optim.path_name(path)))
        assert np.any(change) != matched, path
        assert path[0].key not in frozen.split() or matched
    grads = jax.tree_util.tree_leaves_with_path(by_definition()[1])
    of_others = [g for path, g in grads if not re.search(pattern, optim.path_name(path))]
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(of_others), rtol=1e-4)  # and so is clipped


@pytest.mark.parametrize("pattern, reason", [("nothing", "matches none of the weights"), (".", "nothing would be")])
def test_a_freeze_that_matches_nothing_or_all_is_refused(pattern, reason):
    with pytest.raises(UsageError, match=reason):
        optim.rates(toy(freeze=pattern).pretrain, params_away_from_init())


def test_smoothing_and_z_loss_move_the_gradient_as_defined_and_not_the_reported_loss():
    for change in ({"label_smoothing": 0.2}, {"z_loss": 0.1}):
        _, metrics = updated(with_optim(**change), ragged_batch())
        np.testing.assert_allclose(metrics["loss"], by_definition()[0], rtol=1e-5)
        _, grads = by_definition(change.get("label_smoothing", 0.0), change.get("z_loss", 0.0))
        np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
        assert abs(metrics["grad_norm"] / optax.tree.norm(by_definition()[1]) - 1) > 1e-3


AVERAGED = {"ema": 0.75, "skip_sigma": 4.0}


def test_in_sft_the_average_follows_the_weights_from_its_start_at_its_own_settings():
    values = with_optim(ema=0.75).to_dict()
    values["sft"].update(PHASE | {"lr": 3e-2, "lr_head": 6e-3, "freeze": "mlp"})
    config = RunConfig.from_dict(values)
    before, stage = stages_of(config)
    run = jit(lambda state, batch: step.train_step(config, unchanged(stage), state, batch))
    state, expected = state_of(config, before.end), params_away_from_init()
    for k in range(12):
        state, metrics = run(state, ragged_batch())
        decay = min(0.75, (1 + k) / (10 + k))
        expected = optax.incremental_update(state.params, expected, 1 - decay)
        if k == 0:  # of Adam's first update each element has the size of its rate
            moved = jax.tree.map(lambda x: np.abs(x).max(), changes_of(state))
            np.testing.assert_allclose([moved["embed"]["table"], moved["norm"]["gain"]], 6e-3, rtol=1e-2)
            assert moved["blocks"]["attention_norm"]["gain"] == pytest.approx(3e-2, rel=1e-2)
            assert max(jax.tree.leaves(moved["blocks"]["mlp"])) == 0
    np.testing.assert_allclose(metrics["lr"], 3e-2, rtol=1e-6)
    close(state.average, expected, atol=1e-5)
    assert state.weights is state.average and state_of(toy()).weights is not None
    assert max(jax.tree.leaves(jax.tree.map(lambda a, p: np.abs(a - p).max(), state.average, state.params))) > 1e-3


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_update_that_is_refused_changes_the_count_alone(precision):
    config = toy(precision)
    batch = ragged_batch() | {"weights": np.full((ROWS, LENGTH), np.nan, np.float32)}
    before = state_of(config)
    after, metrics = updated(config, batch)
    assert not metrics["ok"] and metrics["refused"] == 1 and after.step == 1
    close((after.params, after.opt_state), (before.params, before.opt_state), rtol=0)
    assert metrics["scale"] == before.guard.scale and after.guard.scale == before.guard.scale / (
        1 + (precision == "fp16")
    )


def test_fp16_scales_its_loss_and_makes_the_update_of_fp32():
    exact, its_metrics = updated(toy("fp32", name="adamw"), ragged_batch())
    half, metrics = updated(toy("fp16", name="adamw"), ragged_batch())
    assert metrics["scale"] == 2**15 and metrics["ok"]
    np.testing.assert_allclose(metrics["loss"], its_metrics["loss"], rtol=2e-3)
    np.testing.assert_allclose(metrics["grad_norm"], its_metrics["grad_norm"], rtol=5e-3)
    off = [np.abs(a - b).mean() for a, b in zip(*map(jax.tree.leaves, (half.params, exact.params)))]
    assert max(off) < 1e-3 and metrics["loss"] != its_metrics["loss"]


@pytest.mark.parametrize("microbatch", [1, 4])
def test_accumulation_of_8_and_2_with_every_option_makes_the_loss_and_gradient_of_one(microbatch):
    whole = with_optim(z_loss=0.01, label_smoothing=0.1, ema=0.9)
    values = whole.to_dict()
    values["pretrain"]["microbatch_tokens"] = microbatch * LENGTH
    cut = RunConfig.from_dict(values)
    assert compiled(cut)[0].microbatch == microbatch
    (ours, metrics), (theirs, its_metrics) = updated(cut, ragged_batch()), updated(whole, ragged_batch())
    close(metrics, its_metrics, rtol=1e-6)
    close(ours.opt_state, theirs.opt_state, rtol=1e-4, atol=1e-7)  # the gradients, a tenth of them
    close((ours.params, ours.average), (theirs.params, theirs.average), atol=TINY_CHANGE)


# ------------------------------------------------------------------------------------------------------refused updates


def remembering(state: step.TrainState, loss: float, log_norm: float, count: int = 100, scale: float = 1.0):
    """Return the state after `count` steps that all had this loss and this log of the gradient norm."""
    g = state.guard
    after = g._replace(mean=np.array([loss, log_norm]), count=count, scale=scale)
    as_it_was = lambda new, old: jax.device_put(np.asarray(new, old.dtype), old.sharding)  # or it compiles anew
    return state._replace(guard=jax.tree.map(as_it_was, after, g))


# How far the loss and the log of the gradient norm are above their means, and whether that is accepted. As those have
# not varied, the bounds are 4 of the least deviations: 0.4 nats and 1.
JUMPS = [
    (0.39, 0.0, True), (0.41, 0.0, False), (0.0, 0.98, True), (0.0, 1.02, False), (0.39, 0.98, True), (-5, -5, True)
]  # fmt: skip


def test_a_finite_spike_of_the_loss_or_of_the_gradient_alone_is_refused(tmp_path):
    """The update is the same each time; only the statistics of the steps before differ."""
    config = with_optim(**AVERAGED)
    fitted, run = compiled(config)
    first = state_of(config)
    _, metrics = run(first, ragged_batch())
    usual, usual_norm = float(metrics["loss"]), float(np.log(metrics["grad_norm"]))
    assert abs(usual - usual_norm) > 1 and metrics["ok"]
    for number, (off_loss, off_norm, ok) in enumerate(JUMPS, 1):
        before = remembering(first, usual - off_loss, usual_norm - off_norm)
        after, metrics = run(before, ragged_batch())
        assert (metrics["ok"], metrics["refused"], metrics["in_a_row"]) == (ok, not ok, not ok), (off_loss, off_norm)
        assert after.step == 1
        for new, old in zip((*after[:2], after.average), (*before[:2], before.average)):
            same = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old))]
            assert not any(same) if ok else all(same)
        with contextlib.closing(Meter(config, str(tmp_path), len(JUMPS), 0)) as meter:
            meter.add(fitted, Progress(step=number, tokens=number * ROWS * LENGTH), metrics)
            meter.flush()
    skips = [(e["step"], e["reason"]) for e in run_folder.read_rows(str(tmp_path), "events.jsonl")]
    assert skips == [(2, "spike"), (4, "spike")]


def test_an_infinite_gradient_of_a_finite_loss_is_refused():
    """Only the gradient, of the scaled loss, overflows fp16; this is refused even before spikes are."""
    config = toy("fp16", name="adamw")
    _, run = compiled(config)
    for count in (0, 100):
        before = remembering(state_of(config), 1e6, 1e6, count, scale=2.0**60)
        after, metrics = run(before, ragged_batch())
        assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
        assert not metrics["ok"] and metrics["refused"] == 1 and after.guard.scale == 2.0**59
        close((after.params, after.opt_state), (before.params, before.opt_state), rtol=0)
        np.testing.assert_array_equal(after.guard.mean, before.guard.mean)
