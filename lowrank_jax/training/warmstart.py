"""First weights of a new run from those of another: array by array where shapes agree, and into a deeper model.

A deeper model is filled by block expansion (LLaMA Pro, arXiv 2401.02415, section 3): behind a layer comes a copy of it
whose outputs into the residual stream are zero, so that the copy starts as the identity and the network computes what
it did. The copy learns from the first step on, as only its last factors are zero and they have a gradient: `model.init`
starts every block in this way.
"""

from typing import NamedTuple

import jax
import numpy as np

from lowrank_jax.config import UsageError
from lowrank_jax.machine import sharding
from lowrank_jax.machine.sharding import path_name

TABLES = ("embed/table", "head/table")
BLOCKS = "blocks/"
# The last factors of what a block adds to the residual stream: `up` where it is factored, `kernel` where not.
OUTPUTS = tuple(f"blocks/{name}/{last}" for name in ("attention/o", "mlp/out") for last in ("kernel", "up"))


class Taken(NamedTuple):
    params: dict  # arrays that were taken are on the host
    taken: tuple[str, ...]  # names such as blocks/attention/q/down
    left: tuple[str, ...]  # lines such as "embed/table: [64, 16] there, [64, 32] here"
    note: str  # how layers were added, or why none could be taken; empty where the depth is the same


def take(params: dict, source: dict, same_tokens: bool) -> Taken:
    """`params`, as `model.init` made them, with every array that `source` has under the same name and shape.

    A `source` with fewer layers [n] than `params` [m] gives its layers to `layer_map(n, m)`, and the added ones start
    as the identity; of a deeper one no block is taken. A head of its own starts as a tied source's embedding. Without
    `same_tokens` the tables of embedding and head stay new: their rows would be those of other tokens. What is taken
    gets the dtype of what it replaces, and shares no memory with it or with `source`. Where some arrays of the blocks
    do not fit, the others are still taken, layer by layer in the same way; the added layers are identities even then,
    as `model.init` starts the outputs that did not fit at zero.

    Shapes do not tell everything: other `heads` or another `latent_norm` do other things with the same arrays.
    Raises UsageError where nothing fits.
    """
    if "head" in params and "head" not in source and "embed" in source:
        source = source | {"head": source["embed"]}
    here, there = _by_name(params), _by_name(source)
    reasons = {name: _misfit(name, here, there, same_tokens) for name in here | there}
    left = tuple(f"{name}: {reason}" for name, reason in reasons.items() if reason)
    taken = tuple(name for name, reason in reasons.items() if not reason)
    if not taken:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise UsageError(
            f"config.init_from: none of that run's weights fits this model ({left[0]}{more}); set config.model as there"
        )
    fill = lambda name, x: x if reasons[name] else _fill(name, there[name], x)
    new = jax.tree_util.tree_map_with_path(lambda path, x: fill(path_name(path), x), params)
    return Taken(new, taken, left, _note(here, there, reasons))


def describe(taken: Taken) -> str:
    """For the person who watches: how much was taken, one line for each array that was not, and the note."""
    sizes = {name: x.size for name, x in _by_name(taken.params).items()}
    got, total = sum(sizes[name] for name in taken.taken), sum(sizes.values())
    head = f"took {len(taken.taken)} of {len(sizes)} arrays, {got:,} of {total:,} parameters"
    lines = [f"not taken: {line}" for line in taken.left] + ([taken.note] if taken.note else [])
    return "\n  ".join([head, *lines])


def layer_map(n: int, m: int) -> list[int]:
    """For each of `m` layers, which of `n` <= m it is made from: in order, the first of each is it, the rest copies.

    Copies are spread evenly and come late: 4 layers become 6 as 0 1 1 2 3 3, two groups each with one on top, as in
    the paper.
    """
    return [((j + 1) * n - 1) // m for j in range(m)]


def _by_name(params: dict) -> dict[str, jax.Array]:
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}


def _misfit(name: str, here: dict, there: dict, same_tokens: bool) -> str:
    """Why the array cannot be taken, or nothing."""
    if name not in there:
        return "here only"
    if name not in here:
        return "there only"
    if name in TABLES and not same_tokens:
        return "its rows are those of another tokenizer"
    old, new = there[name].shape, here[name].shape
    return "" if old == new or _deepens(name, old, new) else f"{list(old)} there, {list(new)} here"


def _deepens(name: str, old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    return name.startswith(BLOCKS) and len(old) == len(new) and old[1:] == new[1:] and 0 < old[0] < new[0]


def _fill(name: str, old: jax.Array, new: jax.Array) -> np.ndarray:
    """A copy of `old` in the dtype and with the layers of `new`; outputs of added layers are zero."""
    x = np.array(sharding.fetch(old), dtype=new.dtype)
    if x.shape == new.shape:
        return x
    layers = np.asarray(layer_map(len(x), len(new)))
    x = x[layers]
    if name in OUTPUTS:
        x[np.diff(layers, prepend=-1) == 0] = 0
    return x


def _note(here: dict, there: dict, reasons: dict[str, str]) -> str:
    """What became of the layers, where the two models have different numbers of them."""
    blocks = [name for name in reasons if name.startswith(BLOCKS)]
    fitting = [name for name in blocks if not reasons[name]]
    common = [name for name in blocks if name in here and name in there]
    if not common:
        return ""
    n, m = (len(arrays[(fitting or common)[0]]) for arrays in (there, here))
    if n > m:
        return f"{n} layers do not go into {m}: the blocks start anew"
    if n == m or not fitting:
        return ""
    copies = "each is followed by a copy that starts" if m == 2 * n else f"{m - n} of them added, as copies that start"
    kept = "" if len(fitting) == len(blocks) else "; but not all of a block fits, so it computes something else"
    return f"{n} layers became {m}: {copies} as the identity{kept}"
