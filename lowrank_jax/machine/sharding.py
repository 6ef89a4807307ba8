"""The layout of a run on its devices: one mesh for the whole run, and the part of each array that a device holds.

A batch's rows are split over `data` and `fsdp`. Weights and optimizer state are split over `fsdp`, and each layer's
weights are gathered when it runs (ZeRO stage 3, arXiv 1910.02054). Heads and the MLP's width are split over `tensor`
(Megatron, arXiv 1909.08053). The rank of a block's factor is never split, so a latent [B, T, R] is whole on every
device of a `tensor` group, which sums R numbers per token in attention instead of a dense model's D.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lowrank_jax.config import RunConfig, UsageError
from lowrank_jax.machine import unstable

AXES = DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
ROWS = (DATA, FSDP)  # the axes that split a batch's rows
LANES = 128  # a TPU gathers narrower parts by an all-reduce, which takes twice the traffic
_WIDE = (TENSOR, FSDP)  # both on one dimension: gathering over fsdp leaves one contiguous piece

# (pattern of a path, axes of the last dimensions). The first match counts; the dimensions in front are not split. The
# rules cover the parameters and everything with their shapes and paths: moments, averages. Weights are [in, out].
RULES = (
    (r"(embed|head)/table$", (TENSOR, FSDP)),
    (r"(embed|head)/up$", (None, FSDP)),
    (r"/(q|k|v|gate|up)/down$", (FSDP, None)),
    (r"/(q|k|v|gate|up)/up$", (None, _WIDE)),
    (r"/(q|k|v|gate|up)/kernel$", (FSDP, TENSOR)),
    (r"/(o|out)/down$", (_WIDE, None)),
    (r"/(o|out)/up$", (None, FSDP)),
    (r"/(o|out)/kernel$", (TENSOR, FSDP)),
    (r"norm/gain$", ()),
    (r"(^|/)(step|count|ns_coeffs)$|^guard/", ()),
)


def shape(config: RunConfig, stages: Sequence, devices: int) -> tuple[int, int, int]:
    """Return the sizes of data, fsdp and tensor: those in `config.mesh`, with each 0 replaced by a choice.

    `data` x `fsdp` is the largest divisor of the device count that divides the batch of every stage. `fsdp` takes as
    much of it as keeps d / fsdp a multiple of LANES, and `tensor` takes the other devices. Raises UsageError in one
    line where the devices or rows cannot be split evenly.
    """
    rows = math.gcd(*(stage.batch for stage in stages))
    data, fsdp, tensor = config.mesh.data, config.mesh.fsdp, config.mesh.tensor
    fixed = max(data, 1) * max(fsdp, 1)
    free = max(devices // (fixed * max(tensor, 1)), 1)
    parts = free if tensor else math.gcd(free, rows // math.gcd(rows, fixed))
    wide = [n for n in range(1, parts + 1) if parts % n == 0 and config.model.d % (n * LANES) == 0] or [1]
    fsdp = fsdp or (parts if data else wide[-1])
    data = data or max(parts * fixed // fsdp, 1)
    tensor = tensor or max(devices // (data * fsdp), 1)
    shown = f"config.mesh (data={data}, fsdp={fsdp}, tensor={tensor})"
    if data * fsdp * tensor != devices:
        raise UsageError(f"{shown} is for {data * fsdp * tensor} devices and there are {devices}; 0 takes what is left")
    if rows % (data * fsdp) or (not config.mesh.tensor and config.model.heads % tensor):
        worst = min(stages, key=lambda stage: math.gcd(stage.batch, devices))
        unit = devices * math.lcm(*getattr(config, worst.phase).lengths)
        raise UsageError(
            f"{devices} devices cannot split the {worst.batch} rows of {worst.name} as {shown}; make "
            f"config.{worst.phase}.tokens_per_step a multiple of {unit}, or set config.mesh"
        )
    return data, fsdp, tensor


def make_mesh(config: RunConfig, stages: Sequence, devices: list[jax.Device]) -> Mesh:
    """Return the mesh over these devices, real or described; `tensor` groups are the closest neighbours."""
    sizes = shape(config, stages, len(devices))
    if devices[0].platform == "tpu" and len(devices) > 1:  # chips have places in a torus
        mesh_utils = unstable.part("jax.experimental.mesh_utils")
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        placed = np.asarray(devices).reshape(sizes)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * 3)


def one_device() -> Mesh:
    """Return the mesh of this process's first device alone, whatever a config says."""
    return Mesh(np.asarray(jax.local_devices()[:1]).reshape(1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)


def row_shards(mesh: Mesh) -> int:
    """Return the number of parts that a batch's rows are split into; a microbatch has at least as many rows."""
    return mesh.shape[DATA] * mesh.shape[FSDP]


def a_device(mesh: Mesh) -> jax.Device:
    """Return a device that stands for all: this process's first, or the first of a described mesh."""
    local = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    return (local or list(mesh.devices.flat))[0]


def my_share(mesh: Mesh) -> tuple[int, int]:
    """Return (index, count): this process's devices need part `index` of `count` equal parts of every batch's rows."""
    parts = np.arange(row_shards(mesh)).reshape(mesh.devices.shape[:2])
    needs: dict[int, set[int]] = {}
    for (data, fsdp, _), device in np.ndenumerate(mesh.devices):
        needs.setdefault(device.process_index, set()).add(int(parts[data, fsdp]))
    groups = sorted({tuple(sorted(need)) for need in needs.values()})
    if sum(map(len, groups)) != parts.size or len({len(group) for group in groups}) > 1:
        raise UsageError(f"the mesh {dict(mesh.shape)} splits the rows of a batch across processes; set config.mesh")
    return groups.index(tuple(sorted(needs[jax.process_index()]))), len(groups)


def path_name(path: tuple) -> str:
    """Return a leaf's place in a tree as text, such as blocks/attention/q/down."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def of_tree(mesh: Mesh, tree):
    """Return the sharding of every array of a tree, by RULES; raises ValueError for a path that no rule matches."""
    of_leaf = lambda path, x: NamedSharding(mesh, _fitting(mesh.shape, x.shape, axes_of(path, x.ndim)))
    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def axes_of(path: tuple, ndim: int) -> tuple:
    """Return the axes that RULES give each dimension of the array at `path`."""
    axes = next((axes for pattern, axes in RULES if re.search(pattern, path_name(path))), None)
    if axes is None:
        raise ValueError(f"no rule in sharding.RULES for {path_name(path)}")
    return (None,) * (ndim - len(axes)) + axes


def of_rows(mesh: Mesh, rows: int) -> NamedSharding:
    """Return the sharding of an array whose first dimension are rows; rows that do not divide evenly are replicated."""
    return NamedSharding(mesh, _fitting(mesh.shape, (rows,), (ROWS,)))


def whole(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device has whole."""
    return NamedSharding(mesh, PartitionSpec())


def spec(shape: tuple[int, ...], *axes) -> PartitionSpec:
    """Return the axes for an array's first dimensions, without those that do not divide them or are not in context."""
    return _fitting(jax.sharding.get_abstract_mesh().shape, shape, axes)


def constrain(x: jax.Array, *axes) -> jax.Array:
    """Lay out `x` by `spec` on the mesh of the context (`jax.set_mesh`); without one, return `x`."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, *axes))


def _fitting(sizes, shape: tuple[int, ...], axes: tuple) -> PartitionSpec:
    fitting = []
    for length, names in zip(shape, axes):
        names = (names,) if isinstance(names, str) else tuple(names or ())
        names = tuple(name for name in names if sizes.get(name, 1) > 1)
        while names and length % math.prod(sizes[name] for name in names):
            names = names[:-1]
        fitting.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*fitting)


def hops_to_first(axes: tuple) -> list[tuple]:
    """Return layouts of a stack of arrays, from `axes` for each array to whole arrays that are split over the stack.

    Each step changes one axis and so is a single all-to-all; for two axes at once XLA would gather.
    """
    without_fsdp = [names if isinstance(names, str | None) else names[0] for names in axes]
    without_fsdp = [None if name == FSDP else name for name in without_fsdp]
    return [(None, *axes), (FSDP, *without_fsdp), ((FSDP, TENSOR),)]


def context_size(*axes: str) -> int:
    """Return the number of parts that the mesh of the context splits a dimension into along these axes."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in axes)


def microbatches(x_BT: jax.Array, rows: int) -> jax.Array:
    """Reshape [B, T] to [n, rows, T], so that every microbatch takes equally many of each device's own rows."""
    parts = context_size(*ROWS)
    cut = x_BT.reshape(parts, -1, rows // parts, x_BT.shape[1]).swapaxes(0, 1)
    return constrain(cut.reshape(-1, rows, x_BT.shape[1]), None, ROWS)


def put(x, sharding: NamedSharding) -> jax.Array:
    """Put an array, which every process has whole, onto the devices."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def put_rows(mesh: Mesh, my_rows: np.ndarray, rows: int) -> jax.Array:
    """Put a batch's array of `rows` rows onto the devices, from each process's `my_share` of them."""
    return jax.make_array_from_process_local_data(of_rows(mesh, rows), my_rows, (rows, *my_rows.shape[1:]))


def fetch(x) -> np.ndarray:
    """Return a whole array on every process's host, wherever its parts are."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    multihost_utils = unstable.part("jax.experimental.multihost_utils")
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def to_host(x: jax.Array) -> Callable[[], jax.Array]:
    """Copy the parts of an array on this process's devices to host memory; return a function that puts them back."""
    parts = {str(shard.index): np.array(shard.data) for shard in x.addressable_shards}
    return functools.partial(jax.make_array_from_callback, x.shape, x.sharding, lambda index: parts[str(index)])
