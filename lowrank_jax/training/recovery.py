"""Recovery of a run: with a smaller microbatch after running out of memory, and in bf16 where fp8 is off.

The state to go back to is that of `start.Recovery`.
"""

import jax

from lowrank_jax.config import RunFailure
from lowrank_jax.machine import agreement, faults, processes, sharding
from lowrank_jax.machine.console import say
from lowrank_jax.training import memory, run_folder
from lowrank_jax.training.metrics import Meter
from lowrank_jax.training.start import Run

ALONE_SECONDS = 60  # a process that ran out of memory waits so long for the others to do the same
# Largest relative differences of a microbatch's loss and gradient from bf16's. In 500 healthy steps of the quickstart's
# model they were at most 0.0006 and 0.094; weight gradients wrongly set to zero were off by 0.47 and more.
LOSS_LIMIT, GRADIENT_LIMIT = 0.01, 0.25


def lower_cap(r: Run, step: int, error: jax.errors.JaxRuntimeError) -> None:
    """Halve the microbatch, after the step that follows `step` ran out of memory, and log it.

    All processes agree on the lowest cap first. Raises RunFailure where nothing can be made smaller, where the other
    processes did not run out of memory and wait in the step, or where the error is of another kind.
    """
    reason, running = str(error).splitlines()[0], r.programs.running
    if not memory.is_out_of_memory(error):
        if processes.count() == 1:
            raise error
        cause = processes.lost(2, also_ended=True)  # the devices notice it first
        raise RunFailure(cause or f"a step failed, perhaps because another process ended: {reason:.200}") from error
    if not running:
        raise RunFailure(f"out of memory before the first step: {reason:.200}") from error
    cap, kind = memory.cap_below(running.fitted, r.plan.row_shards), sharding.a_device(r.plan.mesh).device_kind
    facts = {"stage": running.stage.name, "reason": reason[:300], "device": kind}

    def log(**who) -> None:
        run_folder.log_event(r.folder, "oom", step, **who, **facts, **(cap._asdict() if cap else {}))

    if not processes.barrier(f"out of memory after step {step}", ALONE_SECONDS):
        log(everyone=True)
        alone = f"out of memory at step {step + 1}, only in this process"
        raise RunFailure(f"{alone}; run the same command again: it will use less")
    cap = memory.lowest(each and memory.Cap(*each) for each in agreement.gather(cap))
    r.programs.lower(cap)
    log()
    if cap is None:
        raise RunFailure(
            f"out of memory at step {step + 1}, in {running.stage.name} with one row of {running.stage.seq_len} tokens "
            "at once, rematerialised; make the model or the length smaller"
        )
    remat = ", rematerialised" if cap.remat else ""
    say(f"out of memory at step {step + 1}: going on with {cap.microbatch_tokens} tokens at once{remat}")


def must_leave_fp8(r: Run, meter: Meter, params: dict, batch: dict, step: int) -> bool:
    """Return True where fp8 differs too much from bf16 on this batch; compare every `fp8_check` steps, and log it.

    A batch whose bf16 loss or gradient is not finite decides nothing.
    """
    check = r.programs.running.check
    if not check or step % r.config.every.fp8_check:
        return False
    differences = {name: float(x) for name, x in check(params, batch).items()}
    meter.restart_clock()
    if not differences.pop("known"):
        return False
    if faults.due("fp8", "step", step + 1):
        differences["loss"] = float("nan")
    is_close = differences["loss"] <= LOSS_LIMIT and differences["gradient"] <= GRADIENT_LIMIT  # False for NaN
    facts = {name: f"{value:.4f}" for name, value in differences.items()}
    run_folder.log_event(r.folder, "fp8_check" if is_close else "fallback", step, off_by=facts)
    if not is_close:
        say(f"step {step}: fp8 is off from bf16 by {facts}: going on in bf16")
    return not is_close
