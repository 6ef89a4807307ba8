"""A regular comparison of fp8 with bf16 on the run's own weights and data; training falls back to bf16 in time."""

from lowrank_jax.machine import faults
from lowrank_jax.machine.console import say
from lowrank_jax.training import run_folder
from lowrank_jax.training.memory import Fit

# Largest relative differences of a microbatch's loss and gradient from bf16's. In 500 healthy steps of the quickstart's
# model they were at most 0.0006 and 0.094; weight gradients wrongly set to zero were off by 0.47 and more.
LOSS_LIMIT, GRADIENT_LIMIT = 0.01, 0.25


def is_off(running: Fit, params: dict, batch: dict, folder: str, step: int) -> bool:
    """Return True where fp8 differs too much from bf16 on this batch, and log the result.

    A batch whose bf16 loss or gradient is not finite decides nothing.
    """
    differences = {name: float(x) for name, x in running.check(params, batch).items()}
    if not differences.pop("known"):
        return False
    if faults.due("fp8", "step", step + 1):
        differences["loss"] = float("nan")
    is_close = differences["loss"] <= LOSS_LIMIT and differences["gradient"] <= GRADIENT_LIMIT  # False for NaN
    facts = {name: f"{value:.4f}" for name, value in differences.items()}
    run_folder.log_event(folder, "fp8_check" if is_close else "fallback", step, off_by=facts)
    if not is_close:
        say(f"step {step}: fp8 is off from bf16 by {facts}: going on in bf16")
    return not is_close
