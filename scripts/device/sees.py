"""Say which device is there, with which software, what lowrank_jax chooses on it, and its measured peaks.

    python scripts/device/sees.py [--small] [--seconds=30]

The matmul is 8192 x 8192 x 8192 in bf16 on random numbers: zeros run faster. The copy reads and writes 2 GiB.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

import jax
import jax.numpy as jnp

from lowrank_jax import cli
from lowrank_jax.machine import devices, sharding
from lowrank_jax.model import attention, precision
from lowrank_jax.training import forecast
from lowrank_jax.training.plan import make
from scripts.bench import harness
from scripts.device import rows

PRESETS = ("quickstart.py", "preset.py:small", "preset.py:base", "custom.py", "preset.py:1b", "preset.py:7b")
PACKAGES = "jax jaxlib jax-cuda12-plugin jax-cuda13-plugin libtpu flax optax orbax-checkpoint numpy torch".split()
REPEATS = 10


def main() -> None:
    p = rows.start(__doc__)
    p.row("versions", None, **versions())
    p.measure("device", lambda: (None, device()))
    p.measure("runtime", lambda: (None, runtime()))
    for preset in PRESETS:
        p.measure("choices", lambda preset=preset: choices(preset), config=preset)
    size = 512 if p.small else 8192
    p.measure("peak of a bf16 matmul", lambda: matmul(size))
    p.measure("peak of memory", lambda: copy(2**24 if p.small else 2**31))


def versions() -> dict:
    """Return {package: version} of the packages that are installed."""
    known = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            known[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return known


def device() -> dict:
    """Return the first device's kind, their number, and what training may use of its memory."""
    first, chip = jax.devices()[0], devices.chip(jax.devices()[0])
    facts = {"platform": first.platform, "kind": first.device_kind, "devices": jax.device_count()}
    facts |= {"training_bytes": devices.memory_bytes(first), "in_the_table": chip is not None}
    facts["compute_capability"] = getattr(first, "compute_capability", None)
    return facts | {"memory_stats": {key: value for key, value in (first.memory_stats() or {}).items() if value}}


def runtime() -> dict:
    """Return the driver, CUDA and cuDNN: all None where there is no NVIDIA GPU."""
    facts = dict.fromkeys(("driver", "cuda", "cudnn"))
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm", "--format=csv,noheader"]
        facts["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip() or None
    if jax.default_backend() == "gpu":
        from jax._src.lib import cuda_versions

        facts["cudnn"] = cuda_versions and cuda_versions.cudnn_get_version()
        facts["cuda"] = cuda_versions and cuda_versions.cuda_runtime_get_version()
    return facts | {"platform_version": " ".join(jax.devices()[0].client.platform_version.split())[:200]}


def choices(preset: str) -> tuple[bool, dict]:
    """Return the mesh, the precision, and the attention kernel of each stage: False where it is no fused kernel."""
    config = forecast.resolve_vocab(cli.read_config([f"--config={harness.ROOT}/configs/{preset}"]))
    plan, first = make(config, jax.devices()), jax.devices()[0]
    name = precision.resolve(config.precision, first.platform)
    kernels, notes = {}, {}
    for stage in plan.stages:
        shape = precision.policy(name).dtype, config.model.head_dim, stage.seq_len
        kernels[stage.name], note = attention.resolve(config.model.attention, first.platform, *shape)
        notes |= {stage.name: note} if note else {}
    mesh = {axis: size for axis, size in plan.mesh.shape.items()}
    figures = {"precision": name, "mesh": mesh, "head_width": config.model.head_dim, "kernels": kernels}
    is_own = all(attention.PLATFORMS.get(kernel) == first.platform for kernel in kernels.values())
    return is_own, figures | ({"notes": notes} if notes else {})


def matmul(size: int) -> tuple[None, dict]:
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    product = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(product(a, b))
    seconds = harness.median_seconds(lambda: _several(lambda: product(a, b)), 3) / REPEATS
    return None, _beside("peak_flops", 2 * size**3 / seconds, 1e12, "TFLOP/s")


def copy(size: int) -> tuple[None, dict]:
    x, add = jnp.ones(size // 4), jax.jit(lambda x: x + 1)
    seconds = harness.median_seconds(lambda: _several(lambda: add(x)), 3) / REPEATS
    return None, _beside("memory_bandwidth", 2 * x.nbytes / seconds, 1e9, "GB/s")


def _several(run) -> None:
    """Run REPEATS times without waiting for the host in between; each result is freed before the next."""
    for _ in range(REPEATS - 1):
        run()
    jax.block_until_ready(run())


def _beside(peak: str, measured: float, unit: float, name: str) -> dict:
    """Return a measured rate beside that of lowrank_jax/machine/devices.toml, which the roofline uses."""
    chip = devices.chip(sharding.a_device(sharding.one_device()))
    published = getattr(chip, peak) if chip else None
    figures = {"measured": round(measured / unit, 2), "unit": name, "table": published and published / unit}
    return figures | {"share_of_the_table": round(measured / published, 3) if published else None}


if __name__ == "__main__":
    main()
