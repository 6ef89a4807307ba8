"""The train step: gradients over the microbatches, clipped, judged by the guard, applied at the step's rate."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lowrank_jax.config import RunConfig
from lowrank_jax.machine import sharding
from lowrank_jax.model import loss, network, precision
from lowrank_jax.training import guard, optim
from lowrank_jax.training.guard import Guard
from lowrank_jax.training.plan import FittedStage

BATCH = {"tokens": jnp.int32, "targets": jnp.int32, "segments": jnp.int32, "weights": jnp.float32}


class TrainState(NamedTuple):
    """The state that training carries from step to step."""

    params: dict  # fp32
    opt_state: tuple
    step: jax.Array  # updates done
    average: dict | tuple  # of the parameters, or an empty tuple where the config has none
    guard: Guard

    @property
    def weights(self) -> dict:
        """The model's parameters for every use outside of training."""
        return self.average or self.params


# Without a mesh, the functions below are for the first device of this process.
def init_params(config: RunConfig, mesh: Mesh | None = None) -> dict:
    """Return random parameters, the same on every mesh."""
    layout = sharding.of_tree(mesh or sharding.one_device(), jax.eval_shape(lambda: _init(config)))
    return jax.jit(lambda: _init(config), out_shardings=layout)()


def first_state(config: RunConfig, params: dict, step: int = 0, mesh: Mesh | None = None) -> TrainState:
    """Return the state at the start of a phase: these parameters, and no memory of earlier steps. Consumes them."""
    start = lambda params: _start(config, params, step)
    layout = sharding.of_tree(mesh or sharding.one_device(), jax.eval_shape(start, params))
    return jax.jit(start, donate_argnums=0, out_shardings=layout)(params)


@functools.lru_cache(maxsize=8)
def abstract_state(config: RunConfig, mesh: Mesh | None = None) -> TrainState:
    """Return the shapes, dtypes and shardings of a state, to restore a checkpoint onto or compile a step for."""
    shapes = jax.eval_shape(lambda: _start(config, _init(config), 0))
    layout = sharding.of_tree(mesh or sharding.one_device(), shapes)
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, layout)


def abstract_batch(rows: int, length: int, mesh: Mesh) -> dict:
    """Return the shapes, dtypes and shardings of a batch."""
    layout = sharding.of_rows(mesh, rows)
    return {name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=layout) for name, dtype in BATCH.items()}


def _init(config: RunConfig) -> dict:
    return network.init(config.model, jax.random.key(config.seed))


def _start(config: RunConfig, params: dict, step: int) -> TrainState:
    scaled = precision.policy(config.precision).name == "fp16"
    average = jax.tree.map(jnp.copy, params) if config.optim.ema else ()
    opt_state = optim.make(config.optim).init(params)
    return TrainState(params, opt_state, jnp.asarray(step, jnp.int32), average, guard.start(scaled))


def train_step(config: RunConfig, fitted: FittedStage, state: TrainState, batch: dict) -> tuple[TrainState, dict]:
    """Make one update from a batch of arrays [batch, seq_len], unless the guard refuses it; return (state, metrics).

    The loss in the metrics is the cross-entropy alone, without z-loss and label smoothing.
    """
    o, stage = config.optim, fitted.stage
    phase = getattr(config, stage.phase)
    rates = optim.rates(phase, state.params)
    mean_loss, grads = _loss_and_gradient(config, fitted, rates, state.params, batch, state.guard.scale)
    grad_norm = optax.tree.norm(grads)
    is_fp16 = precision.policy(fitted.precision).name == "fp16"
    ok, after = guard.judge(state.guard, mean_loss, grad_norm, o.skip_sigma, is_fp16)
    lr = optim.learning_rate(phase, stage, state.step)
    updates, opt_state = optim.make(o).update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u, rate: p + lr * rate * u if rate else p, state.params, updates, rates)
    rate = 1 - optim.average_decay(o.ema, stage, state.step)
    average = optax.incremental_update(params, state.average, rate) if o.ema else ()
    new, old = (params, opt_state, average), (state.params, state.opt_state, state.average)
    params, opt_state, average = jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, old)
    metrics = {"loss": mean_loss, "lr": lr, "grad_norm": grad_norm, "ok": ok, "scale": state.guard.scale}
    metrics |= {"refused": after.refused, "in_a_row": after.in_a_row}
    return TrainState(params, opt_state, state.step + 1, average, after), metrics


def _loss_and_gradient(config: RunConfig, fitted: FittedStage, rates: dict, params: dict, batch: dict, scale):
    """Return the mean cross-entropy per trained token, and the gradient of the objective: zero for frozen weights.

    Every token of the batch weighs the same, whatever the microbatch. Each microbatch's loss is already divided by the
    batch's token count and multiplied by `scale`, as fp16 would overflow in sums over thousands of tokens.
    """
    o, policy = config.optim, precision.policy(fitted.precision)
    c = dataclasses.replace(config.model, remat=fitted.remat, attention=fitted.attention)
    count = jnp.maximum(batch["weights"].sum(), 1.0)

    def sums(params, micro):
        params = jax.tree.map(lambda p, rate: p if rate else jax.lax.stop_gradient(p), params, rates)
        x_BTD = network.features(c, params, micro["tokens"], micro["segments"], policy.dtype, policy.matmul)
        head, targets, weights = network.head(c, params, x_BTD), micro["targets"], micro["weights"]
        return loss.through_head(*head, targets, weights, scale / count, o.label_smoothing, o.z_loss)

    def accumulate(total, micro):
        (_, nats), grads = jax.value_and_grad(sums, has_aux=True)(params, micro)
        return jax.tree.map(jnp.add, total, (nats, grads)), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    micros = jax.tree.map(lambda x: sharding.microbatches(x, fitted.microbatch), batch)
    (nats, grads), _ = jax.lax.scan(accumulate, zero, micros)
    return nats / count, jax.tree.map(lambda g: g / scale, grads)


def lower(config: RunConfig, fitted: FittedStage, mesh: Mesh | None = None) -> jax.stages.Lowered:
    """Lower `train_step` for the stage's batch shape and a mesh of real or described devices.

    The compiled step takes (state, batch) and consumes the state.
    """
    mesh, stage = mesh or sharding.one_device(), fitted.stage
    state = abstract_state(config, mesh)
    layout = jax.tree.map(lambda x: x.sharding, state), sharding.whole(mesh)  # pinned, so that no layout drifts
    step = jax.jit(functools.partial(train_step, config, fitted), donate_argnums=0, out_shardings=layout)
    with jax.set_mesh(mesh):
        return step.lower(state, abstract_batch(stage.batch, stage.seq_len, mesh))


def lower_disagreement(config: RunConfig, fitted: FittedStage, mesh: Mesh) -> jax.stages.Lowered:
    """Lower `disagreement` in the same way; the compiled function takes (params, batch)."""
    stage = fitted.stage
    compare = jax.jit(functools.partial(disagreement, config, fitted), out_shardings=sharding.whole(mesh))
    with jax.set_mesh(mesh):
        return compare.lower(abstract_state(config, mesh).params, abstract_batch(stage.batch, stage.seq_len, mesh))


def disagreement(config: RunConfig, fitted: FittedStage, params: dict, batch: dict) -> dict:
    """Return the relative differences of `loss` and `gradient` from bf16, on a batch's first microbatch.

    `known` is True where bf16's loss and gradient are finite.
    """
    micro = jax.tree.map(lambda x: sharding.microbatches(x, fitted.microbatch)[0], batch)
    rates = optim.rates(getattr(config, fitted.stage.phase), params)
    exact = dataclasses.replace(fitted, precision="bf16")
    (loss_low, grads_low), (loss_bf16, grads_bf16) = (
        _loss_and_gradient(config, s, rates, params, micro, jnp.float32(1)) for s in (fitted, exact)
    )
    norm = optax.tree.norm(grads_bf16)
    gradient_off = optax.tree.norm(optax.tree.sub(grads_low, grads_bf16)) / jnp.maximum(norm, 1e-30)
    loss_off = jnp.abs(loss_low - loss_bf16) / jnp.maximum(jnp.abs(loss_bf16), 1e-30)
    return {"loss": loss_off, "gradient": gradient_off, "known": jnp.isfinite(loss_bf16) & jnp.isfinite(norm)}
