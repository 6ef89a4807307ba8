"""Recovery from running out of memory during a step: the run goes on with fewer rows at once.

Only a program's first step shows its true need of memory, and a failed step has consumed the state. So a copy of the
state stays in host memory until that first step is done. A later failure goes back to the newest checkpoint.
"""

import jax

from lowrank_jax.config import RunFailure
from lowrank_jax.machine import agreement, sharding
from lowrank_jax.machine.console import say
from lowrank_jax.training import memory, run_folder
from lowrank_jax.training.plan import Plan
from lowrank_jax.training.programs import Programs
from lowrank_jax.training.progress import Progress
from lowrank_jax.training.step import TrainState

ALONE_SECONDS = 60  # a process that ran out of memory waits so long for the others to do the same


class OutOfMemory(Exception):
    """A step ran out of memory and consumed the state. The ledger and the programs have the lower cap."""


class Recovery:
    """The state and progress to go back to, held until a program's first step is done."""

    _start: tuple | None = None

    @property
    def holds_state(self) -> bool:
        return self._start is not None

    def hold(self, state: TrainState, progress: Progress) -> None:
        """Copy the state to host memory."""
        self._start = jax.tree.map(sharding.to_host, state), progress

    def hold_first(self, state: TrainState) -> None:
        """Keep a new run's first state on the devices: nothing has run yet."""
        self._start = state, Progress()

    def release(self) -> None:
        """Forget the state: the program's first step is done."""
        self._start = None

    def take(self) -> tuple[TrainState, Progress] | None:
        """Return (state on the devices, progress) and forget both; None where nothing is held."""
        if self._start is None:
            return None
        (state, progress), self._start = self._start, None
        return jax.tree.map(lambda x: x() if callable(x) else x, state), progress


def lower_cap(programs: Programs, plan: Plan, folder: str, step: int, error: str) -> None:
    """Halve the rows at once, after the step that follows `step` ran out of memory, and log it.

    All processes agree on the lowest cap first. Raises RunFailure where nothing can be made smaller, or where the other
    processes did not run out of memory and wait in the step.
    """
    fitted = programs.running.fitted
    cap, kind = memory.cap_below(fitted, plan.row_shards), sharding.a_device(plan.mesh).device_kind
    facts = {"stage": fitted.stage.name, "reason": error.splitlines()[0][:300], "device": kind}
    log = lambda cap, **who: run_folder.log_event(folder, "oom", step, **who, **facts, **(cap._asdict() if cap else {}))
    if not agreement.meet(f"out of memory after step {step}", ALONE_SECONDS):
        log(cap, everyone=True)
        raise RunFailure(
            f"out of memory at step {step + 1}, only in this process; run the same command again: it will use less"
        )
    cap = memory.lowest(each and memory.Cap(*each) for each in agreement.gather(cap))
    programs.lower(cap)
    log(cap)
    if cap is None:
        raise RunFailure(
            f"out of memory at step {step + 1}, in {fitted.stage.name} with one row of {fitted.stage.seq_len} tokens "
            "at once, rematerialised; make the model or the length smaller"
        )
    remat = ", rematerialised" if cap.remat else ""
    say(f"out of memory at step {step + 1}: going on with {cap.microbatch_tokens} tokens at once{remat}")
