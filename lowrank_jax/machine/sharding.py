"""How a run is laid out on its devices: one mesh for the whole run, and the part of each array that a device holds.

The mesh has three axes. Rows of a batch are shared out over `data` and `fsdp`; weights and optimizer state over `fsdp`
(each layer's weights are gathered when it runs: ZeRO stage 3, arXiv 1910.02054); heads and the MLP's width over
`tensor` (Megatron, arXiv 1909.08053). Which dimension of a weight goes where is in RULES, and nowhere else.

The rank of a block's factor is never shared out. So a latent [B, T, R] is whole on every device of a `tensor` group,
the down factors of Q, K and V need nothing from other devices, and what the group has to add up in attention is latents
of R numbers a token instead of a dense model's D: the gradients of theirs, and the output's.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lowrank_jax.config import RunConfig, UsageError

AXES = DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
ROWS = (DATA, FSDP)  # the axes that share out the rows of a batch
LANES = 128  # a TPU gathers parts that are less wide by adding them up, which takes twice the traffic
_WIDE = (TENSOR, FSDP)  # both on one dimension: what is left after gathering over fsdp is one piece

# (pattern of a path, axes of its last dimensions): the first that matches counts; dimensions in front are whole.
# They hold for the parameters and for whatever has their shapes and paths: moments, averages. Weights are [in, out].
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


# ---------------------------------------------------------------------------------------------------------- the mesh


def shape(config: RunConfig, stages: Sequence, devices: int) -> tuple[int, int, int]:
    """Devices along data, fsdp and tensor: as in `config.mesh`, with what is 0 there chosen.

    `data` and `fsdp` together are then as many as the rows of every stage can be shared out over, `fsdp` as many of
    these as leave LANES of the width to each, and `tensor` what is left. Raises UsageError in one line where they do
    not come out even.
    """
    rows = math.gcd(*(stage.batch for stage in stages))
    data, fsdp, tensor = config.mesh.data, config.mesh.fsdp, config.mesh.tensor
    given = max(data, 1) * max(fsdp, 1)
    left = max(devices // (given * max(tensor, 1)), 1)
    parts = left if tensor else math.gcd(left, rows // math.gcd(rows, given))
    wide = [n for n in range(1, parts + 1) if parts % n == 0 and config.model.d % (n * LANES) == 0] or [1]
    fsdp = fsdp or (parts if data else wide[-1])
    data = data or max(parts * given // fsdp, 1)
    tensor = tensor or max(devices // (data * fsdp), 1)
    said = f"config.mesh (data={data}, fsdp={fsdp}, tensor={tensor})"
    if data * fsdp * tensor != devices:
        raise UsageError(f"{said} is for {data * fsdp * tensor} devices and there are {devices}; 0 takes what is left")
    if rows % (data * fsdp) or (not config.mesh.tensor and config.model.heads % tensor):
        worst = min(stages, key=lambda stage: math.gcd(stage.batch, devices))
        raise UsageError(
            f"{devices} devices cannot share out the {worst.batch} rows of {worst.name} as {said}; make "
            f"config.{worst.phase}.tokens_per_step a multiple of {devices} x {worst.seq_len}, or set config.mesh"
        )
    return data, fsdp, tensor


def make_mesh(config: RunConfig, stages: Sequence, devices: list[jax.Device]) -> Mesh:
    """The mesh over these devices, here or described; `tensor` groups are the closest neighbours."""
    sizes = shape(config, stages, len(devices))
    if devices[0].platform == "tpu" and len(devices) > 1:  # chips have places in a torus
        return _mesh(mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True))
    return _mesh(np.asarray(devices).reshape(sizes))


def one_device() -> Mesh:
    """The mesh of this process's first device alone, whatever a config says."""
    return _mesh(np.asarray(jax.local_devices()[:1]).reshape(1, 1, 1))


def _mesh(devices: np.ndarray) -> Mesh:
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def row_shards(mesh: Mesh) -> int:
    """In how many parts a batch is: so many rows at least go through the devices at a time."""
    return mesh.shape[DATA] * mesh.shape[FSDP]


def a_device(mesh: Mesh) -> jax.Device:
    """A device to ask for what all have alike: one of this process's, or the first of those that are only described."""
    mine = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    return (mine or list(mesh.devices.flat))[0]


def my_share(mesh: Mesh) -> tuple[int, int]:
    """(which, of how many) equal parts of every batch's rows this process's devices need, in the order of the rows."""
    parts = np.arange(row_shards(mesh)).reshape(mesh.devices.shape[:2])
    needs: dict[int, set[int]] = {}
    for (data, fsdp, _), device in np.ndenumerate(mesh.devices):
        needs.setdefault(device.process_index, set()).add(int(parts[data, fsdp]))
    groups = sorted({tuple(sorted(need)) for need in needs.values()})
    if sum(map(len, groups)) != parts.size or len({len(group) for group in groups}) > 1:
        raise UsageError(f"the mesh {dict(mesh.shape)} cuts the rows of a batch across processes; set config.mesh")
    return groups.index(tuple(sorted(needs[jax.process_index()]))), len(groups)


# ------------------------------------------------------------------------------------------------------- what is where


def path_name(path: tuple) -> str:
    """A leaf's place in a tree as text, such as blocks/attention/q/down."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def of_tree(mesh: Mesh, tree):
    """The sharding of every array of a tree, by RULES; raises ValueError for a path that none of them knows."""

    of = lambda path, x: NamedSharding(mesh, _fitting(mesh.shape, x.shape, axes_of(path, x.ndim)))
    return jax.tree_util.tree_map_with_path(of, tree)


def axes_of(path: tuple, ndim: int) -> tuple:
    """What RULES say of each dimension of the array at `path`."""
    axes = next((axes for pattern, axes in RULES if re.search(pattern, path_name(path))), None)
    if axes is None:
        raise ValueError(f"no rule in sharding.RULES for {path_name(path)}")
    return (None,) * (ndim - len(axes)) + axes


def of_rows(mesh: Mesh, rows: int) -> NamedSharding:
    """The sharding of an array whose first dimension are rows; whole on all devices where they do not come out even."""
    return NamedSharding(mesh, _fitting(mesh.shape, (rows,), (ROWS,)))


def whole(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def spec(shape: tuple[int, ...], *axes) -> PartitionSpec:
    """The axes for an array's first dimensions, without those that do not divide them or are not in the context."""
    return _fitting(jax.sharding.get_abstract_mesh().shape, shape, axes)


def constrain(x: jax.Array, *axes) -> jax.Array:
    """`x` laid out by `spec` on the mesh that the program is made for (`jax.set_mesh`); without one, `x`."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, *axes))


def _fitting(sizes, shape: tuple[int, ...], axes: tuple) -> PartitionSpec:
    kept = []
    for length, names in zip(shape, axes):
        names = (names,) if isinstance(names, str) else tuple(names or ())
        names = tuple(name for name in names if sizes.get(name, 1) > 1)
        while names and length % math.prod(sizes[name] for name in names):
            names = names[:-1]
        kept.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*kept)


def hops_to_first(axes: tuple) -> list[tuple]:
    """Layouts of a stack of arrays that are laid out as `axes` say: from that to whole arrays, an axis at a time.

    (From one step to the next is one all-to-all; XLA makes a gather of two steps at once.)
    """
    without_fsdp = [names if isinstance(names, str | None) else names[0] for names in axes]
    without_fsdp = [None if name == FSDP else name for name in without_fsdp]
    return [(None, *axes), (FSDP, *without_fsdp), ((FSDP, TENSOR),)]


def context_size(*axes: str) -> int:
    """In how many parts the mesh that the program is made for cuts what is laid out along these axes."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in axes)


def microbatches(x_BT: jax.Array, rows: int) -> jax.Array:
    """[B, T] as [n, rows, T]: of each device's own rows so many at a time that together they are `rows`."""
    parts = context_size(*ROWS)
    cut = x_BT.reshape(parts, -1, rows // parts, x_BT.shape[1]).swapaxes(0, 1)
    return constrain(cut.reshape(-1, rows, x_BT.shape[1]), None, ROWS)


# ------------------------------------------------------------------------------------------- between host and devices


def put(x, sharding: NamedSharding) -> jax.Array:
    """A host's array, which every process has whole, on the devices."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def put_rows(mesh: Mesh, mine: np.ndarray, rows: int) -> jax.Array:
    """A batch's array of `rows` rows on the devices, from the ones that `my_share` says are this process's."""
    return jax.make_array_from_process_local_data(of_rows(mesh, rows), mine, (rows, *mine.shape[1:]))


def fetch(x) -> np.ndarray:
    """An array whole on every process's host, wherever its parts are."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


class HostCopy(NamedTuple):
    """The parts of an array that this process's devices had, in host memory."""

    shape: tuple[int, ...]
    sharding: NamedSharding
    parts: dict[str, np.ndarray]


def to_host(x: jax.Array) -> HostCopy:
    return HostCopy(x.shape, x.sharding, {str(shard.index): np.array(shard.data) for shard in x.addressable_shards})


def from_host(copy: HostCopy) -> jax.Array:
    return jax.make_array_from_callback(copy.shape, copy.sharding, lambda index: copy.parts[str(index)])
