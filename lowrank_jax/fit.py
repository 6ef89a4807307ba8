"""The memory gate: how many rows of a stage go through the device at a time, found by compiling before it trains.

The global batch never changes: fewer rows at a time means more of them one after another, with gradients summed.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from lowrank_jax import devices, precision, stages, step
from lowrank_jax.config import RunConfig
from lowrank_jax.stages import Stage

ROOM = 0.9  # share of a device's memory that a step may take: batches read ahead and evaluation need the rest


class Learnt(NamedTuple):
    """What running out of memory has taught: most tokens at a time (0: no bound), and whether to rematerialise."""

    microbatch_tokens: int = 0
    remat: bool = False


NOTHING = Learnt()


class Fit(NamedTuple):
    """A stage as it can run: its microbatch and rematerialisation, compiled for a device with `limit` bytes.

    `need` is what the compiler says of arguments, results and temporaries; it is above `limit` where not even one row
    at a time fits, and None where the compiler itself gave up for lack of memory.
    """

    stage: Stage
    need: int | None
    limit: int
    seconds: float
    program: jax.stages.Compiled | None

    @property
    def fits(self) -> bool:
        return self.need is not None and self.need <= self.limit


def limit_bytes(config: RunConfig, device: jax.Device) -> int:
    return int(config.memory_gb * 2**30) or int(ROOM * devices.memory_bytes(device))


def fit(config: RunConfig, stage: Stage, device: jax.Device, learnt: Learnt = NOTHING) -> Fit:
    """The stage with the most rows at a time that fit, up to what it asks for; rematerialised if not even one does."""
    stage = dataclasses.replace(restrict(stage, learnt), precision=precision.resolve(stage.precision, device.platform))
    limit, seconds, most = limit_bytes(config, device), 0.0, stage.microbatch
    while True:
        started, program, need, fixed = time.monotonic(), None, None, 0
        try:
            program = step.lower(config, stage, device).compile()
            memory = program.memory_analysis()
            fixed = memory.argument_size_in_bytes
            need = fixed + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
        except jax.errors.JaxRuntimeError as e:
            if not is_out_of_memory(e):
                raise
        seconds += time.monotonic() - started
        found = Fit(stage, need, limit, seconds, program)
        # What grows with the rows, in proportion: so many rows cannot be too few, as part of it does not grow.
        rows = stage.microbatch * (limit - fixed) // max(need - fixed, 1) if need else stage.microbatch // 2
        smaller = None if found.fits else shrink(stage, max(rows, 1))
        if smaller is None:
            return found
        stage = dataclasses.replace(smaller, microbatch=most) if smaller.remat and not stage.remat else smaller


def restrict(stage: Stage, learnt: Learnt) -> Stage:
    """The stage within what was learnt."""
    most = learnt.microbatch_tokens // stage.seq_len if learnt.microbatch_tokens else stage.microbatch
    rows = stages.divisor(stage.batch, min(stage.microbatch, most))
    return dataclasses.replace(stage, microbatch=rows, remat=stage.remat or learnt.remat)


def shrink(stage: Stage, rows: int) -> Stage | None:
    """The stage with at most `rows` and fewer rows at a time than now, else rematerialised; None where it is."""
    if stage.microbatch > 1:
        return dataclasses.replace(stage, microbatch=stages.divisor(stage.batch, min(rows, stage.microbatch - 1)))
    return None if stage.remat else dataclasses.replace(stage, remat=True)


def remembered(events: list[dict], device: jax.Device) -> Learnt:
    """What a run's ledger has of steps that ran out of memory on such a device."""
    ooms = [e for e in events if e["event"] == "oom" and e["device"] == device.device_kind and "remat" in e]
    bounds = [e["microbatch_tokens"] for e in ooms]
    return Learnt(min(bounds, default=0), any(e["remat"] for e in ooms))


def known(events: list[dict], config: RunConfig, plan: Iterable[Stage], device: jax.Device) -> dict[Stage, Fit]:
    """What a run's ledger has of how the stages of this config fit into such a device: no need to ask again.

    `need` is from before any of them ran out of memory.
    """
    learnt, fits = remembered(events, device), {}
    here = {"config": config_sha256(config), "device": device.device_kind, "device_bytes": limit_bytes(config, device)}
    made = {e["stage"]: e for e in events if e["event"] == "compile" and here.items() <= e.items()}
    for stage in plan:
        if e := made.get(stage.name):
            chosen = {key: e[key] for key in ("microbatch", "remat", "precision")}
            fits[stage] = Fit(
                restrict(dataclasses.replace(stage, **chosen), learnt), e["peak_bytes"], e["device_bytes"], 0.0, None
            )
    return fits


def config_sha256(config: RunConfig) -> str:
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()


def agree(learnt: Learnt | None) -> Learnt | None:
    """What all processes do after one or more of them ran out of memory: the least of what each can do."""
    if jax.process_count() == 1:
        return learnt
    mine = np.array([learnt.microbatch_tokens, not learnt.remat] if learnt else [-1, 0])
    tokens, no_remat = multihost_utils.process_allgather(mine).min(axis=0).tolist()
    return None if tokens < 0 else Learnt(tokens, not no_remat)


def is_out_of_memory(e: BaseException) -> bool:
    return isinstance(e, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(e)


def refusal(found: Fit) -> str:
    """One line for a stage that does not fit."""
    need = f"{found.need / 2**30:.2f} GiB" if found.need else "more than the compiler could place"
    return (
        f"stage {found.stage.name} needs {need} for one row of {found.stage.seq_len} tokens, rematerialised, and "
        f"{found.limit / 2**30:.2f} GiB may be used; make the model or the length smaller, or raise config.memory_gb"
    )
