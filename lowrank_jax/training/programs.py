"""The compiled step of each stage. Training starts once all stages fit; each next one compiles while it runs."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from lowrank_jax.config import RunConfig, RunFailure, UsageError
from lowrank_jax.machine import agreement, interrupt
from lowrank_jax.machine.console import ABANDONED
from lowrank_jax.model import precision
from lowrank_jax.training import memory, step
from lowrank_jax.training.memory import Cap, Fit
from lowrank_jax.training.plan import FittedStage, Plan, Stage, unchanged

COMPILERS = 2  # compilations at once: XLA itself uses several threads for a large program


class Programs:
    """Compile the stages of a plan in background threads, within what the run's `ledger` says of their memory.

    A running compilation cannot be stopped. `running` is the stage in use with its program, None before the first.
    """

    running: Fit | None = None

    def __init__(self, config: RunConfig, plan: Plan, ledger: list[dict], stop: Callable[[], bool]):
        self.config, self.plan = config, plan
        self._stop, self._pool = stop, ThreadPoolExecutor(COMPILERS, ABANDONED)
        self._limit = min(agreement.gather(memory.limit_bytes(config, plan.mesh)))
        self._cap = memory.cap_from_ledger(ledger, plan.mesh)
        self._known = memory.fits_from_ledger(ledger, config, plan.stages, plan.mesh, self._limit)
        self._fitted = {stage: fit.fitted for stage, fit in self._known.items()}
        self._compiling: dict[Stage, Future[Fit]] = {}
        self._bounded: set[Stage] = set()
        self._following: Stage | None = None

    def fit_all(self, done: int) -> list[Fit]:
        """Return how every stage fits that `done` steps leave, from the ledger, a safe bound, or by compiling.

        The first is always compiled. Only the first two programs stay loaded, as they take device memory; the
        compilation cache has the others. Raises UsageError for a stage that cannot fit, and Interrupted where a signal
        comes first.
        """
        stages = [stage for stage in self.plan.stages if stage.end >= done] or self.plan.stages  # `done` may be wrong
        first = self._get(stages[0])
        known = {stages[0]: first} | self._known
        for stage in (stage for stage in stages if stage not in known):
            if bound := memory.by_bound(first, self.config, stage, self.plan.mesh, self._cap):
                known[stage], self._fitted[stage] = bound, bound.fitted
                self._bounded.add(stage)
            else:
                self._prepare(stage)
        fits = [(known.get(stage) or self._get(stage))._replace(program=None, check=None) for stage in stages]
        if len({str(facts) for facts in agreement.gather([memory.fit_facts(fit) for fit in fits])}) > 1:
            raise RunFailure("the processes' compilers disagree on what fits; use equal devices and packages for all")
        for fit in fits:
            if not fit.fits:
                raise UsageError(memory.refusal(fit))
        self._keep(*stages[:2])
        return fits

    def switch_to(self, stage: Stage) -> bool:
        """Wait for a stage's program and make it the running one; return True where the stage was only bounded before.

        Raises Interrupted where a signal comes first.
        """
        following = (s for s in self.plan.stages if s.start == stage.end)
        self._following = next((dataclasses.replace(s, precision=stage.precision) for s in following), None)
        self._keep(stage, self._following)
        self.running = self._get(stage)
        if not self.running.fits:  # the memory gate did not see this stage, as after a change of precision
            raise RunFailure(memory.refusal(self.running))
        is_new = stage in self._bounded
        self._bounded.discard(stage)
        return is_new

    def first_step_done(self) -> None:
        """Start compiling the following stage, which would have delayed the running program's first step."""
        if self._following:
            self._prepare(self._following)

    def fitted(self, stage: Stage) -> FittedStage:
        """Return the stage with the settings that fit, as far as they are known."""
        return memory.restrict(self._fitted.get(stage) or unchanged(stage), self._cap, self.plan.row_shards)

    def lower(self, cap: Cap | None) -> None:
        """Keep within the cap from now on, in all stages, and drop the running program."""
        self.running, self._compiling, self._cap = None, {}, cap or self._cap

    def close(self) -> None:
        """Start no more compilations."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, stage: Stage) -> None:
        if stage not in self._compiling:
            self._compiling[stage] = self._pool.submit(self._compile, stage)

    def _get(self, stage: Stage) -> Fit:
        self._prepare(stage)
        return interrupt.wait(self._compiling[stage], self._stop)

    def _keep(self, *stages: Stage | None) -> None:
        self._compiling = {stage: future for stage, future in self._compiling.items() if stage in stages}

    def _compile(self, stage: Stage) -> Fit:
        fit = memory.fit(self.config, self.fitted(stage), self.plan.mesh, self._limit, self._cap)
        self._fitted[stage] = fit.fitted
        if fit.fits and precision.policy(fit.fitted.precision).name == "fp8":
            fit = fit._replace(check=step.lower_disagreement(self.config, fit.fitted, self.plan.mesh).compile())
        return fit
