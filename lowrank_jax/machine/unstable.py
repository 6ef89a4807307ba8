"""The parts of JAX that are private or experimental, which a new version may move: each is looked up when it is needed.

A part that has moved is then one line that names it and JAX's version, only for who needs it.
"""

import importlib.metadata
import pkgutil

from lowrank_jax.config import UsageError

TESTED = ("0.10.2", "0.12.0.1")  # the first and last version of JAX that requirements.txt pins

# A module or class: (what is used of it, what needs it).
SPLASH = "BlockSizes CausalMask MultiHeadMask SegmentIds make_splash_mha_single_device"
PARTS = {
    "jax._src.clusters.ClusterEnv": ("auto_detect_unset_distributed_params", "finding the processes of a cluster"),
    "jax._src.cudnn.fused_attention_stablehlo": ("check_cudnn_version check_compute_capability", "--topology=h100"),
    "jax.experimental.mesh_utils": ("create_device_mesh", "a mesh of several TPU devices"),
    "jax.experimental.multihost_utils": ("process_allgather", "a run of several processes"),
    "jax.experimental.pallas.ops.tpu.splash_attention": (SPLASH, "attention on a TPU, unless model.attention=chunked"),
    "jax.experimental.topologies": ("get_topology_desc", "--topology"),
}


def part(name: str):
    """Return this module or class of JAX with all that PARTS names; raises UsageError where something is missing."""
    attributes, purpose = PARTS[name]
    try:
        owner = pkgutil.resolve_name(name)
        missing = [f"{name}.{attribute}" for attribute in attributes.split() if not hasattr(owner, attribute)]
    except (ImportError, AttributeError):
        missing = [name]
    if missing:
        raise _moved(missing[0], purpose)
    return owner


def configure(option: str, value: bool) -> None:
    """Set an option of JAX that a run of several processes needs; raises UsageError where it has none of this name."""
    import jax  # here, as a process that only reads data does not import it

    try:
        jax.config.update(option, value)
    except AttributeError:
        raise _moved(f"option {option}", "a run of several processes") from None


def _moved(name: str, purpose: str) -> UsageError:
    version, tested = importlib.metadata.version("jax"), " to ".join(TESTED)
    return UsageError(f"JAX {version} has no {name}, which is needed for {purpose}; install one from {tested}")
