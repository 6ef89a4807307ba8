"""The compiled step of each stage: none trains before all are known to fit, and the next is made while one trains."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from lowrank_jax.cli import ABANDONED
from lowrank_jax.config import RunConfig, RunFailure, UsageError
from lowrank_jax.machine import interrupt, processes, sharding
from lowrank_jax.model import precision
from lowrank_jax.training import memory, step
from lowrank_jax.training.memory import Fit, Learnt
from lowrank_jax.training.plan import Stage

COMPILERS = 2  # at a time: XLA itself uses several threads for a large program


class Program(NamedTuple):
    """A stage as it runs: `step(state, batch)`, and for fp8 `check(params, batch)`, see `step.disagreement`."""

    fit: Fit
    check: jax.stages.Compiled | None

    @property
    def stage(self) -> Stage:
        return self.fit.stage

    @property
    def step(self) -> jax.stages.Compiled:
        return self.fit.program


class Programs:
    """Compiles stages in threads. A compilation cannot be stopped: a process that ends by itself waits for it.

    Stages are named as the plan has them; what comes back is the stage as it fits. `running` is the program in use, and
    `held` a copy of (state, progress) from before its first step, until that is done.
    """

    running: Program | None = None
    held: tuple | None = None

    def __init__(self, config: RunConfig, mesh: Mesh, limit: int, learnt: Learnt, stop: Callable[[], bool]):
        self.config, self.mesh, self.limit = config, mesh, limit
        self._learnt, self._stop, self._pool = learnt, stop, ThreadPoolExecutor(COMPILERS, ABANDONED)
        self._made: dict[Stage, Future[Program]] = {}
        self._chosen: dict[Stage, Stage] = {}
        self._bounded: set[Stage] = set()
        self._following: Stage | None = None

    def fit_all(self, plan: tuple[Stage, ...], known: dict[Stage, Fit]) -> list[Fit]:
        """Compiles the first stage, and all that are neither known nor far from the limit (`memory.by_bound`).

        Raises UsageError in one line for one that cannot fit.

        Two of the programs are kept. (A loaded program takes device memory; the compilation cache has the others.)
        Raises Interrupted where a signal comes first.
        """
        self._chosen = {stage: found.stage for stage, found in known.items()}
        first = self._get(plan[0]).fit
        known = {plan[0]: first} | known
        for stage in (stage for stage in plan if stage not in known):
            if found := memory.by_bound(first, self.config, stage, self.mesh, self._learnt):
                known[stage], self._chosen[stage] = found, found.stage
                self._bounded.add(stage)
            else:
                self._prepare(stage)
        fits = [(known.get(stage) or self._get(stage).fit)._replace(program=None) for stage in plan]
        if len({str(facts) for facts in processes.gather([memory.facts(found) for found in fits])}) > 1:
            raise RunFailure("the processes' compilers disagree on what fits: are their devices and packages the same?")
        for found in fits:
            if not found.fits:
                raise UsageError(memory.refusal(found))
        self._keep(plan[:2])
        return fits

    def run(self, stage: Stage, following: Stage | None) -> bool:
        """Makes a stage's program the one that runs, waited for if need be; `settle` begins with the one that follows.

        Returns whether only now it is known what the stage needs. Raises Interrupted where a signal comes first.
        """
        self._keep((stage, following))
        self.running, self._following = self._get(stage), following
        if not self.running.fit.fits:  # one that the gate did not see, as where precision has changed
            raise RunFailure(memory.refusal(self.running.fit))
        is_new = stage in self._bounded
        self._bounded.discard(stage)
        return is_new

    def settle(self) -> None:
        """The running program's first step is done, which a compiler beside it would have held up."""
        self.held = None
        if self._following:
            self._prepare(self._following)

    def chosen(self, stage: Stage) -> Stage:
        """The stage as it fits, as far as that is known."""
        return memory.restrict(self._chosen.get(stage, stage), self._learnt, sharding.row_shards(self.mesh))

    def smaller(self) -> Learnt | None:
        """What the running program's end for lack of memory teaches; None where it cannot be any smaller."""
        ran, shards = self.running.stage, sharding.row_shards(self.mesh)
        smaller = memory.shrink(ran, ran.microbatch // 2, shards)
        return smaller and Learnt(smaller.microbatch // shards * smaller.seq_len, smaller.remat)

    def learn(self, learnt: Learnt | None) -> None:
        """Lets no more than that through the devices at a time, from now on and in all stages; ends the running one."""
        self.running, self._made, self._learnt = None, {}, learnt or self._learnt

    def close(self) -> None:
        """Begins nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, stage: Stage) -> None:
        if stage not in self._made:
            self._made[stage] = self._pool.submit(self._make, stage)

    def _get(self, stage: Stage) -> Program:
        self._prepare(stage)
        return interrupt.wait(self._made[stage], self._stop)

    def _keep(self, kept: tuple[Stage | None, ...]) -> None:
        self._made = {stage: made for stage, made in self._made.items() if stage in kept}

    def _make(self, stage: Stage) -> Program:
        asked, check = self._chosen.get(stage, stage), None
        found = memory.fit(self.config, asked, self.mesh, self.limit, self._learnt)
        self._chosen[stage] = found.stage
        if precision.policy(stage.precision).name == "fp8" and found.fits:
            check = step.lower_disagreement(self.config, found.stage, self.mesh).compile()
        return Program(found, check)
