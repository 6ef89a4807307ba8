"""One update: loss and gradients over the microbatches, clipped, and applied at the step's learning rate."""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowrank_jax import loss, model, optim, precision, stages
from lowrank_jax.config import RunConfig
from lowrank_jax.stages import Stage


class TrainState(NamedTuple):
    """All that training carries from step to step: fp32 parameters, optimizer state, updates done so far."""

    params: dict
    opt_state: tuple
    step: jax.Array


def init_state(config: RunConfig) -> TrainState:
    params = jax.jit(lambda key: model.init(config.model, key))(jax.random.key(config.seed))
    return TrainState(params, fresh_optimizer(config, params), jnp.zeros((), jnp.int32))


def fresh_optimizer(config: RunConfig, params: dict) -> tuple:
    return jax.jit(optim.make(config.optim).init)(params)


def abstract_state(config: RunConfig) -> TrainState:
    """The shapes, dtypes and device of a state, for a checkpoint to be restored onto."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: init_state(config))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)


def train_step(config: RunConfig, stage: Stage, state: TrainState, batch: dict) -> tuple[TrainState, dict]:
    """One update from a batch whose arrays are [microbatches, rows, length].

    Losses and token counts are summed over the microbatches and divided once, so that every token weighs the same
    however the batch is cut.
    """
    dtype = precision.compute_dtype(config.precision)

    def loss_sum(params, micro):
        x_BTD, _ = model.features(config.model, params, micro["tokens"], micro["segments"], dtype)
        logits_BTV = model.logits(config.model, params, x_BTD)
        return loss.cross_entropy_sum(logits_BTV, micro["targets"], micro["weights"])

    def accumulate(total, micro):
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_sum)(state.params, micro)), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
    (total_loss, grads), _ = jax.lax.scan(accumulate, zero, batch)
    count = jnp.maximum(batch["weights"].sum(), 1.0)
    grads = jax.tree.map(lambda g: g / count, grads)
    updates, opt_state = optim.make(config.optim).update(grads, state.opt_state, state.params)
    lr = stages.learning_rate(getattr(config, stage.phase), stage, state.step)
    params = jax.tree.map(lambda p, u: p + lr * u, state.params, updates)
    metrics = {"loss": total_loss / count, "lr": lr, "grad_norm": optim.global_norm(grads)}
    return TrainState(params, opt_state, state.step + 1), metrics


def compile_step(config: RunConfig, stage: Stage, state: TrainState):
    """`train_step` compiled for the stage's batch shape, which consumes its state; and the seconds that took."""
    shape = (stage.batch // stage.microbatch, stage.microbatch, stage.seq_len)
    kinds = {"tokens": jnp.int32, "targets": jnp.int32, "segments": jnp.int32, "weights": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in kinds.items()}
    run = jax.jit(lambda state, batch: train_step(config, stage, state, batch), donate_argnums=0)
    started = time.monotonic()
    compiled = run.lower(state, batch).compile()
    return compiled, time.monotonic() - started


def to_device(batch: dict, stage: Stage) -> dict:
    """A host batch [rows, length] as the [microbatches, rows, length] that the compiled step takes."""
    return jax.device_put({k: x.reshape(-1, stage.microbatch, stage.seq_len) for k, x in batch.items()})
