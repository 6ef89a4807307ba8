"""Which updates are refused: those of a loss or gradient that is not finite, or far above what it has been lately.

Pure functions over a handful of numbers that travel in the train state, so that a resumed run refuses the same updates
as one that was not interrupted. fp16's loss scale is here too, as it moves with the same verdict (looked at: flax's
DynamicScale, which scales but cannot refuse a spike).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

MEMORY = 0.98  # of the running mean and variance: about 50 steps
WARMUP = 50  # steps before a spike can be told from noise
# Least deviation of the loss in nats and of the log of the gradient norm, as a mixture's batches differ more than fifty
# of them show: with 8 deviations a gradient must be at least 7 times its usual size. (0.02, 0.1) refused one good SFT
# batch of the quickstart.
FLOOR = (0.1, 0.25)

# fp16: halved where a gradient overflows, doubled after so many steps without (Micikevicius et al., arXiv 1710.03740).
FIRST_SCALE, SCALE_PATIENCE = 2.0**15, 1000


class Guard(NamedTuple):
    """Running statistics of (loss, log gradient norm) over `count` steps of the phase, and the loss scale.

    Updates refused in the phase and in a row are counted, the latter without overflows that a smaller scale may cure.
    """

    mean: jax.Array  # [2]
    variance: jax.Array  # [2]
    count: jax.Array
    refused: jax.Array
    in_a_row: jax.Array
    scale: jax.Array  # of the loss before its gradient is taken; 1 but for fp16
    since_overflow: jax.Array


def start(scaled: bool) -> Guard:
    """Before the first step of a phase; `scaled` is for fp16."""
    zero = lambda: jnp.zeros((), jnp.int32)
    scale = jnp.asarray(FIRST_SCALE if scaled else 1.0, jnp.float32)
    return Guard(jnp.zeros(2), jnp.zeros(2), zero(), zero(), zero(), scale, zero())


def judge(g: Guard, loss: jax.Array, grad_norm: jax.Array, sigmas: float, scaled: bool) -> tuple[jax.Array, Guard]:
    """(whether to make the update, the guard after it).

    A spike enters the statistics as the bound that it broke: one alone moves them little, while a level that stays
    widens the bound by half a step and is accepted within a few.
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
