"""Values that change with the global step: the learning rate, and the decay of the weights' moving average."""

import jax
import jax.numpy as jnp

from lowrank_jax.config import PhaseConfig
from lowrank_jax.training.plan import Stage


def learning_rate(p: PhaseConfig, stage: Stage, step: int | jax.Array) -> jax.Array:
    """Return the learning rate at a global step: warm-up, then a schedule over the stage's phase.

    WSD (warm-up, stable, decay: arXiv 2404.06395) keeps the peak and falls linearly over the last `cooldown` share of
    the phase. Cosine and linear fall from the end of the warm-up. All reach `lr_end` x `lr` one step after the last.
    """
    k = jnp.asarray(step - stage.phase_start, jnp.float32)
    n = stage.phase_steps
    warm = round(p.warmup * n)
    up = jnp.minimum((k + 1) / max(warm, 1), 1.0)
    falling = round(p.cooldown * n) + 1 if p.schedule == "wsd" else max(n - warm, 1)
    left = jnp.clip((n - k) / falling, 0.0, 1.0)  # 1 until the rate falls
    if p.schedule == "cosine":
        left = jnp.sin(0.5 * jnp.pi * left) ** 2  # (1 + cos)/2, without its cancellation
    return p.lr * up * (p.lr_end + (1 - p.lr_end) * left)


def average_decay(ema: float, stage: Stage, step: int | jax.Array) -> jax.Array:
    """Return the decay of the weights' moving average at a global step.

    It is (1 + k) / (10 + k) at step k of the phase, and at most `ema`. With `ema` from the first step on, the phase's
    first weights would stay in the average for 1 / (1 - ema) steps.
    """
    k = jnp.asarray(step - stage.phase_start, jnp.float32)
    return jnp.minimum(ema, (1 + k) / (10 + k))
