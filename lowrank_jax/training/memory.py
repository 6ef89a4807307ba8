"""The memory gate: the number of rows that a stage computes at once, chosen by compiling before training.

The global batch never changes: fewer rows at once mean more microbatches, whose gradients are summed.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from lowrank_jax.config import RunConfig, UsageError
from lowrank_jax.machine import devices, sharding
from lowrank_jax.model import attention, costs, precision
from lowrank_jax.training import step
from lowrank_jax.training.plan import SETTINGS, FittedStage, Stage, divisor, unchanged

FAR = 0.5  # share of the limit: a bound below it is certain enough to train before the stage is compiled
ROOM = 0.9  # share of a device's memory that a step may use: batches read ahead and evaluation need the rest


class Cap(NamedTuple):
    """Bounds after running out of memory: tokens at once on a device (0: no bound), and rematerialisation."""

    microbatch_tokens: int = 0
    remat: bool = False


NO_CAP = Cap()


class Fit(NamedTuple):
    """A stage as it fits into `limit_bytes` per device; where not even one row does, `peak_bytes` exceeds the limit."""

    fitted: FittedStage
    peak_bytes: int | None  # arguments, results and temporaries; None where the compiler itself ran out of memory
    limit_bytes: int
    seconds: float  # of compilation
    program: jax.stages.Compiled | None  # `program(state, batch)`
    note: str = ""  # why the platform's own attention kernel is not used
    is_bound: bool = False  # not compiled yet: `peak_bytes` is an upper bound
    check: jax.stages.Compiled | None = None  # for fp8: `check(params, batch)`, see `step.disagreement`

    @property
    def stage(self) -> Stage:
        return self.fitted.stage

    @property
    def fits(self) -> bool:
        return self.peak_bytes is not None and self.peak_bytes <= self.limit_bytes


def limit_bytes(config: RunConfig, mesh: Mesh) -> int:
    """Return how much of each device's memory a step may use; CPU devices of one process share the machine's."""
    device = sharding.a_device(mesh)
    sharers = sum(d.process_index == device.process_index for d in mesh.devices.flat) if device.platform == "cpu" else 1
    return int(config.memory_gb * 2**30) or int(ROOM * devices.memory_bytes(device)) // sharers


def check_weights(config: RunConfig, mesh: Mesh) -> None:
    """Raise UsageError where the weights alone exceed the memory of all devices, before anything is compiled."""
    count, limit = costs.parameters(config.model)["total"], limit_bytes(config, mesh)
    need = 4 * count / mesh.devices.size
    if need > limit:
        sizes = f"need {need / 2**30:,.3g} GiB per device, which may use {limit / 2**30:.3g} GiB"
        raise UsageError(
            f"the model's {count:,} weights {sizes}; make it smaller, use more devices, or raise config.memory_gb"
        )


def fit(config: RunConfig, fitted: FittedStage, mesh: Mesh, limit: int, cap=NO_CAP, options: dict | None = None) -> Fit:
    """Compile a stage with as many rows at once as fit, up to its microbatch; rematerialise if not one row fits.

    Where `model.attention` is `auto` and the platform's kernel refuses the stage, attention is `chunked`.
    """
    fitted, note = _resolve(config, fitted, cap, mesh)
    seconds, most = 0.0, fitted.microbatch
    while True:
        started, program, peak = time.monotonic(), None, None
        rows = max(fitted.microbatch // 2, 1)  # the next to try where the compiler itself runs out of memory
        try:
            program = step.lower(config, fitted, mesh).compile(options)
        except (RuntimeError, ValueError, NotImplementedError) as e:  # JaxRuntimeError is a RuntimeError
            if not is_out_of_memory(e):
                if config.model.attention != "auto" or fitted.attention == "chunked":
                    raise
                note = f"{fitted.attention}: {' '.join(str(e).split())[:200]}"
                fitted = dataclasses.replace(fitted, attention="chunked")
                continue
        seconds += time.monotonic() - started
        if program:
            memory = program.memory_analysis()
            fixed = memory.argument_size_in_bytes
            peak = fixed + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
            # Memory grows at most in proportion to the rows, as a part of it does not depend on them.
            rows = max(fitted.microbatch * (limit - fixed) // max(peak - fixed, 1), 1)
        compiled = Fit(fitted, peak, limit, seconds, program, note)
        smaller = None if compiled.fits else shrink(fitted, rows, sharding.row_shards(mesh))
        if smaller is None:
            return compiled
        # A rematerialised row needs so much less that the search starts again from the most rows.
        fitted = dataclasses.replace(smaller, microbatch=most) if smaller.remat and not fitted.remat else smaller


def by_bound(known: Fit, config: RunConfig, stage: Stage, mesh: Mesh, cap: Cap = NO_CAP) -> Fit | None:
    """Return how a stage fits if another stage's fit makes that certain; None where it has to be compiled.

    Activation memory is at most proportional to microbatch tokens x sequence length, as a square of scores would be.
    """
    fitted, note = _resolve(config, unchanged(stage), cap, mesh)
    alike = dataclasses.replace(known.fitted, stage=stage, microbatch=fitted.microbatch) == fitted
    if not (known.fits and alike):
        return None
    longer = max(1.0, stage.seq_len / known.stage.seq_len)
    more = max(1.0, fitted.microbatch * stage.seq_len / (known.fitted.microbatch * known.stage.seq_len))
    bound = int(known.peak_bytes * longer * more)
    far = bound <= FAR * known.limit_bytes
    return Fit(fitted, bound, known.limit_bytes, 0.0, None, note, is_bound=True) if far else None


def _resolve(config: RunConfig, fitted: FittedStage, cap: Cap, mesh: Mesh) -> tuple[FittedStage, str]:
    """Return the stage within the cap and without `auto`, and why its attention kernel is not the platform's own."""
    platform = sharding.a_device(mesh).platform
    name = precision.resolve(fitted.precision, platform)
    dtype, head_dim = precision.policy(name).dtype, config.model.head_dim
    kernel, note = attention.resolve(fitted.attention, platform, dtype, head_dim, fitted.stage.seq_len)
    return restrict(dataclasses.replace(fitted, precision=name, attention=kernel), cap, sharding.row_shards(mesh)), note


def restrict(fitted: FittedStage, cap: Cap, shards: int = 1) -> FittedStage:
    """Return the stage within the cap, on devices that cut a batch into `shards` parts."""
    stage = fitted.stage
    most = shards * (cap.microbatch_tokens // stage.seq_len) if cap.microbatch_tokens else fitted.microbatch
    rows = divisor(stage.batch, min(fitted.microbatch, most), shards)
    return dataclasses.replace(fitted, microbatch=rows, remat=fitted.remat or cap.remat)


def shrink(fitted: FittedStage, rows: int, shards: int = 1) -> FittedStage | None:
    """Return the stage with at most `rows` rows at once and fewer than now, else rematerialised; None where it is."""
    if fitted.microbatch > shards:
        rows = divisor(fitted.stage.batch, min(rows, fitted.microbatch - 1), shards)
        return dataclasses.replace(fitted, microbatch=rows)
    return None if fitted.remat else dataclasses.replace(fitted, remat=True)


def cap_below(fitted: FittedStage, shards: int) -> Cap | None:
    """Return the cap that follows from `fitted` running out of memory; None where it cannot be made smaller."""
    smaller = shrink(fitted, fitted.microbatch // 2, shards)
    return smaller and Cap(smaller.microbatch // shards * fitted.stage.seq_len, smaller.remat)


def lowest(caps: Iterable[Cap | None]) -> Cap | None:
    """Return the cap that keeps within all of `caps`; None where one of them is."""
    caps = list(caps)
    if None in caps:
        return None
    return Cap(min((cap.microbatch_tokens for cap in caps), default=0), any(cap.remat for cap in caps))


def is_out_of_memory(e: Exception) -> bool:
    return isinstance(e, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(e)


def refusal(fit: Fit) -> str:
    need = f"{fit.peak_bytes / 2**30:.2f} GiB" if fit.peak_bytes else "more than the compiler could place"
    return (
        f"stage {fit.stage.name} needs {need} per device for one row of {fit.stage.seq_len} tokens, rematerialised, "
        f"and may use {fit.limit_bytes / 2**30:.2f} GiB; make the model or the length smaller, use more devices, or "
        "raise config.memory_gb"
    )


def cap_from_ledger(events: list[dict], mesh: Mesh) -> Cap:
    """Return the cap that a run's ledger holds for this kind of device."""
    kind = sharding.a_device(mesh).device_kind
    ooms = (e for e in events if e["event"] == "oom" and e["device"] == kind and e.keys() >= {*Cap._fields})
    return lowest(Cap(e["microbatch_tokens"], e["remat"]) for e in ooms)


def fits_from_ledger(events: list, config: RunConfig, stages: Iterable[Stage], mesh: Mesh, limit: int) -> dict:
    """Return {stage: fit} of a run's ledger for this config and these devices, restricted by its cap."""
    cap, fits, conditions = cap_from_ledger(events, mesh), {}, fit_conditions(config, mesh, limit)
    compiles = {e["stage"]: e for e in events if e["event"] == "compile" and conditions.items() <= e.items()}
    for stage in (stage for stage in stages if stage.name in compiles):
        event = compiles[stage.name]
        fitted = restrict(FittedStage(stage, *(event[key] for key in SETTINGS)), cap, sharding.row_shards(mesh))
        fits[stage] = Fit(fitted, event["peak_bytes"], limit, 0.0, None, event["note"])
    return fits


def fit_facts(fit: Fit) -> dict:
    """Return a stage's fit for the ledger; `fits_from_ledger` needs these facts and `fit_conditions`."""
    return {"stage": fit.stage.name, "peak_bytes": fit.peak_bytes, "note": fit.note} | fit.fitted.settings


def fit_conditions(config: RunConfig, mesh: Mesh, limit: int) -> dict:
    """Return everything besides the stage that its fit depends on: the config and the devices."""
    return {
        "config": hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest(),
        "device": sharding.a_device(mesh).device_kind,
        "device_bytes": limit,
        "mesh": list(mesh.devices.shape),
    }
