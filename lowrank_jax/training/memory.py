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
from jax.sharding import Mesh

from lowrank_jax.config import RunConfig
from lowrank_jax.machine import devices, sharding
from lowrank_jax.model import attention, precision
from lowrank_jax.training import plan as stages
from lowrank_jax.training import step
from lowrank_jax.training.plan import Stage

FAR = 0.5  # share of the limit below which a bound is certain enough to train on
ROOM = 0.9  # share of a device's memory that a step may take: batches read ahead and evaluation need the rest
CHOSEN = ("microbatch", "remat", "precision", "attention")  # what of a stage is found here


class Learnt(NamedTuple):
    """What running out of memory taught: most tokens at a time on a device (0: no bound), whether to rematerialise."""

    microbatch_tokens: int = 0
    remat: bool = False


NOTHING = Learnt()


class Fit(NamedTuple):
    """A stage as it can run: microbatch, rematerialisation and attention kernel, compiled for `limit` bytes a device.

    `need` is what the compiler says of arguments, results and temporaries; it is above `limit` where not even one row
    at a time fits, and None where the compiler itself gave up for lack of memory. `note` tells why the platform's own
    attention kernel is not used, where it is not. A stage that `is_bound` is not compiled yet and needs at most that.
    """

    stage: Stage
    need: int | None
    limit: int
    seconds: float
    program: jax.stages.Compiled | None
    note: str = ""
    is_bound: bool = False

    @property
    def fits(self) -> bool:
        return self.need is not None and self.need <= self.limit


def limit_bytes(config: RunConfig, mesh: Mesh) -> int:
    """How much of each device's memory a step may take. CPU devices of one process share the machine's."""
    device = sharding.a_device(mesh)
    sharers = sum(d.process_index == device.process_index for d in mesh.devices.flat) if device.platform == "cpu" else 1
    return int(config.memory_gb * 2**30) or int(ROOM * devices.memory_bytes(device)) // sharers


def fit(
    config: RunConfig, stage: Stage, mesh: Mesh, limit: int, learnt: Learnt = NOTHING, options: dict | None = None
) -> Fit:
    """The stage with the most rows at a time that fit, up to what it asks for; rematerialised if not even one does.

    Where `model.attention` is `auto` and the platform's kernel refuses the stage, it is `chunked`. `options` are the
    compiler's.
    """
    shards = sharding.row_shards(mesh)
    stage, note = _resolve(config, restrict(stage, learnt, shards), sharding.a_device(mesh).platform)
    seconds, most = 0.0, stage.microbatch
    while True:
        started, program, need, fixed = time.monotonic(), None, None, 0
        try:
            program = step.lower(config, stage, mesh).compile(options)
            memory = program.memory_analysis()
            fixed = memory.argument_size_in_bytes
            need = fixed + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
        except (RuntimeError, ValueError, NotImplementedError) as e:  # JaxRuntimeError is a RuntimeError
            if not is_out_of_memory(e):
                if config.model.attention != "auto" or stage.attention == "chunked":
                    raise
                note = f"{stage.attention}: {' '.join(str(e).split())[:200]}"
                stage = dataclasses.replace(stage, attention="chunked")
                continue
        seconds += time.monotonic() - started
        found = Fit(stage, need, limit, seconds, program, note)
        # What grows with the rows, in proportion: so many rows cannot be too few, as part of it does not grow.
        rows = stage.microbatch * (limit - fixed) // max(need - fixed, 1) if need else stage.microbatch // 2
        smaller = None if found.fits else shrink(stage, max(rows, 1), shards)
        if smaller is None:
            return found
        stage = dataclasses.replace(smaller, microbatch=most) if smaller.remat and not stage.remat else smaller


def by_bound(found: Fit, config: RunConfig, stage: Stage, mesh: Mesh, learnt: Learnt = NOTHING) -> Fit | None:
    """How a stage fits if that is certain from how another does; None where it has to be compiled.

    Memory grows at most with the tokens that are there at a time, and of each of them with the length, as a square of
    scores would. Where even that is below half of the limit, nobody needs to wait for a compiler.
    """
    shards = sharding.row_shards(mesh)
    stage, note = _resolve(config, restrict(stage, learnt, shards), sharding.a_device(mesh).platform)
    alike = all(getattr(stage, key) == getattr(found.stage, key) for key in ("remat", "precision", "attention"))
    if not (found.fits and alike):
        return None
    longer = max(1.0, stage.seq_len / found.stage.seq_len)
    more = max(1.0, stage.microbatch * stage.seq_len / (found.stage.microbatch * found.stage.seq_len))
    need = int(found.need * longer * more)
    return Fit(stage, need, found.limit, 0.0, None, note, is_bound=True) if need <= FAR * found.limit else None


def _resolve(config: RunConfig, stage: Stage, platform: str) -> tuple[Stage, str]:
    """The stage with what is `auto` chosen for the platform, and why its attention kernel is not the platform's own."""
    chosen = precision.resolve(stage.precision, platform)
    m, dtype = config.model, precision.policy(chosen).dtype
    kernel, note = attention.resolve(stage.attention, platform, dtype, m.head_dim, stage.seq_len)
    return dataclasses.replace(stage, precision=chosen, attention=kernel), note


def restrict(stage: Stage, learnt: Learnt, shards: int = 1) -> Stage:
    """The stage within what was learnt, on devices that have a batch in `shards` parts."""
    most = shards * (learnt.microbatch_tokens // stage.seq_len) if learnt.microbatch_tokens else stage.microbatch
    rows = stages.divisor(stage.batch, min(stage.microbatch, most), shards)
    return dataclasses.replace(stage, microbatch=rows, remat=stage.remat or learnt.remat)


def shrink(stage: Stage, rows: int, shards: int = 1) -> Stage | None:
    """The stage with at most `rows` and fewer rows at a time than now, else rematerialised; None where it is."""
    if stage.microbatch > shards:
        rows = stages.divisor(stage.batch, min(rows, stage.microbatch - 1), shards)
        return dataclasses.replace(stage, microbatch=rows)
    return None if stage.remat else dataclasses.replace(stage, remat=True)


def remembered(events: list[dict], mesh: Mesh) -> Learnt:
    """What a run's ledger has of steps that ran out of memory on such devices."""
    kind = sharding.a_device(mesh).device_kind
    ooms = [e for e in events if e["event"] == "oom" and e["device"] == kind and "remat" in e]
    bounds = [e["microbatch_tokens"] for e in ooms]
    return Learnt(min(bounds, default=0), any(e["remat"] for e in ooms))


def known(events: list[dict], config: RunConfig, plan: Iterable[Stage], mesh: Mesh, limit: int) -> dict[Stage, Fit]:
    """What a run's ledger has of how the stages of this config fit into such devices: no need to ask again.

    `need` is from before any of them ran out of memory.
    """
    learnt, fits, shards = remembered(events, mesh), {}, sharding.row_shards(mesh)
    here = where(config, mesh, limit)
    made = {e["stage"]: e for e in events if e["event"] == "compile" and here.items() <= e.items()}
    for stage in plan:
        if e := made.get(stage.name):
            chosen = {key: e[key] for key in CHOSEN}
            stage_there = restrict(dataclasses.replace(stage, **chosen), learnt, shards)
            fits[stage] = Fit(stage_there, e["peak_bytes"], limit, 0.0, None, e["note"])
    return fits


def facts(found: Fit) -> dict:
    """How a stage fits, for the ledger; with `where`, what `known` needs."""
    chosen = {key: getattr(found.stage, key) for key in CHOSEN}
    return {"stage": found.stage.name, "peak_bytes": found.need, "note": found.note} | chosen


def where(config: RunConfig, mesh: Mesh, limit: int) -> dict:
    """What the fit of a stage depends on, besides the stage: the config and the devices."""
    on = {"device": sharding.a_device(mesh).device_kind, "device_bytes": limit, "mesh": list(mesh.devices.shape)}
    return {"config": config_sha256(config)} | on


def config_sha256(config: RunConfig) -> str:
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()


def least(learnt: Iterable[Learnt | None]) -> Learnt | None:
    """What all processes do after one or more of them ran out of memory: the least of what each can do."""
    all_learnt = list(learnt)
    if None in all_learnt:
        return None
    return Learnt(min(each.microbatch_tokens for each in all_learnt), any(each.remat for each in all_learnt))


def is_out_of_memory(e: BaseException) -> bool:
    return isinstance(e, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(e)


def refusal(found: Fit) -> str:
    """One line for a stage that does not fit."""
    need = f"{found.need / 2**30:.2f} GiB" if found.need else "more than the compiler could place"
    return (
        f"stage {found.stage.name} needs {need} a device for one row of {found.stage.seq_len} tokens, rematerialised, "
        f"and {found.limit / 2**30:.2f} GiB may be used; make the model or the length smaller, use more devices, or "
        "raise config.memory_gb"
    )
