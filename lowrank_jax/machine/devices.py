"""What is known of devices: their published peaks, their memory, and the ones to compile for without having them.

A described device is one that only its compiler knows: a program can be compiled for it, and its memory, matmuls and
collectives read from the result (`hlo`), but nothing runs. Its compiler comes in packages of its own
(`pip install "jax[cuda12]"` or `"jax[tpu]"`). They may also be in the folder `aot` of the environment, which nothing
but `topology` looks into: where there is no GPU, the CUDA package in the environment itself makes every program that
uses JAX print that it found none.
"""

import contextlib
import importlib
import importlib.util
import math
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental import topologies

from lowrank_jax.config import UsageError

GIB = 2**30
GPU_SHARE = 0.75  # of a GPU's memory: what JAX takes for itself unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise


class Chip(NamedTuple):
    """Published peaks of one JAX device, which no program reaches: FLOP/s, bytes, bytes/s.

    `peak_flops` is of dense bf16 matmuls (fp16 for a V100, which has no bf16), `memory` and `memory_bandwidth` of HBM.
    `link_bandwidth` is what the device can send to its neighbours in a TPU slice, or to the GPUs of its host: one
    direction, all links together. `host_bandwidth` is what it can send to other hosts; None where they are on the same
    links.
    """

    peak_flops: float
    memory: int
    memory_bandwidth: float
    link_bandwidth: float
    host_bandwidth: float | None = None


# As published by the makers: Google's Cloud TPU pages (memory in GiB; half of the "bidirectional ICI bandwidth per
# chip"; for the v4, whose page has none, six links of 50 GB/s as in its paper, arXiv 2304.01433) and NVIDIA's data
# sheets (memory in GB; half of NVLink's total, half of PCIe 5's for the H100 PCIe, whose NVLink bridge joins no more
# than two). Between hosts a GPU has its share of the network of a DGX-1, DGX A100 or DGX H100: 50, 200, 400 Gbit/s; an
# H100 PCIe comes in machines of many kinds, and is taken to have the best.
# The first key found inside device_kind counts. A TPU7x chip (2307 TFLOP/s, 192 GiB, 7380 and 600 GB/s) is two devices.
# An A100 has 40 or 80 GB, a V100 16 or 32: the smaller is here, and a real one says itself. Of the 16, 95 and 32 GiB of
# a v5e, v5p and v6e a program can have 15.75, 95.73 and 31.24 (the compiler, libtpu 0.0.52, says so when one is too
# large).
CHIPS = {
    "TPU v4": Chip(275e12, 32 * GIB, 1200e9, 300e9),
    "TPU v5 lite": Chip(197e12, 16 * GIB, 819e9, 200e9),
    "TPU v5e": Chip(197e12, 16 * GIB, 819e9, 200e9),
    "TPU v5": Chip(459e12, 95 * GIB, 2765e9, 600e9),
    "TPU v6 lite": Chip(918e12, 32 * GIB, 1638e9, 400e9),
    "TPU v6e": Chip(918e12, 32 * GIB, 1638e9, 400e9),
    "TPU7x": Chip(2307e12 / 2, 96 * GIB, 7380e9 / 2, 600e9 / 2),
    "H100 PCIe": Chip(756e12, 80 * 10**9, 2000e9, 64e9, 50e9),
    "H100": Chip(989e12, 80 * 10**9, 3350e9, 450e9, 50e9),
    "A100": Chip(312e12, 40 * 10**9, 1555e9, 300e9, 25e9),
    "V100": Chip(125e12, 16 * 10**9, 900e9, 150e9, 6.25e9),
}


def chip(device: jax.Device) -> Chip | None:
    return next((chip for name, chip in CHIPS.items() if name in device.device_kind), None)


def peak_flops(device: jax.Device | None = None) -> float | None:
    """bf16 peak of a device (the first one), or None where the chip is not in the table (a CPU, for one)."""
    known = chip(device or jax.devices()[0])
    return known.peak_flops if known else None


# ------------------------------------------------------------------------------------------------------------- memory


def memory_bytes(device: jax.Device) -> int:
    """What a device can give to training: the same number whenever it is asked on the same machine."""
    if device.platform == "cpu":
        return host_memory()
    try:
        stats = device.memory_stats() or {}
    except jax.errors.JaxRuntimeError:  # a described device has none
        stats = {}
    known = chip(device)
    if "bytes_limit" not in stats and known is None:
        raise UsageError(f"the memory of a {device.device_kind!r} is not known; set config.memory_gb")
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return int(GPU_SHARE * known.memory) if device.platform in ("gpu", "cuda") else known.memory


def host_memory(root: pathlib.Path = pathlib.Path("/")) -> int:
    """The machine's memory, or the limit of the process's control group where that is lower.

    All of it and not what is free just now: a run that is resumed must come to the same stages.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *cgroup_limits(root)])


def cgroup_limits(root: pathlib.Path) -> list[int]:
    """Memory limits of the process's control groups, versions 1 and 2, and of the groups that these are in.

    In a container the path to the group may be the host's, and only its end is there to read: a folder that does not
    exist has no limit.
    """
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:  # no Linux
        return []
    limits = []
    for _, controllers, path in groups:
        if controllers == "":
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = pathlib.PurePosixPath(path.lstrip("/"))
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # no such file; `max`, which is no limit
                limits.append(int((mount / folder / name).read_text()))
    return limits


# -------------------------------------------------------------------------------------------------- described devices


# What XLA asks of a GPU, for an H100 SXM: NVIDIA's H100 data sheet (132 multiprocessors at up to 1.98 GHz, 50 MB of L2,
# 80 GB at 3.35 TB/s) and the table of compute capability 9.0 in its CUDA programming guide. The description is what
# device_kind says. Without the version of CUDA, XLA takes it to be 0.0, which has no float8 matmul in cuBLASLt.
H100 = """
device_description_str: "NVIDIA H100 80GB HBM3"
platform_name: "CUDA"
runtime_version { major: 12 minor: 9 }
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3350000000000
  device_memory_size: 80000000000
  l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  shared_memory_per_block: 49152
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  threads_per_warp: 32
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""


class Kind(NamedTuple):
    """Sides of a TPU slice's grid, chips of a whole pod, and a grid for an example."""

    sides: int
    chips: int
    example: str


# `v4` is not among them: the compiler describes its chip as two devices, and a real one is a single device.
TPUS = {"v5e": Kind(2, 256, "4x4"), "v5p": Kind(3, 8960, "4x4x4")}
TPUS |= {"v6e": Kind(2, 256, "4x4"), "tpu7x": Kind(3, 9216, "2x2x1")}
H100S = re.compile(r"h100:([1-8])(?:x([1-9]\d{0,3}))?")  # GPUs of a host, and hosts
TOPOLOGIES = ", ".join(["cpu", *(f"{name}:{kind.example}" for name, kind in TPUS.items()), "h100:8"])
TOPOLOGIES += " or h100:8x4 (4 hosts of 8)"
CUDA_PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
AOT = pathlib.Path(sys.prefix, "aot")


def topology(name: str) -> list[jax.Device]:
    """The devices to compile for: `cpu` are this machine's, the others (as in TOPOLOGIES) are described.

    A TPU's name has the grid of its chips (a chip of a tpu7x is two devices), an H100's its GPUs a host and its hosts.
    Raises UsageError with one line. A process that asks for described devices before it has used one of its own
    computes on its CPU from then on.
    """
    if name == "cpu":
        return jax.devices("cpu")
    description = _parse(name)
    if AOT.is_dir() and str(AOT) not in sys.path:
        sys.path.append(str(AOT))
    extra, modules = ("cuda12", CUDA_PLUGINS) if description["platform"] == "cuda" else ("tpu", ("libtpu",))
    install = f'pip install "jax[{extra}]"'
    installed = [module for module in modules if _is_installed(module)]
    if not installed:
        raise UsageError(f"topology {name}: its compiler is not installed; {install}")
    # libtpu otherwise asks the network what it runs on, and refuses a second process.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        with _quiet(), _on_cpu():
            devices = _describe(description, installed[0])
            _try_compiler(devices[0])
        if description["platform"] == "cuda":
            _describe_cudnn()
    except (RuntimeError, NotImplementedError, ImportError) as e:
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        if "INVALID_ARGUMENT: Topology" in reason:
            raise UsageError(f"topology {name} is no grid of whole hosts ({reason.split(': ', 1)[1]:.200})") from None
        raise UsageError(f"topology {name}: its compiler does not work ({reason:.200}); {install}") from None
    return devices


def _parse(name: str) -> dict:
    """What `get_topology_desc` has to be told. It must not see a side of 0 (libtpu kills the process)."""
    if match := H100S.fullmatch(name):
        gpus, hosts = match[1], match[2] or "1"
        return dict(platform="cuda", topology_name="h100", topology=f"1x{hosts}x{gpus}", target_config=H100)
    prefix, _, grid = name.partition(":")
    if prefix not in TPUS:
        raise UsageError(f"topology {name!r} is not known; use one such as {TOPOLOGIES}")
    kind = TPUS[prefix]
    fits = re.fullmatch(rf"[1-9]\d{{0,3}}(x[1-9]\d{{0,3}}){{{kind.sides - 1}}}", grid)
    chips = math.prod(map(int, grid.split("x"))) if fits else 0
    if not 0 < chips <= kind.chips:
        raise UsageError(
            f"topology {name!r}: a {prefix} slice is a grid of {kind.sides} sides and at most {kind.chips} chips, such "
            f"as {prefix}:{kind.example}"
        )
    # The chips of one host: the compiler's choice, but for a single chip, where some versions say 2x2 and refuse.
    bounds = {"chips_per_host_bounds": [1, 1, 1]} if chips == 1 else {}
    return dict(platform="tpu", topology_name=name) | bounds


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor is the package that it would be in
        return False


def _describe(description: dict, module: str) -> list[jax.Device]:
    try:
        return list(topologies.get_topology_desc(**description).devices)
    except NotImplementedError:
        # JAX starts its plugins once, and drops the CUDA one where there is no driver and JAX_PLATFORMS is not cpu.
        importlib.import_module(module).initialize()
        return list(topologies.get_topology_desc(**description).devices)


def _describe_cudnn() -> None:
    """Lets JAX make programs with cuDNN's attention where there is no cuDNN: as of the version that H100 names.

    JAX asks the library itself, even when it compiles for a described device.
    """
    try:
        cudnn.check_cudnn_version()
    except RuntimeError:
        cudnn.check_cudnn_version = lambda: 91000


def _try_compiler(device: jax.Device) -> None:
    """Compiles a tanh (0.1 s), as CUDA needs more than its plugin: ptxas, and a library for such functions."""
    x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
    jax.jit(jnp.tanh).lower(x).compile()


@contextlib.contextmanager
def _on_cpu() -> Iterator[None]:
    """With JAX_PLATFORMS=cpu, the compilers do not look for their hardware."""
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", "cpu")
    try:
        yield
    finally:
        jax.config.update("jax_platforms", before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without stderr, where the compilers report that their hardware is missing (8 lines for CUDA), at any log level.

    What goes wrong comes as an exception.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
