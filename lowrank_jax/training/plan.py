"""The plan of a run as data, with the stage and batch shape of every step from 0, and the progress through it.

The plan follows from the config and the devices and is never stored, so a resumed run cannot disagree with another.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
from jax.sharding import Mesh

from lowrank_jax.config import MOST_STEPS, PhaseConfig, RunConfig, UsageError
from lowrank_jax.machine import sharding
from lowrank_jax.model import costs

SETTINGS = ("microbatch", "remat", "precision", "attention")  # of a stage, which the devices may change


@dataclass(frozen=True)
class Stage:
    """Steps that share one batch shape, with the settings that the config asks for."""

    name: str
    phase: str
    start: int
    steps: int
    seq_len: int
    batch: int  # rows of a step
    microbatch: int  # rows at once
    phase_start: int  # of the stage's whole phase
    phase_steps: int
    remat: bool
    precision: str
    attention: str

    @property
    def end(self) -> int:
        return self.start + self.steps

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.seq_len


@dataclass(frozen=True)
class FittedStage:
    """A stage with the settings that it runs with, which fit into memory and are never `auto`."""

    stage: Stage
    microbatch: int
    remat: bool
    precision: str
    attention: str

    @property
    def settings(self) -> dict:
        return {key: getattr(self, key) for key in SETTINGS}


def unchanged(stage: Stage) -> FittedStage:
    """Return the stage with every setting as the config asks."""
    return FittedStage(stage, *(getattr(stage, key) for key in SETTINGS))


@dataclass(frozen=True)
class Plan:
    """The stages of a run, in order and without gaps, and its mesh (None where the devices are not known)."""

    stages: tuple[Stage, ...]
    mesh: Mesh | None = None

    @property
    def row_shards(self) -> int:
        """Number of parts that the devices cut a batch's rows into."""
        return sharding.row_shards(self.mesh) if self.mesh else 1

    @property
    def end(self) -> int:
        """Number of steps of the whole run."""
        return self.stages[-1].end

    @property
    def phase_ends(self) -> set[int]:
        """The number of steps done at the end of each phase."""
        return {stage.phase_start + stage.phase_steps for stage in self.stages}


@dataclass(frozen=True)
class Progress:
    """Updates and tokens done, the phase of the last update, and the position in the data, as JSON values.

    `cursor` is that of data/stream.py, None before a phase's first batch. `data_sha256` is chained over every global
    batch. `precision` is what the run has fallen back to, or empty for the config's.
    """

    step: int = 0
    phase: str = "pretrain"
    tokens: int = 0
    data_sha256: str = ""
    cursor: dict | None = None
    precision: str = ""

    def after(self, stage: Stage, cursor: dict) -> "Progress":
        """Return the progress after one more update of `stage`, whose batch ended at `cursor`."""
        tokens = self.tokens + stage.tokens_per_step
        return replace(self, step=self.step + 1, phase=stage.phase, tokens=tokens, cursor=cursor)


def make(config: RunConfig, devices: Sequence[jax.Device] = ()) -> Plan:
    """Return the plan of a run on these devices; raises UsageError where they cannot divide its batches evenly."""
    if not devices:
        return Plan(stages_of(config))
    mesh = sharding.make_mesh(config, stages_of(config), devices)
    return Plan(stages_of(config, sharding.row_shards(mesh)), mesh)


def stages_of(config: RunConfig, row_shards: int = 1) -> tuple[Stage, ...]:
    """Return the stages of a run, pretraining before SFT, with microbatches that are multiples of `row_shards`."""
    stages, start = [], 0
    for phase, p in config.phases.items():
        phase_steps, done = _phase_steps(config, p, phase), 0
        for seq_len in p.lengths:
            is_last = seq_len == p.lengths[-1]
            steps = phase_steps - done if is_last else min(p.grow_every_steps, phase_steps - done)
            if steps > 0:
                batch = p.tokens_per_step // seq_len
                most = row_shards * (p.microbatch_tokens // seq_len) if p.microbatch_tokens else batch
                shape = (seq_len, batch, divisor(batch, most, row_shards), start, phase_steps)
                settings = (config.model.remat, config.precision, config.model.attention)
                stages.append(Stage(f"{phase}-{seq_len}", phase, start + done, steps, *shape, *settings))
                done += steps
        start += phase_steps
    return tuple(stages)


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """Return the stage of step `step`; a step on a boundary belongs to the later stage."""
    return stages[bisect.bisect_right([s.start for s in stages], step) - 1]


def last_stage(stages: Sequence[Stage], phase: str) -> Stage:
    """Return the last stage of a phase."""
    return [s for s in stages if s.phase == phase][-1]


def milestones(stages: Sequence[Stage], every_eval: int, done: int, every_tasks: int = 0) -> list[tuple[str, str, int]]:
    """Return what is due after `done` updates, in order, as (kind, phase, done).

    `end` is the end of a phase. `eval` measures its held-out text: at its start, every `every_eval` steps, and its end,
    where the phases before it are measured again. `tasks` come every `every_tasks` steps (0: never) and at its end.
    """
    due, before = [], lambda stage: dict.fromkeys(s.phase for s in stages if s.start < stage.phase_start)
    if done > 0:
        last = stage_at(stages, done - 1)
        ends = done == last.phase_start + last.phase_steps
        due += [("eval", last.phase, done)] if ends or done % every_eval == 0 else []
        due += [("eval", phase, done) for phase in before(last)] if ends else []
        due += [("tasks", last.phase, done)] if every_tasks and (ends or done % every_tasks == 0) else []
        due += [("end", last.phase, done)] if ends else []
    if done < stages[-1].end and (first := stage_at(stages, done)).phase_start == done:
        due.append(("eval", first.phase, done))
    return due


def divisor(batch: int, most: int, of: int = 1) -> int:
    """Return the largest divisor of `batch` that is a multiple of `of` and at most `most` (but at least `of`)."""
    rows, most = max(batch // of, 1), max(1, min(batch, most) // of)
    small = [n for n in range(1, math.isqrt(rows) + 1) if rows % n == 0]
    return of * max(n for n in (*small, *(rows // n for n in small)) if n <= most)


def _phase_steps(config: RunConfig, p: PhaseConfig, phase: str) -> int:
    if p.steps > 0:
        return p.steps
    steps = max(1, round(costs.parameters(config.model)["total"] * p.tokens_per_param / p.tokens_per_step))
    if steps > MOST_STEPS:
        setting, remedy = f"config.{phase}.tokens_per_param={p.tokens_per_param:g}", "lower it, or raise"
        needed = f"needs {steps:,} steps, more than {MOST_STEPS:,}"
        raise UsageError(f"{setting} {needed}; {remedy} config.{phase}.tokens_per_step")
    return steps
