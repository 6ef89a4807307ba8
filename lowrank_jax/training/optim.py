"""Optimizers without a learning rate: `train_step` multiplies it in, so no schedule hides in their state.

Either Muon for the blocks' matrices and AdamW (with Nesterov momentum) for embedding and norms, or AdamW for all.
Weight decay acts only on the blocks' matrices.
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

# Updates scaled to 0.2 sqrt(max(rows, columns)) are as large as AdamW's, so that one learning rate serves both
# (Moonlight, arXiv 2502.16982, section 2.2).
MUON_UPDATE_RMS = 0.2
MATRICES = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)  # of a stack [layer, in, out]


def make(c: OptimConfig) -> optax.GradientTransformation:
    """Return a transformation whose updates, times the learning rate, are added to the parameters."""
    adamw = lambda decay, **more: optax.adamw(1.0, b1=c.beta1, b2=c.beta2, weight_decay=decay, **more)
    if c.name == "muon":
        axes = lambda params: jax.tree.map(lambda is_matrix: MATRICES if is_matrix else None, _is_matrix(params))
        matrices = optax.chain(
            contrib.scale_by_muon(beta=c.beta1, ns_steps=0, weight_dimension_numbers=axes),  # only the momentum
            optax.stateless(lambda updates, _: _orthogonalized(updates)),
            optax.add_decayed_weights(c.weight_decay),
            optax.scale(-1.0),
        )
        kinds = lambda params: jax.tree.map(lambda is_matrix: "muon" if is_matrix else "adam", _is_matrix(params))
        rule = optax.partition({"muon": matrices, "adam": adamw(0.0, nesterov=True)}, kinds)
    else:
        rule = adamw(c.weight_decay, mask=_is_matrix)
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


def _is_matrix(params: dict) -> dict:
    """Return True for each stacked matrix [layer, in, out] of the blocks, and False for all other parameters."""
    return jax.tree_util.tree_map_with_path(lambda path, x: path[0].key == "blocks" and x.ndim == 3, params)
