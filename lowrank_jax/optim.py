"""Optimizers, without their learning rate: `train_step` multiplies that in, so no schedule hides in their state.

Muon for the blocks' matrices with AdamW (with Nesterov momentum) for embedding and norms, or AdamW for everything.
Weight decay acts on the blocks' matrices alone.
"""

import re

import jax
import optax
from optax import contrib

from lowrank_jax.config import OptimConfig, PhaseConfig, UsageError
from lowrank_jax.sharding import path_name

# Moonlight (arXiv 2502.16982, section 2.2): with updates scaled to 0.2 sqrt(max(rows, columns)) their size matches
# AdamW's, so that one learning rate serves both.
MUON_UPDATE_RMS = 0.2


def make(c: OptimConfig) -> optax.GradientTransformation:
    """A transformation whose updates, times the learning rate, are to be added to the parameters."""
    if c.name == "muon":
        rule = contrib.muon(
            learning_rate=1.0,
            beta=c.beta1,
            weight_decay=c.weight_decay,
            adam_b1=c.beta1,
            adam_b2=c.beta2,
            consistent_rms=MUON_UPDATE_RMS,
            muon_weight_dimension_numbers=_matrices,
        )
    else:
        is_matrix = lambda params: jax.tree.map(lambda x: x is not None, _matrices(params), is_leaf=_is_leaf)
        rule = optax.adamw(1.0, b1=c.beta1, b2=c.beta2, weight_decay=c.weight_decay, mask=is_matrix)
    return optax.chain(optax.clip_by_global_norm(c.clip) if c.clip else optax.identity(), rule)


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
        return contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2) if in_block else None

    return jax.tree_util.tree_map_with_path(axes, params)


def _is_leaf(x) -> bool:
    return x is None or isinstance(x, contrib.MuonDimensionNumbers)
