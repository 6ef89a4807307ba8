"""Optimizers, and what changes with the global step: the learning rate, and the decay of the weights' moving average.

`train_step` multiplies the learning rate in, so no schedule hides in an optimizer's state.
"""

import functools
import re

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from lowrank_jax.config import OptimConfig, PhaseConfig, UsageError
from lowrank_jax.machine import sharding
from lowrank_jax.machine.sharding import FSDP, TENSOR, path_name
from lowrank_jax.training.plan import Stage

# Updates scaled to 0.2 sqrt(max(rows, columns)) are as large as AdamW's, so that one learning rate serves both
# (Moonlight, arXiv 2502.16982, section 2.2).
MUON_UPDATE_RMS = 0.2
MATRICES = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)  # of a stack [layer, in, out]


def make(c: OptimConfig) -> optax.GradientTransformation:
    """Return a transformation whose updates, times the learning rate, are added to the parameters.

    Either Muon for the blocks' matrices and AdamW (with Nesterov momentum) for embedding and norms, or AdamW for all.
    Weight decay acts only on the blocks' matrices.
    """
    is_matrix = lambda path, x: path[0].key == "blocks" and x.ndim == 3  # a stack [layer, in, out]
    adamw = lambda decay, **more: optax.adamw(1.0, b1=c.beta1, b2=c.beta2, weight_decay=decay, **more)
    if c.name == "muon":
        axes = lambda matrices: jax.tree.map(lambda _: MATRICES, matrices)
        matrices = optax.chain(
            contrib.scale_by_muon(beta=c.beta1, ns_steps=0, weight_dimension_numbers=axes),  # only the momentum
            optax.stateless(lambda updates, _: _orthogonalized(updates)),
            optax.add_decayed_weights(c.weight_decay),
            optax.scale(-1.0),
        )
        kind = lambda path, x: "muon" if is_matrix(path, x) else "adam"
        kinds = functools.partial(jax.tree_util.tree_map_with_path, kind)
        rule = optax.partition({"muon": matrices, "adam": adamw(0.0, nesterov=True)}, kinds)
    else:
        rule = adamw(c.weight_decay, mask=functools.partial(jax.tree_util.tree_map_with_path, is_matrix))
    return optax.chain(optax.clip_by_global_norm(c.clip) if c.clip else optax.identity(), rule)


def _orthogonalized(momenta: dict) -> dict:
    """Return U V^T of the momentum of every layer's matrices, by Newton-Schulz, scaled to MUON_UPDATE_RMS.

    On a mesh, matrices with one shape and layout are stacked and exchanged, so that each device computes whole
    matrices, and exchanged back. (XLA would gather sharded matrices in each of the five iterations: 1.5 GB per step for
    configs/custom.py on 16 chips.)
    """
    groups: dict[tuple, dict] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(momenta):
        _, *axes = sharding.axes_of(path, x.ndim)
        tall = x.shape[1] > x.shape[2]
        if tall:
            x, axes = x.swapaxes(1, 2), axes[::-1]
        single = path if sharding.context_size(FSDP, TENSOR) == 1 else ()  # on one device a stack is a useless copy
        groups.setdefault((single, x.shape, tuple(axes)), {})[path] = x, tall
    done = {}
    for (_, _, axes), members in groups.items():
        stack = _newton_schulz(jnp.concatenate([x for x, _ in members.values()]), axes)
        for (path, (_, tall)), x in zip(members.items(), jnp.split(stack, len(members))):
            done[path] = x.swapaxes(1, 2) if tall else x
    return jax.tree_util.tree_map_with_path(lambda path, _: done[path], momenta)


@functools.partial(jax.jit, static_argnums=1)  # traced once per shape
def _newton_schulz(x_MIJ: jax.Array, axes: tuple) -> jax.Array:
    """Orthogonalise M matrices, each laid out along `axes`."""
    count, rows, columns = x_MIJ.shape
    x_MIJ = jnp.pad(x_MIJ, ((0, -count % sharding.context_size(FSDP, TENSOR)), (0, 0), (0, 0)))
    hops = sharding.hops_to_first(axes)
    for layout in hops:
        x_MIJ = sharding.constrain(x_MIJ, *layout)
    rule = contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=MATRICES)  # no momentum
    x_MIJ, _ = rule.update(x_MIJ, rule.init(x_MIJ))
    for layout in reversed(hops):
        x_MIJ = sharding.constrain(x_MIJ, *layout)
    return MUON_UPDATE_RMS * max(rows, columns) ** 0.5 * x_MIJ[:count]


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
    """Return the decay of the weights' moving average: (1 + k) / (10 + k) at step k of the phase, and at most `ema`.

    With `ema` from the first step on, the phase's first weights would stay in the average for 1 / (1 - ema) steps.
    """
    k = jnp.asarray(step - stage.phase_start, jnp.float32)
    return jnp.minimum(ema, (1 + k) / (10 + k))


def rates(p: PhaseConfig, params: dict) -> dict:
    """Return each parameter's learning rate as a multiple of the phase's: 0 where `freeze` matches its path.

    Raises UsageError where `freeze` matches nothing or everything.
    """
    is_frozen = lambda path: p.freeze and re.search(p.freeze, path_name(path))
    own = lambda path: (p.lr_core if path[0].key == "blocks" else p.lr_head) or p.lr
    rate = lambda path, _: 0.0 if is_frozen(path) else own(path) / p.lr
    by_path = jax.tree_util.tree_map_with_path(rate, params)
    frozen = [rate == 0 for rate in jax.tree.leaves(by_path)]
    if p.freeze and not any(frozen):
        names = ", ".join(path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params))
        raise UsageError(f"freeze={p.freeze!r} matches none of the weights, which are {names}")
    if all(frozen):
        raise UsageError(f"freeze={p.freeze!r} matches every weight: nothing would be trained")
    return by_path
