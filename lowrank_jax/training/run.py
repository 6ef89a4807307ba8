"""The parts of a run, and the state that it can go back to."""

from typing import NamedTuple

import jax

from lowrank_jax.config import RunConfig
from lowrank_jax.data.tokenizer import Tokenizer
from lowrank_jax.machine import sharding
from lowrank_jax.machine.agreement import Signals
from lowrank_jax.training.checkpoint import Checkpoints
from lowrank_jax.training.plan import Plan
from lowrank_jax.training.programs import Programs
from lowrank_jax.training.progress import Progress
from lowrank_jax.training.step import TrainState


class Recovery:
    """`start` is the (state, progress) to go back to until a program's first step is done, and None after it.

    Only that step shows a program's true need of memory, and a failed step has consumed the state. A later failure goes
    back to the newest checkpoint.
    """

    start: tuple | None = None

    def hold(self, state: TrainState, progress: Progress) -> None:
        """Copy the state to host memory."""
        self.start = jax.tree.map(sharding.to_host, state), progress

    def take(self) -> tuple[TrainState, Progress] | None:
        """Return (state on the devices, progress) and forget both; None where there is nothing to go back to."""
        if self.start is None:
            return None
        (state, progress), self.start = self.start, None
        put_back = lambda x: x() if callable(x) else x  # a new run's first state is on the devices
        return jax.tree.map(put_back, state), progress


class Run(NamedTuple):
    """The parts of a run that stay the same while a process trains."""

    config: RunConfig
    tokenizer: Tokenizer
    folder: str
    plan: Plan
    programs: Programs
    checkpoints: Checkpoints
    signals: Signals
    recovery: Recovery

    @property
    def stopping(self) -> bool:
        return self.signals.agreed > 0
