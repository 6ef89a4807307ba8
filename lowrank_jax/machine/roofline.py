"""Cost of a compiled step on one device, and the least time that it takes by the chip's published peaks.

All counts come from the program's text (`hlo`), with the number of times that each part runs.
"""

import math
import re

import numpy as np

from lowrank_jax.machine import hlo
from lowrank_jax.machine.devices import Chip
from lowrank_jax.machine.hlo import Collective


def matmul_flops(text: str) -> int:
    """Return the FLOPs of a device's matmuls in a step, 2 per multiply-add: dots, a TPU's convolutions, and cuBLAS.

    They include recomputation. They do not include Pallas kernels and cuDNN calls, such as fused attention.
    """
    return sum(i.home.runs * _flops(i) for i in hlo.running(text) if i.is_matmul)


def _flops(i: hlo.Instruction) -> int:
    lhs, rhs = (operand.arrays[0].dims for operand in i.operands[:2])
    if i.opcode != "convolution":
        contracted = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)', i.rest)[1]
        return 2 * i.arrays[0].size * math.prod(lhs[int(n)] for n in re.findall(r"\d+", contracted))
    inputs, kernel, output = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest).groups()
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", re.search(r"window=\{([^}]*)\}|$", i.rest)[1] or ""))
    products = lhs[inputs.index("b")] * rhs[kernel.index("i")] * rhs[kernel.index("o")]
    products //= math.prod(int(n) for n in re.findall(r"batch_group_count=(\d+)", i.rest))
    for dim in (c for c in inputs if c.isdigit()):
        # A TPU turns batch dimensions of a dot into a window over zeros, which cost no work.
        sizes = {key: window[key].split("x")[int(dim)] for key in window}
        low = int(sizes.get("pad", "0_0").split("_")[0])
        stride, dilate, spread = (int(sizes.get(key, 1)) for key in ("stride", "lhs_dilate", "rhs_dilate"))
        out = np.arange(i.arrays[0].dims[output.index(dim)])[:, None] * stride
        place = out + np.arange(rhs[kernel.index(dim)]) * spread - low
        inside = (place >= 0) & (place <= (lhs[inputs.index(dim)] - 1) * dilate) & (place % dilate == 0)
        products *= int(inside.sum())
    return 2 * products


_FREE = "parameter constant tuple get-tuple-element bitcast while conditional call after-all opt-barrier partition-id"
_FREE = {*_FREE.split(), "replica-id", "async-start", "async-update", "async-done"}  # async: counted in their callees
_FREE |= {"fusion-done"}  # counted where it starts
_SLICES = {"dynamic-slice", "slice", "gather", "slice-start", "dynamic-slice-start"}
_SAME = {"bitcast", "convert", "copy", "reshape", "transpose"}  # each element of the result is one of the operand


def traffic_bytes(text: str) -> float:
    """Return the bytes that a device reads from and writes to HBM in a step: operands and results of instructions.

    A fusion counts as one instruction. Of an operand that is only sliced, and of a result that is updated in place, the
    slice counts (as in XLA's HloCostAnalysis). Arrays in a TPU's VMEM do not count. A GPU's cache is not modelled. A
    Pallas kernel or cuDNN call reads its operands and writes its results once.
    """
    return sum(i.home.runs * _moved(i) for i in hlo.running(text) if not i.home.fused)


def _moved(i: hlo.Instruction) -> float:
    if i.opcode in _FREE or i.target in ("AllocateBuffer", "ConcatBitcast") or "called_computations" in i.calls:
        return 0
    hbm = lambda arrays: sum(array.bytes for array in arrays if not array.on_chip)
    if i.opcode == "fusion":
        return _fusion(i)
    if i.opcode.endswith("-done"):
        return hbm(i.arrays)
    if i.opcode in _SLICES:
        source, part = i.operands[0].arrays[0], i.arrays[len(i.operands) if i.opcode == "slice-start" else 0]
        return part.bytes * (not source.on_chip) + (0 if i.opcode.endswith("-start") else hbm([part]))
    if i.opcode in ("dynamic-update-slice", "scatter"):
        update = i.operands[-1 if i.opcode == "scatter" else 1].arrays[0]
        return hbm([update]) + update.bytes * (not i.arrays[0].on_chip) * (2 if i.opcode == "scatter" else 1)
    results = () if i.opcode.endswith("-start") else i.arrays
    if i.target.startswith("__cu"):
        results = [array for array in results if array.dtype not in ("s8", "u8")]  # not the workspace
    return sum(hbm(operand.arrays) for operand in dict.fromkeys(i.operands)) + hbm(results)


def _fusion(i: hlo.Instruction) -> float:
    inner, moved = i.calls["calls"][0], 0.0
    if inner.has("AsyncCollectiveDone"):
        return 0
    for position, operand in enumerate(i.operands):
        for array in operand.arrays[:1]:
            if array.size and not array.on_chip:
                moved += _read(inner.parameter(position)) * array.bytes / array.size
    if inner.has("AsyncCollectiveStart"):  # its first result is its operand
        return moved + sum(array.bytes for array in i.arrays[1:2] if not array.on_chip)
    is_tuple = inner.root.opcode == "tuple"
    for output, array in zip(inner.root.operands if is_tuple else [inner.root], i.arrays):
        passed = is_tuple and output.opcode == "parameter" or output.continues
        if array.size and not array.on_chip and not passed:
            moved += _written(output) * array.bytes / array.size
    return moved


def _read(i: hlo.Instruction, in_place: bool = False) -> int:
    """Return how many elements the fusion around it needs of an operand, or of an instruction's result."""
    total = i.arrays[0].size if i is i.home.root and not in_place else 0
    uses = [(user, n) for user in i.home.instructions for n, operand in enumerate(user.operands) if operand is i]
    for user, position in uses:
        if user.opcode in _SLICES and position == 0:
            total += user.arrays[0].size
        elif user.opcode == "dynamic-update-slice" and position == 0:
            total += _read(user, True)
        elif user.opcode in _SAME:
            total += _read(user, in_place)
        elif user.opcode == "fusion":
            needs = _read(user.calls["calls"][0].parameter(position), in_place)
            same = len(user.arrays) == 1 and user.arrays[0].size == i.arrays[0].size
            total += min(needs, _read(user, in_place)) if same else needs
        elif not user.continues and not (user.opcode == "tuple" and (in_place or i.opcode == "parameter")):
            total += i.arrays[0].size
    return min(total, i.arrays[0].size)


def _written(output: hlo.Instruction) -> int:
    """Return how many elements of a fusion's result are new."""
    source = output
    while source.opcode in _SAME:
        source = source.operands[0]
    if source.opcode == "fusion" and len(source.arrays) == 1:
        return _written(source.calls["calls"][0].root)
    return (source.operands[1] if source.opcode == "dynamic-update-slice" else output).arrays[0].size


ESTIMATES = ("compute_seconds", "memory_seconds", "network_seconds", "step_seconds", "mfu_bound", "bound")


def estimate(
    chip: Chip | None, flops: float, traffic: float, collectives: list[Collective], per_host: int, model_flops: float
) -> dict:
    """Return the ESTIMATES of a step.

    `flops` (recomputation included), `traffic` (bytes of HBM) and `collectives` are of one device. The step takes as
    long as its slowest part, as if the three overlapped perfectly; a real step is slower, and its MFU below `mfu_bound`
    = `model_flops` / (step x peak). `bound` names the slowest part: compute, memory or network. Devices on one host
    stand together in the mesh, `per_host` of them, or 0 where that is unknown. An unknown chip gives None.
    """
    if chip is None:
        return dict.fromkeys(ESTIMATES)
    seconds = {
        "compute": flops / chip.peak_flops,
        "memory": traffic / chip.memory_bandwidth,
        "network": math.fsum(network_seconds(chip, c, per_host) for c in collectives),
    }
    bound = max(seconds, key=seconds.get)
    step = seconds[bound]
    mfu = model_flops / (step * chip.peak_flops) if step else None
    return dict(zip(ESTIMATES, (*seconds.values(), step, mfu, bound)))


def network_seconds(chip: Chip, c: Collective, per_host: int) -> float:
    """Return the seconds of all runs of a collective at the links' peak, in a ring of n devices, without latency.

    Of B bytes each device sends B (n - 1) / n for an all-gather, a reduce-scatter or an all-to-all, twice that for an
    all-reduce, and B for a permutation. A TPU's group has all of a chip's links, though a group along one axis of the
    torus has only half or a third. A GPUs' group over several hosts is as fast as the network shares of those of its
    members that are on the same host.
    """
    n = len(c.groups[0])
    sent = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1}.get(c.kind, (n - 1) / n)
    bandwidth = chip.link_bandwidth
    if chip.host_bandwidth and per_host:
        hosts = [[device // per_host for device in group] for group in c.groups]
        members = [min(map(group.count, group)) for group in hosts if len(set(group)) > 1]
        bandwidth = min([bandwidth, *(count * chip.host_bandwidth for count in members)])
    return c.times * c.bytes * sent / bandwidth
