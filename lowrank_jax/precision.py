"""Numerical policy: weights and optimizer state are always fp32; this chooses what the matmuls run in."""

import jax
import jax.numpy as jnp

# Dense bf16 matrix peaks in FLOP/s per chip, as published by the makers; keys are found inside device_kind.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "H100": 989e12,
    "A100": 312e12,
}


def compute_dtype(precision: str) -> jnp.dtype:
    """`auto` is bf16 on an accelerator and fp32 on a CPU, where bf16 matmuls are slower and no smaller."""
    if precision == "auto":
        precision = "fp32" if jax.default_backend() == "cpu" else "bf16"
    return jnp.dtype({"fp32": jnp.float32, "bf16": jnp.bfloat16}[precision])


def peak_flops() -> float | None:
    """bf16 peak of the first device, or None where the chip is not in the table (a CPU, for one)."""
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in PEAK_FLOPS.items() if name in kind), None)
