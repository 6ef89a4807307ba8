"""First weights of a new run from another run: every array whose shape agrees.

A deeper model is filled by block expansion (LLaMA Pro, arXiv 2401.02415, section 3). A layer is followed by a copy with
last factors into the residual stream of zero, as in `network.init`: it starts as the identity, and learns at once.
"""

from typing import NamedTuple

import jax
import numpy as np

from lowrank_jax.config import UsageError
from lowrank_jax.machine import sharding
from lowrank_jax.machine.sharding import path_name

TABLES = ("embed/table", "head/table")
BLOCKS = "blocks/"
# The last factors of a block's outputs into the residual stream: `up` where they are factored, else `kernel`.
OUTPUTS = tuple(f"blocks/{name}/{last}" for name in ("attention/o", "mlp/out") for last in ("kernel", "up"))


class Taken(NamedTuple):
    params: dict  # arrays from the other run are on the host
    taken: tuple[str, ...]  # names such as blocks/attention/q/down
    left: tuple[str, ...]  # lines such as "embed/table: [64, 16] in that run, [64, 32] in this one"
    note: str  # how layers were added, or why none could be taken; empty where the depth is the same


def take(params: dict, source: dict, same_tokens: bool) -> Taken:
    """Return `params` of `network.init` with every array that `source` has under the same name and shape.

    A source with fewer layers is spread by `layer_map`; from a deeper one no block is taken. An untied head starts as a
    tied source's embedding. Without `same_tokens` the tables of embedding and head stay new. Arrays get the dtype of
    those they replace, and share no memory with them or with `source`. Raises UsageError where nothing fits.
    """
    if "head" in params and "head" not in source and "embed" in source:
        source = source | {"head": source["embed"]}
    new, old = _by_name(params), _by_name(source)
    reasons = {name: _misfit(name, new, old, same_tokens) for name in new | old}
    left = tuple(f"{name}: {reason}" for name, reason in reasons.items() if reason)
    taken = tuple(name for name, reason in reasons.items() if not reason)
    if not taken:
        why = left[0] + (f" and {len(left) - 1} more" if len(left) > 1 else "")
        raise UsageError(f"config.init_from: none of that run's weights fits this model ({why}); use its config.model")
    fill = lambda path, x: x if reasons[path_name(path)] else _fill(path_name(path), old[path_name(path)], x)
    return Taken(jax.tree_util.tree_map_with_path(fill, params), taken, left, _note(new, old, reasons))


def describe(taken: Taken) -> str:
    """Return text for the terminal: how much was taken, one line for each array that was not, and the note."""
    sizes = {name: x.size for name, x in _by_name(taken.params).items()}
    count, total = sum(sizes[name] for name in taken.taken), sum(sizes.values())
    head = f"took {len(taken.taken)} of {len(sizes)} arrays, {count:,} of {total:,} parameters"
    return "\n  ".join([head, *(f"not taken: {line}" for line in taken.left), *filter(None, [taken.note])])


def layer_map(n: int, m: int) -> list[int]:
    """Return the source, of `n` layers, for each of `m` >= n layers; repeats of a source are copies.

    Copies are spread evenly and follow their group, as in the paper: 4 layers become 6 as 0 1 1 2 3 3.
    """
    return [((j + 1) * n - 1) // m for j in range(m)]


def _by_name(params: dict) -> dict[str, jax.Array]:
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}


def _misfit(name: str, new: dict, old: dict, same_tokens: bool) -> str:
    """Return why the array cannot be taken, or an empty string."""
    if name not in old:
        return "only in this run"
    if name not in new:
        return "only in that run"
    if name in TABLES and not same_tokens:
        return "its rows are those of another tokenizer"
    before, after = old[name].shape, new[name].shape
    deepens = name.startswith(BLOCKS) and before[1:] == after[1:] and 0 < before[0] < after[0]
    return "" if before == after or deepens else f"{list(before)} in that run, {list(after)} in this one"


def _fill(name: str, old: jax.Array, new: jax.Array) -> np.ndarray:
    """Return a copy of `old` in the dtype and with the layers of `new`; outputs of added layers are zero."""
    x = np.array(sharding.fetch(old), dtype=new.dtype)
    if x.shape == new.shape:
        return x
    layers = np.asarray(layer_map(len(x), len(new)))
    x = x[layers]
    if name in OUTPUTS:
        x[np.diff(layers, prepend=-1) == 0] = 0
    return x


def _note(new: dict, old: dict, reasons: dict[str, str]) -> str:
    blocks = [name for name in reasons if name.startswith(BLOCKS)]
    fitting = [name for name in blocks if not reasons[name]]
    common = [name for name in blocks if name in new and name in old]
    if not common:
        return ""
    n, m = (len(arrays[(fitting or common)[0]]) for arrays in (old, new))
    if n > m:
        return f"{n} layers do not fit into {m}: the blocks keep their random weights"
    if n == m or not fitting:
        return ""
    copies = "each is followed by a copy that starts" if m == 2 * n else f"{m - n} of them added, as copies that start"
    partly = "" if fitting == blocks else "; but not all of a block fits, so it computes something else"
    return f"{n} layers became {m}: {copies} as the identity{partly}"
