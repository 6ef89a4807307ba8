"""The training plan as data: config -> stages. Everything that is a function of the global step lives here.

Step k is the k-th update, counted from 0 over the whole run. Nothing here is ever stored: the phase, the sequence
length, the batch shape and the learning rate of a step follow from the config alone, so a resumed run cannot disagree
with an uninterrupted one.
"""

import bisect
import math
from dataclasses import dataclass

import jax.numpy as jnp

from lowrank_jax.config import PhaseConfig, RunConfig
from lowrank_jax.model import costs

# Hosts up to this many read shares of their own. Each reader holds about a megabyte of documents for every source.
MOST_READERS = 8


@dataclass(frozen=True)
class Stage:
    """A run of steps with one compiled program: `batch` rows of `seq_len` tokens, `microbatch` rows at a time.

    `microbatch`, `remat`, `precision` and `attention` are what the config asks for; `fit` replaces what the devices
    have no room for, and what is `auto`.
    """

    name: str
    phase: str
    start: int
    steps: int
    seq_len: int
    batch: int
    microbatch: int
    phase_start: int
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


def plan(config: RunConfig, row_shards: int = 1) -> tuple[Stage, ...]:
    """The stages of a run, in order and without gaps: pretraining with its growing lengths, then SFT.

    `row_shards` is in how many parts the devices have a batch (1, or a divisor of every batch).
    """
    stages, start = [], 0
    for phase, p in (("pretrain", config.pretrain), ("sft", config.sft)):
        steps = _phase_steps(config, p, phase)
        done = 0
        for i, seq_len in enumerate(lengths(p)):
            last = i == len(lengths(p)) - 1
            here = steps - done if last else min(p.grow_every_steps, steps - done)
            if here > 0:
                batch = p.tokens_per_step // seq_len
                most = row_shards * (p.microbatch_tokens // seq_len) if p.microbatch_tokens else batch
                micro = divisor(batch, most, row_shards)
                shape = (f"{phase}-{seq_len}", phase, start + done, here, seq_len, batch, micro, start, steps)
                stages.append(Stage(*shape, config.model.remat, config.precision, config.model.attention))
                done += here
        start += steps
    return tuple(stages)


def lengths(p: PhaseConfig) -> tuple[int, ...]:
    """Sequence lengths of a phase, in order: the block, then every longer length of the growth plan."""
    return (p.block, *(n for n in p.grow_plan if n > p.block)) if p.auto_grow else (p.block,)


def readers(p: PhaseConfig) -> int:
    """How many readers a phase's batches are made of: each fills an equal part of the rows, whatever the length.

    Without a number of its own, as many as divide the rows of every length, up to MOST_READERS.
    """
    common = math.gcd(*(p.tokens_per_step // n for n in lengths(p)))
    return p.readers or max(n for n in range(1, MOST_READERS + 1) if common % n == 0)


def mixture(p: PhaseConfig, phase_step: int) -> tuple[float, ...]:
    """The shares of the sources at a step of the phase: they add up to 1."""
    weights = [[w for step, w in source.weight if step <= phase_step][-1] for source in p.sources]
    return tuple(w / sum(weights) for w in weights)


def stage_at(stages: tuple[Stage, ...], step: int) -> Stage:
    """The stage that step `step` belongs to; a step on a boundary belongs to the later stage."""
    return stages[bisect.bisect_right([s.start for s in stages], step) - 1]


def milestones(stages: tuple[Stage, ...], every_eval: int, done: int) -> list[tuple[str, str, int]]:
    """What is due after `done` updates, in order, as (kind, phase, done).

    `eval` is a look at a phase's held-out text: where the phase starts, every so many steps, and at its end. `end` is
    the end of a phase.
    """
    due, end = [], stages[-1].end
    if done > 0:
        last = stage_at(stages, done - 1)
        ends = done == last.phase_start + last.phase_steps
        due += [("eval", last.phase, done)] if ends or done % every_eval == 0 else []
        due += [("end", last.phase, done)] if ends else []
    if done < end and (first := stage_at(stages, done)).phase_start == done:
        due.append(("eval", first.phase, done))
    return due


def learning_rate(p: PhaseConfig, stage: Stage, step):
    """Learning rate at a global step (Python int or traced): warmup, then a schedule over the stage's phase.

    WSD (warmup, stable, decay: arXiv 2404.06395) holds the peak and falls linearly over the last `cooldown` share of
    the phase; cosine and linear fall from the end of the warmup. All would reach `lr_end` x `lr` one step after the
    last.
    """
    k = jnp.asarray(step - stage.phase_start, jnp.float32)
    n = stage.phase_steps
    warm = round(p.warmup * n)
    up = jnp.minimum((k + 1) / max(warm, 1), 1.0)
    if p.schedule == "wsd":
        cool = round(p.cooldown * n)
        left = jnp.clip((n - k) / max(cool + 1, 1), 0.0, 1.0)  # 1 until the cooldown, then down
        shape = p.lr_end + (1 - p.lr_end) * left
    else:
        left = jnp.clip((n - k) / max(n - warm, 1), 0.0, 1.0)
        if p.schedule == "cosine":
            left = jnp.sin(0.5 * jnp.pi * left) ** 2  # (1 + cos)/2, without its cancellation
        shape = p.lr_end + (1 - p.lr_end) * left
    return p.lr * up * shape


def _phase_steps(config: RunConfig, p: PhaseConfig, phase: str) -> int:
    if p.steps or phase == "sft":
        return p.steps
    return max(1, round(costs.parameters(config.model)["total"] * p.tokens_per_param / p.tokens_per_step))


def divisor(batch: int, most: int, of: int = 1) -> int:
    """The largest divisor of `batch` that is a multiple of `of` and at most `most` (but at least `of`)."""
    return of * next(rows for rows in range(max(1, min(batch, most) // of), 0, -1) if batch // of % rows == 0)


def average_decay(ema: float, stage: Stage, step):
    """Decay of the moving average of the weights at a global step: grows to `ema` over the phase's first steps.

    (1 + k) / (10 + k), so that what the phase began with does not stay in the average for 1 / (1 - ema) steps.
    """
    k = jnp.asarray(step - stage.phase_start, jnp.float32)
    return jnp.minimum(ema, (1 + k) / (10 + k))
