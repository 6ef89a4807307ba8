"""Values that change with the global step: the learning rate, and the decay of the weights' moving average."""

import jax
import jax.numpy as jnp

from lowrank_jax.config import PhaseConfig
from lowrank_jax.training.plan import Stage


def learning_rate(p: PhaseConfig, stage: Stage, step: int | jax.Array) -> jax.Array:
    """Return the learning rate at a global step: warm-up, then a schedule over the stage's phase.

    WSD (warm-up, stable, decay: arXiv 2404.06395) holds the peak and falls linearly over the last `cooldown` share of
    the phase; cosine and linear fall from the end of the warm-up. All would reach `lr_end` x `lr` one step after the
    last.
    """
    k = jnp.asarray(step - stage.phase_start, jnp.float32)
    n = stage.phase_steps
    warm = round(p.warmup * n)
    up = jnp.minimum((k + 1) / max(warm, 1), 1.0)
    if p.schedule == "wsd":
        cool = round(p.cooldown * n)
        left = jnp.clip((n - k) / max(cool + 1, 1), 0.0, 1.0)  # 1 until the cooldown, then down
        shape = p.lr_end + (1 - p.lr_end) * left
    else:
        left = jnp.clip((n - k) / max(n - warm, 1), 0.0, 1.0)
        if p.schedule == "cosine":
            left = jnp.sin(0.5 * jnp.pi * left) ** 2  # (1 + cos)/2, without its cancellation
        shape = p.lr_end + (1 - p.lr_end) * left
    return p.lr * up * shape


def average_decay(ema: float, stage: Stage, step: int | jax.Array) -> jax.Array:
    """Return the decay of the weights' moving average at a global step: it grows to `ema` as the phase goes on.

    (1 + k) / (10 + k) at step k of the phase. With `ema` from the first step on, the phase's first weights would stay
    in the average for 1 / (1 - ema) steps.
    """
    k = jnp.asarray(step - stage.phase_start, jnp.float32)
    return jnp.minimum(ema, (1 + k) / (10 + k))
