"""Refuse updates whose loss or gradient is not finite or far above its recent values, and set fp16's loss scale.

Pure functions over a few numbers in the train state, so a resumed run refuses the same updates as an uninterrupted one.
(flax's DynamicScale cannot refuse a spike.)
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

MEMORY = 0.98  # of the running mean and variance: about 50 steps
WARMUP = 50  # steps before a spike can be distinguished from noise
# Smallest deviations of the loss (nats) and of the log of the gradient norm: batches of a mixture differ more than 50
# of them show. With 8 deviations, a refused gradient is at least 7 times the usual one. (0.02, 0.1) refused one good
# SFT batch of the quickstart.
FLOOR = (0.1, 0.25)

# fp16: halved where a gradient overflows, doubled after so many steps without (Micikevicius et al., arXiv 1710.03740).
FIRST_SCALE, SCALE_PATIENCE = 2.0**15, 1000


class Guard(NamedTuple):
    """Running statistics of (loss, log gradient norm) over `count` steps of the phase, and the loss scale.

    `in_a_row` leaves out overflows that a smaller scale may cure.
    """

    mean: jax.Array  # [2]
    variance: jax.Array  # [2]
    count: jax.Array
    refused: jax.Array  # updates refused in the phase
    in_a_row: jax.Array  # updates refused since the last accepted one
    scale: jax.Array  # multiplies the loss before its gradient is taken; 1 except for fp16
    since_overflow: jax.Array


def start(scaled: bool) -> Guard:
    """Return the guard before the first step of a phase; `scaled` is for fp16."""
    zero = lambda: jnp.zeros((), jnp.int32)
    scale = jnp.asarray(FIRST_SCALE if scaled else 1.0, jnp.float32)
    return Guard(jnp.zeros(2), jnp.zeros(2), zero(), zero(), zero(), scale, zero())


def judge(g: Guard, loss: jax.Array, grad_norm: jax.Array, sigmas: float, scaled: bool) -> tuple[jax.Array, Guard]:
    """Return (True where the update is accepted, the guard after it).

    Outliers are clipped to the bound before they update the running mean and deviation. A single one changes them
    little; a new level that stays widens the bound by about half per step, and is soon accepted.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    seen = jnp.stack([loss, jnp.log(grad_norm + 1e-9)])
    bound = g.mean + (sigmas or math.inf) * jnp.maximum(jnp.sqrt(g.variance), jnp.asarray(FLOOR))
    new = g.count < WARMUP
    ok = finite & (new | (seen <= bound).all())
    keep = jnp.minimum(MEMORY, g.count / (g.count + 1.0))  # a plain mean at first
    delta = jnp.where(new, seen, jnp.minimum(seen, bound)) - g.mean
    mean = jnp.where(finite, g.mean + (1 - keep) * delta, g.mean)
    variance = jnp.where(finite, keep * (g.variance + (1 - keep) * delta**2), g.variance)
    scale, since, curable = g.scale, g.since_overflow, False
    if scaled:
        since, curable = jnp.where(finite, since + 1, 0), ~finite & (scale > 1)
        scale = jnp.where(finite, scale, jnp.maximum(scale / 2, 1.0))
        scale = jnp.where(since >= SCALE_PATIENCE, 2 * scale, scale)
        since = jnp.where(since >= SCALE_PATIENCE, 0, since)
    in_a_row = jnp.where(ok | curable, 0, g.in_a_row + 1)
    return ok, Guard(mean, variance, g.count + finite, g.refused + ~ok, in_a_row, scale, since)
