"""What a config will do, before anything is trained or rented: its stages, its parameters, the size of its cache.

    python -m lowrank_jax.plan --config=configs/custom.py [--json]
    python -m lowrank_jax.plan --config=configs/custom.py --topology=v5e:4x4

With a topology, every stage's real step is compiled for it, with no such hardware here: memory, collectives and kernels
are the compiler's. Times are an estimate from the chip's published peaks, which no program reaches.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
from jax.sharding import Mesh

from lowrank_jax.config import RunConfig
from lowrank_jax.data import tokenizer
from lowrank_jax.machine import devices, hlo, roofline, sharding
from lowrank_jax.model import costs, precision
from lowrank_jax.training import memory, step
from lowrank_jax.training.memory import Fit
from lowrank_jax.training.plan import FittedStage, Plan, make, unchanged

COMPILED = ("remat", "peak_bytes_per_device", "is_bound", "device_bytes", "fits", "f8_matmuls", "compile_seconds")
COMPILED += ("note",)
COMPILED += ("param_bytes_per_device", "optimizer_bytes_per_device", "activation_bytes_per_device")
COMPILED += ("collective_bytes", "gathered_bytes", "compute_seconds", "memory_seconds", "network_seconds")
COMPILED += ("est_step_seconds", "est_mfu_bound", "est_bound", "est_stage_seconds")


def describe(
    config: RunConfig,
    plan: Plan,
    fits: Sequence[Fit] = (),
    topology: str | None = None,
    texts: Mapping[str, str] = MappingProxyType({}),
) -> dict:
    """Return the plan as JSON values; what only a compiler can tell is None for stages without a fit.

    `texts` are the compiled programs' texts by the stage's name.
    """
    mesh = plan.mesh
    m, counts, dense = config.model, costs.parameters(config.model), costs.dense_parameters(config.model)
    platform = sharding.a_device(mesh).platform if mesh else None
    dtype = precision.policy(precision.resolve(config.precision, platform)).dtype
    fit_of = {fit.stage.name: fit for fit in fits}
    return {
        "params": counts
        | {f"{name}_dense": count for name, count in dense.items()}
        | {"attention_reduction": 1 - counts["attention"] / dense["attention"]},
        "kv_bytes_per_token": costs.kv_bytes_per_token(m, dtype.itemsize) | {"dtype": dtype.name},
        "topology": topology,
        "devices": mesh.devices.size if mesh else None,
        "device_kind": sharding.a_device(mesh).device_kind if mesh else None,
        "mesh": dict(mesh.shape) if mesh else None,
        "stages": [
            {
                "name": s.name,
                "phase": s.phase,
                "start": s.start,
                "seq_len": s.seq_len,
                "batch": s.batch,
                "microbatch": fit_of[s.name].fitted.microbatch if s.name in fit_of else s.microbatch,
                "steps": s.steps,
                "tokens": s.steps * s.tokens_per_step,
                "flops_per_step": costs.train_flops_per_token(m, s.seq_len) * s.tokens_per_step,
                "attention_kernel": fit_of[s.name].fitted.attention if s.name in fit_of else m.attention,
            }
            | dict.fromkeys(COMPILED)
            | (_compiled(config, fit_of[s.name], mesh, texts.get(s.name)) if s.name in fit_of else {})
            for s in plan.stages
        ],
        "never_reached": _never_reached(config, plan),
    }


def _compiled(config: RunConfig, fit: Fit, mesh: Mesh, text: str | None) -> dict:
    """Return what the compiler says of a stage; `device_bytes` is what a step may use."""
    facts = {"remat": fit.fitted.remat, "peak_bytes_per_device": fit.peak_bytes, "device_bytes": fit.limit_bytes}
    facts |= {"fits": fit.fits, "compile_seconds": round(fit.seconds, 2), "note": fit.note, "is_bound": fit.is_bound}
    state = step.abstract_state(config, mesh)
    facts["param_bytes_per_device"] = _bytes(state.params)
    facts["optimizer_bytes_per_device"] = _bytes(state) - _bytes(state.params)
    if text is None:
        return facts
    facts["activation_bytes_per_device"] = fit.program.memory_analysis().temp_size_in_bytes
    facts |= {"f8_matmuls": hlo.f8_matmuls(text), "collective_bytes": hlo.collective_bytes(text)}
    facts["gathered_bytes"] = gathered_bytes(config, mesh, text)
    return facts | _estimate(config, fit.fitted, mesh, text)


def _bytes(tree) -> int:
    shard = lambda x: x.sharding.shard_shape(x.shape)
    return sum(jax.ShapeDtypeStruct(shard(x), x.dtype).size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def gathered_bytes(config: RunConfig, mesh: Mesh, text: str) -> dict[str, float]:
    """{attention, total}: bytes that all-gathers bring a device in a step, of attention's weights and of all.

    Told apart by size: an array as large as one of attention's weights, or as what a tensor group has of it, is one.
    A TPU's compiler gathers some weights part by part while it multiplies by them; those are collective-permutes, which
    also carry sums of gradients, and are not in here.
    """
    weights = jax.tree.leaves(step.abstract_state(config, mesh).params["blocks"]["attention"])
    sizes = {x.shape[1] * x.shape[2] // cut for x in weights for cut in (1, mesh.shape[sharding.TENSOR])}
    found = {"attention": 0.0, "total": 0.0}
    for c in (c for c in hlo.collectives(text) if c.kind == "all-gather"):
        found["total"] += c.times * c.bytes
        found["attention"] += c.times * c.bytes * sum(n for n in c.sizes if n in sizes) / sum(c.sizes)
    return found


def _estimate(config: RunConfig, fitted: FittedStage, mesh: Mesh, text: str) -> dict:
    """A lower bound of the step's time from the chip's peaks, see `roofline.estimate`."""
    stage = fitted.stage
    m, chip, count = config.model, devices.chip(sharding.a_device(mesh)), mesh.devices.size
    model_flops = costs.train_flops_per_token(m, stage.seq_len) * stage.tokens_per_step / count
    flops = roofline.matmul_flops(text)
    if fitted.attention in ("cudnn", "splash"):  # 2 matmuls forward, 5 backward, and 2 once more; causal: half of each
        matmuls = 9 if fitted.remat else 7
        flops += matmuls * m.layers * stage.seq_len * m.d * stage.tokens_per_step / count
    per_host = sum(d.process_index == 0 for d in mesh.devices.flat) or None
    seconds = roofline.estimate(
        chip, flops, roofline.traffic_bytes(text), hlo.collectives(text), per_host, model_flops=model_flops
    )
    renamed = {"step_seconds": "est_step_seconds", "mfu_bound": "est_mfu_bound", "bound": "est_bound"}
    facts = {renamed.get(name, name): value for name, value in seconds.items()}
    return facts | {"est_stage_seconds": seconds["step_seconds"] and seconds["step_seconds"] * stage.steps}


def dense_twin(config: RunConfig, fitted: FittedStage, mesh: Mesh) -> dict:
    """What the twin with dense attention exchanges in the same stage: compiled alike."""
    twin = dataclasses.replace(config, model=costs.dense_twin(config.model))
    with hlo.written() as (options, read):
        step.lower(twin, fitted, mesh).compile(options)
        text = read()
    gathered = gathered_bytes(twin, mesh, text)
    return {"stage": fitted.stage.name, "gathered_bytes": gathered, "collective_bytes": hlo.collective_bytes(text)}


def vocab(config: RunConfig) -> int:
    """The size of the named tokenizer, or the size that one will be trained to."""
    t = config.tokenizer
    return tokenizer.load(t.path).vocab_size if t.path else t.vocab_size


def resolve_vocab(config: RunConfig) -> RunConfig:
    return config.with_vocab(vocab(config))


def _never_reached(config: RunConfig, plan: Plan) -> list[int]:
    reached = {(s.phase, s.seq_len) for s in plan.stages}
    phases = [("pretrain", config.pretrain)] + ([("sft", config.sft)] if config.sft.steps else [])
    return sorted({n for phase, p in phases for n in p.lengths if (phase, n) not in reached})


def for_topology(config: RunConfig, topology: str) -> dict:
    """The plan with every stage compiled for the topology, and beside the longest its dense twin."""
    # The cache has no room for described devices; JAX looks at this when it compiles for the first time.
    jax.config.update("jax_enable_compilation_cache", topology == "cpu")
    plan = make(config, devices.topology(topology))
    limit, fits, texts = memory.limit_bytes(config, plan.mesh), [], {}
    for stage in plan.stages:
        with hlo.written() as (options, read):
            fits.append(memory.fit(config, unchanged(stage), plan.mesh, limit, options=options))
            texts[stage.name] = read() if fits[-1].program else None
    described = describe(config, plan, fits, topology, texts)
    compiled = [fit for fit in fits if fit.program]
    if plan.mesh.devices.size > 1 and config.model.rank and compiled:
        longest = max(compiled, key=lambda fit: fit.stage.seq_len)
        described["dense_twin"] = dense_twin(config, longest.fitted, plan.mesh)
    return described
