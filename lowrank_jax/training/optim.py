"""Optimizers, without their learning rate: `train_step` multiplies that in, so no schedule hides in their state.

Muon for the blocks' matrices with AdamW (with Nesterov momentum) for embedding and norms, or AdamW for everything.
Weight decay acts on the blocks' matrices alone.
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

# Moonlight (arXiv 2502.16982, section 2.2): with updates scaled to 0.2 sqrt(max(rows, columns)) their size matches
# AdamW's, so that one learning rate serves both.
MUON_UPDATE_RMS = 0.2
MATRICES = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)  # of a stack [layer, in, out]


def make(c: OptimConfig) -> optax.GradientTransformation:
    """A transformation whose updates, times the learning rate, are to be added to the parameters."""
    adamw = lambda decay, **more: optax.adamw(1.0, b1=c.beta1, b2=c.beta2, weight_decay=decay, **more)
    if c.name == "muon":
        matrices = optax.chain(
            contrib.scale_by_muon(beta=c.beta1, ns_steps=0, weight_dimension_numbers=_matrices),  # the momentum alone
            optax.stateless(lambda updates, _: _orthogonalized(updates)),
            optax.add_decayed_weights(c.weight_decay),
            optax.scale(-1.0),
        )
        kinds = lambda params: jax.tree.map(lambda m: "muon" if m else "adam", _matrices(params), is_leaf=_is_leaf)
        rule = optax.partition({"muon": matrices, "adam": adamw(0.0, nesterov=True)}, kinds)
    else:
        is_matrix = lambda params: jax.tree.map(lambda x: x is not None, _matrices(params), is_leaf=_is_leaf)
        rule = adamw(c.weight_decay, mask=is_matrix)
    return optax.chain(optax.clip_by_global_norm(c.clip) if c.clip else optax.identity(), rule)


def _orthogonalized(momenta: dict) -> dict:
    """U V^T of the momentum of every layer's matrices, by Newton-Schulz, in the size of MUON_UPDATE_RMS.

    On a mesh, matrices of one shape and layout are stacked, and each device takes some of them whole: they are
    exchanged once there and once back. (XLA, left to itself, gathers what is cut in each of the five iterations: 1.5 GB
    a step for configs/custom.py on 16 chips.)
    """
    groups: dict[tuple, dict] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(momenta):
        _, *axes = sharding.axes_of(path, x.ndim)
        tall = x.shape[1] > x.shape[2]
        if tall:
            x, axes = x.swapaxes(1, 2), axes[::-1]
        alone = path if sharding.context_size(FSDP, TENSOR) == 1 else ()  # then a stack would be a copy for nothing
        groups.setdefault((alone, x.shape, tuple(axes)), {})[path] = x, tall
    done = {}
    for (_, _, axes), members in groups.items():
        stack = _newton_schulz(jnp.concatenate([x for x, _ in members.values()]), axes)
        for (path, (_, tall)), x in zip(members.items(), jnp.split(stack, len(members))):
            done[path] = x.swapaxes(1, 2) if tall else x
    return jax.tree_util.tree_map_with_path(lambda path, _: done[path], momenta)


@functools.partial(jax.jit, static_argnums=1)  # traced once for all matrices of a shape
def _newton_schulz(x_MIJ: jax.Array, axes: tuple) -> jax.Array:
    """Of M matrices, laid out as `axes` says of each."""
    count, rows, columns = x_MIJ.shape
    x_MIJ = jnp.pad(x_MIJ, ((0, -count % sharding.context_size(FSDP, TENSOR)), (0, 0), (0, 0)))
    hops = sharding.hops_to_first(axes)
    for layout in hops:
        x_MIJ = sharding.constrain(x_MIJ, *layout)
    rule = contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=MATRICES)  # of this update alone
    x_MIJ, _ = rule.update(x_MIJ, rule.init(x_MIJ))
    for layout in reversed(hops):
        x_MIJ = sharding.constrain(x_MIJ, *layout)
    return MUON_UPDATE_RMS * max(rows, columns) ** 0.5 * x_MIJ[:count]


def rates(p: PhaseConfig, params: dict) -> dict:
    """For each parameter, its learning rate as a multiple of the phase's: 0 where `freeze` matches its path.

    Raises UsageError where `freeze` matches nothing or everything.
    """

    def rate(path, _) -> float:
        if p.freeze and re.search(p.freeze, path_name(path)):
            return 0.0
        return ((p.lr_core if path[0].key == "blocks" else p.lr_head) or p.lr) / p.lr

    by_path = jax.tree_util.tree_map_with_path(rate, params)
    frozen = jax.tree.leaves(jax.tree.map(lambda r: r == 0, by_path))
    if p.freeze and not any(frozen):
        names = ", ".join(path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params))
        raise UsageError(f"freeze={p.freeze!r} matches none of the weights, which are {names}")
    if all(frozen):
        raise UsageError(f"freeze={p.freeze!r} matches every weight: nothing would be trained")
    return by_path


def _matrices(params: dict) -> dict:
    """For each parameter, which axes a block's stacked matrix [layer, in, out] has, or None for all others."""

    def axes(path, x):
        in_block = path[0].key == "blocks" and x.ndim == 3
        return MATRICES if in_block else None

    return jax.tree_util.tree_map_with_path(axes, params)


def _is_leaf(x) -> bool:
    return x is None or isinstance(x, contrib.MuonDimensionNumbers)
