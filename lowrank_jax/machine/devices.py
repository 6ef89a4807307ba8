"""Devices: their published peaks, their memory, and descriptions of devices to compile for without owning them.

JAX can compile a program for a described device; nothing runs. The compilers are packages (`pip install "jax[cuda13]"`
or `"jax[tpu]"`). They may also lie in the environment's folder `aot`, which only `topology` reads: on a machine without
a GPU, an installed CUDA package makes every program that uses JAX print a warning.
"""

import contextlib
import difflib
import importlib
import importlib.util
import math
import os
import pathlib
import re
import sys
import tomllib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowrank_jax.config import UsageError
from lowrank_jax.machine import unstable

GPU_SHARE = 0.75  # share of a GPU's memory that JAX reserves unless XLA_PYTHON_CLIENT_MEM_FRACTION is set


class Chip(NamedTuple):
    """Published peaks of one JAX device, which no program reaches, in FLOP/s, bytes and bytes/s.

    `peak_flops` is for dense bf16 matmuls (fp16 on a V100, which has no bf16). `memory` is HBM. `link_bandwidth` is the
    sum of all links to the neighbours in a TPU slice, or to the GPUs of the same host, in one direction.
    `host_bandwidth` is the rate to other hosts, or None where the same links reach them.
    """

    peak_flops: float
    memory: int
    memory_bandwidth: float
    link_bandwidth: float
    host_bandwidth: float | None = None


_TABLES = tomllib.loads(pathlib.Path(__file__).with_name("devices.toml").read_text(encoding="utf-8"))
CHIPS = {name: Chip(**peaks) for name, peaks in _TABLES["chips"].items()}
TPUS = _TABLES["slices"]


def chip(device: jax.Device) -> Chip | None:
    """Return the device's published peaks, or None for a chip that is not in CHIPS."""
    return next((chip for name, chip in CHIPS.items() if name in device.device_kind), None)


def memory_bytes(device: jax.Device) -> int:
    """Return the bytes that a device can give to training. The number never changes on the same machine."""
    if device.platform == "cpu":
        return host_memory()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # a described device reports nothing
        if limit := (device.memory_stats() or {}).get("bytes_limit"):
            return limit
    known = chip(device)
    if known is None:
        raise UsageError(f"the memory of a {device.device_kind!r} is unknown; set config.memory_gb")
    return int(GPU_SHARE * known.memory) if device.platform in ("gpu", "cuda") else known.memory


def host_memory(root: pathlib.Path = pathlib.Path("/")) -> int:
    """Return the machine's memory, or the lowest limit of the process's control groups and their parent groups.

    Free memory would change between runs, and a resumed run must choose the same stages. In a container, the path of a
    group may be the host's path. A folder that does not exist has no limit.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        groups = []
    for _, controllers, path in (line.split(":", 2) for line in groups):
        if controllers == "":  # version 2 of control groups
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = pathlib.PurePosixPath(path.lstrip("/"))
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # a missing file, or the word `max`
                limits.append(int((mount / folder / name).read_text()))
    return min(limits)


H100 = pathlib.Path(__file__).with_name("h100.txtpb")  # a description for XLA
GPUS = _TABLES["gpus"]  # what differs from it in the descriptions of others
PER_HOST, MOST_HOSTS = 8, 9999  # of GPUs
EXAMPLES = ["cpu", *(f"{name}:{slices['example']}" for name, slices in TPUS.items()), *(f"{gpu}:8" for gpu in GPUS)]
TOPOLOGIES = f"{', '.join(EXAMPLES)} or h100:8x4 (4 hosts of 8); v5litepod-16 and 8xh100 are understood, too"
COMPILERS = {"cuda": ("cuda13", ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")), "tpu": ("tpu", ("libtpu",))}
AOT = pathlib.Path(sys.prefix, "aot")


def topology(name: str) -> list[jax.Device]:
    """Return the devices to compile for: `cpu` is this machine, every other name describes devices.

    A TPU's name ends in its grid of chips (a tpu7x chip is two devices), an H100's in its GPUs per host and its hosts.
    Raises UsageError in one line. Afterwards the process computes on its CPU, unless it used another device before.
    """
    if (name := standard_name(name)) == "cpu":
        return jax.devices("cpu")
    description = _parse(name)
    if AOT.is_dir() and str(AOT) not in sys.path:
        sys.path.append(str(AOT))
    extra, modules = COMPILERS[description["platform"]]
    install = f'pip install "jax[{extra}]"'
    for module in modules:
        with contextlib.suppress(ModuleNotFoundError):  # the package around it is missing
            if importlib.util.find_spec(module):
                break
    else:
        raise UsageError(f"topology {name}: its compiler is not installed; {install}")
    # Without these, libtpu asks the network about its hardware and refuses a second process.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        with _without_hardware():
            devices = _describe(description, module)
            _try_compiler(devices[0])
        if description["platform"] == "cuda":
            _assume_cudnn(GPUS[description["topology_name"]].get("cuda_compute_capability", 9))
    except (RuntimeError, NotImplementedError, ImportError) as e:
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        if "INVALID_ARGUMENT: Topology" in reason:
            raise UsageError(f"topology {name} is no grid of whole hosts ({reason.split(': ', 1)[1]:.200})") from None
        raise UsageError(f"topology {name}: its compiler does not work ({reason:.200}); {install}") from None
    return devices


def standard_name(name: str) -> str:
    """Return a topology's name as `cpu`, FAMILY:GRID or GPU:COUNT[xHOSTS]; raises UsageError for an unknown name.

    Google's names count a v5p's TensorCores, two for each chip, and the chips of a v5e or v6e.
    """
    plain, gpus = name.strip().lower().replace("v5litepod", "v5e"), "|".join(GPUS)
    if plain == "cpu":
        return plain
    if size := re.fullmatch(rf"({'|'.join(TPUS)})-(\d+)", plain):
        sizes = TPUS[size[1]].get("sizes", {})
        if size[2] not in sizes:
            known = f"use one of {', '.join(f'{size[1]}-{n}' for n in sizes)}, or a grid" if sizes else "name its grid"
            raise UsageError(f"topology {name!r}: {known}, such as {size[1]}:{TPUS[size[1]]['example']}")
        return f"{size[1]}:{sizes[size[2]]}"
    if plain.split(":")[0] in TPUS and ":" in plain:
        return plain
    if turned := re.fullmatch(rf"(\d+)x({gpus})", plain):
        plain = f"{turned[2]}:{turned[1]}"
    if parts := re.fullmatch(rf"({gpus})[:x](\d{{1,6}})(?:x(\d{{1,6}}))?", plain):
        count, hosts = int(parts[2]), int(parts[3] or 1)
        if not parts[3] and count > PER_HOST and count % PER_HOST == 0:
            count, hosts = PER_HOST, count // PER_HOST
        if 1 <= count <= PER_HOST and 1 <= hosts <= MOST_HOSTS:
            return f"{parts[1]}:{count}" + (f"x{hosts}" if hosts > 1 else "")
    typed = {name: name for name in (*EXAMPLES, *(f"8x{gpu}" for gpu in GPUS))}
    typed |= {name.split(":")[0]: name for name in EXAMPLES}
    near = difflib.get_close_matches(plain, typed, 1)
    guess = f"; did you mean {typed[near[0]]}?" if near else ""
    raise UsageError(f"topology {name!r} is unknown; use a name such as {TOPOLOGIES}{guess}")


def _parse(name: str) -> dict:
    """Return the arguments of `get_topology_desc`. A side of 0 is refused because libtpu kills the process for it."""
    prefix, _, grid = name.partition(":")
    if prefix in GPUS:
        gpus, _, hosts = grid.partition("x")
        shape = f"1x{hosts or 1}x{gpus}"
        return dict(platform="cuda", topology_name=prefix, topology=shape, target_config=_gpu_description(prefix))
    sides, most, example = (TPUS[prefix][key] for key in ("sides", "most", "example"))
    is_grid = re.fullmatch(rf"[1-9]\d{{0,3}}(x[1-9]\d{{0,3}}){{{sides - 1}}}", grid)
    chips = math.prod(map(int, grid.split("x"))) if is_grid else 0
    if not 0 < chips <= most:
        raise UsageError(
            f"topology {name!r}: a {prefix} slice is a grid of {sides} sides and at most {most} chips, such as "
            f"{prefix}:{example}"
        )
    # The compiler chooses a host's chips. For a single chip, some versions choose 2x2 and then refuse it.
    bounds = {"chips_per_host_bounds": [1, 1, 1]} if chips == 1 else {}
    return dict(platform="tpu", topology_name=name) | bounds


def _gpu_description(gpu: str) -> str:
    """Return XLA's description of a GPU: that of the H100 with the other GPU's figures."""
    text = H100.read_text(encoding="utf-8")
    for key, value in GPUS[gpu].items():
        shown = f'"{value}"' if isinstance(value, str) else value
        text, count = re.subn(rf'\b{key}(: | {{ major: )("[^"]*"|\S+)', rf"{key}\g<1>{shown}", text)
        assert count == 1, key
    return text


def _describe(description: dict, module: str) -> list[jax.Device]:
    topologies = unstable.part("jax.experimental.topologies")
    try:
        return list(topologies.get_topology_desc(**description).devices)
    except NotImplementedError:
        # JAX starts its plugins once. Without a driver it drops the CUDA plugin, unless JAX_PLATFORMS is cpu.
        importlib.import_module(module).initialize()
        return list(topologies.get_topology_desc(**description).devices)


def _assume_cudnn(capability: int) -> None:
    """Give JAX h100.txtpb's version where cuDNN is missing, and the described GPU's capability where there is no GPU.

    It asks this machine even when it compiles for a described device.
    """
    cudnn = unstable.part("jax._src.cudnn.fused_attention_stablehlo")
    try:
        cudnn.check_cudnn_version()
    except RuntimeError:
        cudnn.check_cudnn_version = lambda: 91000
    if jax.default_backend() == "cpu":
        cudnn.check_compute_capability = lambda needed: capability >= float(needed)


def _try_compiler(device: jax.Device) -> None:
    """Compile a tanh (0.1 s): CUDA's plugin also needs ptxas and a library for such functions."""
    x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
    jax.jit(jnp.tanh).lower(x).compile()


@contextlib.contextmanager
def _without_hardware() -> Iterator[None]:
    """Keep the compilers from looking for their hardware (JAX_PLATFORMS=cpu) and from reporting that it is missing.

    CUDA writes 8 lines to stderr at any log level. Errors still arrive as exceptions.
    """
    platforms = jax.config.jax_platforms
    jax.config.update("jax_platforms", "cpu")
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)
        jax.config.update("jax_platforms", platforms)
