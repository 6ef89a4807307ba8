"""A config's plan in numbers before it is trained: stages, parameters, cache size, memory, collectives, times."""

import dataclasses
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from lowrank_jax.config import RunConfig, UsageError
from lowrank_jax.data import tokenizer
from lowrank_jax.machine import devices, hlo, roofline, sharding
from lowrank_jax.machine.console import say
from lowrank_jax.model import costs, precision
from lowrank_jax.training import identity, memory, step
from lowrank_jax.training.memory import Fit
from lowrank_jax.training.plan import FittedStage, Plan, Stage, make, unchanged

# Facts that only a compiled stage has.
COMPILED = """
    remat peak_bytes_per_device is_bound device_bytes fits f8_matmuls compile_seconds note param_bytes_per_device
    optimizer_bytes_per_device activation_bytes_per_device collective_bytes gathered_bytes compute_seconds
    memory_seconds network_seconds est_step_seconds est_mfu_bound est_bound est_stage_seconds est_tokens_per_s
""".split()


def resolve_vocab(config: RunConfig) -> RunConfig:
    """Return the config with the size of its tokenizer, or the size that a tokenizer will be trained to."""
    try:
        return identity.with_tokenizer(config)[0]
    except (UsageError, OSError) as e:
        if config.tokenizer.path or config.tokenizer.vocab_size or config.init_from:
            raise
        say(f"planning with {tokenizer.MOST_LEARNED:,} pieces, as the sources cannot be opened: {e}")
        return config.with_vocab(tokenizer.MOST_LEARNED)


def for_topology(config: RunConfig, topology: str) -> dict:
    """Return the plan with every stage compiled for the topology, and the dense twin of the longest stage."""
    topology = devices.standard_name(topology)
    # The cache cannot store programs of described devices. JAX reads this setting at the first compilation.
    jax.config.update("jax_enable_compilation_cache", topology == "cpu")
    plan = make(config, devices.topology(topology))
    limit, fits, texts = memory.limit_bytes(config, plan.mesh), [], {}
    for number, stage in enumerate(plan.stages, 1):
        say(f"compiling stage {number} of {len(plan.stages)}: {stage.name} for {topology}")
        with hlo.written() as (options, read):
            fits.append(memory.fit(config, unchanged(stage), plan.mesh, limit, options=options))
            texts[stage.name] = read() if fits[-1].program else None
    described = describe(config, plan, fits, topology, texts)
    compiled = [fit for fit in fits if fit.program]
    if plan.mesh.devices.size > 1 and config.model.rank and compiled:
        longest = max(compiled, key=lambda fit: fit.stage.seq_len)
        say(f"compiling {longest.stage.name} with dense attention, to compare")
        twin = dataclasses.replace(config, model=costs.dense_twin(config.model))
        with hlo.written() as (options, read):
            step.lower(twin, longest.fitted, plan.mesh).compile(options)
            text = read()
        described["dense_twin"] = {"stage": longest.stage.name, "collective_bytes": hlo.collective_bytes(text)}
        described["dense_twin"]["gathered_bytes"] = _gathered_bytes(twin, plan.mesh, text)
    if config.model.remat and all(fit.fits for fit in fits):
        described["without_remat"] = _without_remat(config, max(compiled, key=lambda fit: fit.peak_bytes), plan.mesh)
    return described | {"advice": advice(config, described)}


def _without_remat(config: RunConfig, fit: Fit, mesh: Mesh) -> dict | None:
    """Return the stage's memory and time without rematerialisation; None where it is far from certain to fit."""
    if fit.peak_bytes > memory.FAR * fit.limit_bytes:
        return None
    say(f"compiling {fit.stage.name} without rematerialisation, as there is memory left")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=False))
    with hlo.written() as (options, read):
        stage = dataclasses.replace(fit.fitted, remat=False)
        other = memory.fit(config, stage, mesh, fit.limit_bytes, options=options)
        text = read()
    if not other.fits or other.fitted != stage:  # fewer rows at once, or rematerialised after all
        return None
    seconds = _estimate(config, other.fitted, mesh, text)["est_step_seconds"]
    return {"stage": fit.stage.name, "peak_bytes_per_device": other.peak_bytes, "est_step_seconds": seconds}


def advice(config: RunConfig, plan: dict) -> list[str]:
    """Return a line for each setting that the plan of `describe` would change."""
    lines, stages = [], {s["name"]: s for s in plan["stages"]}
    if other := plan.get("without_remat"):
        stage = stages[other["stage"]]
        sizes = [size / 2**30 for size in (other["peak_bytes_per_device"], stage["device_bytes"])]
        line = f"config.model.remat=False: {other['stage']} then needs {sizes[0]:.2f} of {sizes[1]:.1f} GiB"
        times = [1e3 * s["est_step_seconds"] for s in (other, stage) if s["est_step_seconds"]]
        lines.append(line + (f" and a step takes {times[0]:,.1f} instead of {times[1]:,.1f} ms" if times else ""))
    for phase, p in config.phases.items():
        own = [s for s in plan["stages"] if s["phase"] == phase and s["fits"]]
        is_small = own and all(s["peak_bytes_per_device"] <= memory.FAR * s["device_bytes"] for s in own)
        if is_small and plan["device_kind"] != "cpu" and any(s["microbatch"] < s["batch"] for s in own):
            most = max(s["peak_bytes_per_device"] / s["device_bytes"] for s in own)
            now = f"config.{phase}.microbatch_tokens={p.microbatch_tokens}"
            lines.append(f"{now} fills {most:.0%} of the memory; 0 computes as many rows at once as fit")
    return lines


def price(plan: dict, dollars: float = 0.0) -> dict:
    """Return the time and device-hours of all stages at the chip's peaks, and their price per device-hour `dollars`.

    None stands for what is not known: times without a topology or of an unknown chip, and costs without a price.
    """
    seconds = [s["est_stage_seconds"] for s in plan["stages"]]
    total = sum(seconds) if None not in seconds else None
    hours = total and total / 3600 * plan["devices"]
    cost = hours and dollars and hours * dollars
    tokens = sum(s["tokens"] for s in plan["stages"])
    facts = {"est_seconds": total, "est_device_hours": hours, "price_per_device_hour": dollars or None}
    return facts | {"est_cost": cost or None, "est_cost_per_million_tokens": cost / tokens * 1e6 if cost else None}


def describe(
    config: RunConfig, plan: Plan, fits: Sequence[Fit] = (), topology: str | None = None, texts: dict | None = None
) -> dict:
    """Return the plan as JSON values; COMPILED facts are None for stages without a fit.

    `texts` are the compiled programs' texts by the stage's name.
    """
    mesh, counts, dense = plan.mesh, costs.parameters(config.model), costs.parameters(costs.dense_twin(config.model))
    device = sharding.a_device(mesh) if mesh else None
    dtype = precision.policy(precision.resolve(config.precision, device and device.platform)).dtype
    fit_of = {fit.stage.name: fit for fit in fits}
    lengths = {(name, n) for name, p in config.phases.items() for n in p.lengths}
    lengths -= {(s.phase, s.seq_len) for s in plan.stages}
    params = counts | {f"{name}_dense": count for name, count in dense.items()}
    return {
        "params": params | {"attention_reduction": 1 - counts["attention"] / dense["attention"]},
        "kv_bytes_per_token": costs.kv_bytes_per_token(config.model, dtype.itemsize) | {"dtype": dtype.name},
        "topology": topology,
        "devices": mesh.devices.size if mesh else None,
        "device_kind": device.device_kind if mesh else None,
        "mesh": dict(mesh.shape) if mesh else None,
        "stages": [_stage(config, s, fit_of.get(s.name), mesh, (texts or {}).get(s.name)) for s in plan.stages],
        "never_reached": sorted({length for _, length in lengths}),
    }


def _stage(config: RunConfig, s: Stage, fit: Fit | None, mesh: Mesh | None, text: str | None) -> dict:
    chosen = fit.fitted if fit else unchanged(s)
    facts = {key: getattr(s, key) for key in ("name", "phase", "start", "seq_len", "batch")}
    facts |= {"microbatch": chosen.microbatch, "steps": s.steps, "tokens": s.steps * s.tokens_per_step}
    facts["flops_per_step"] = costs.train_flops_per_token(config.model, s.seq_len) * s.tokens_per_step
    facts |= {"attention_kernel": chosen.attention} | dict.fromkeys(COMPILED)
    return facts | (_compiled(config, fit, mesh, text) if fit else {})


def _compiled(config: RunConfig, fit: Fit, mesh: Mesh, text: str | None) -> dict:
    """Return the COMPILED facts of a stage; `device_bytes` is the memory that a step may use."""
    state = step.abstract_state(config, mesh)
    facts = {"remat": fit.fitted.remat, "peak_bytes_per_device": fit.peak_bytes, "device_bytes": fit.limit_bytes}
    facts |= {"fits": fit.fits, "compile_seconds": round(fit.seconds, 2), "note": fit.note, "is_bound": fit.is_bound}
    facts["param_bytes_per_device"] = _bytes(state.params)
    facts["optimizer_bytes_per_device"] = _bytes(state) - _bytes(state.params)
    if text:
        facts["activation_bytes_per_device"] = fit.program.memory_analysis().temp_size_in_bytes
        facts |= {"f8_matmuls": hlo.f8_matmuls(text), "collective_bytes": hlo.collective_bytes(text)}
        facts |= {"gathered_bytes": _gathered_bytes(config, mesh, text)} | _estimate(config, fit.fitted, mesh, text)
    return facts


def _bytes(tree) -> int:
    shard = lambda x: x.sharding.shard_shape(x.shape)
    return sum(jax.ShapeDtypeStruct(shard(x), x.dtype).size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _gathered_bytes(config: RunConfig, mesh: Mesh, text: str) -> dict[str, float]:
    """Return {attention, total}: bytes that all-gathers bring to a device per step, for attention's weights and all.

    An array counts as a weight of attention by its size, whole or as a tensor group's part. A TPU's compiler gathers
    some weights in parts while it multiplies by them; these collective-permutes also carry sums of gradients, and are
    not counted.
    """
    weights = jax.tree.leaves(step.abstract_state(config, mesh).params["blocks"]["attention"])
    sizes = {x.shape[1] * x.shape[2] // parts for x in weights for parts in (1, mesh.shape[sharding.TENSOR])}
    gathered = {"attention": 0.0, "total": 0.0}
    for c in (c for c in hlo.collectives(text) if c.kind == "all-gather"):
        gathered["total"] += c.times * c.bytes
        gathered["attention"] += c.times * c.bytes * sum(n for n in c.sizes if n in sizes) / sum(c.sizes)
    return gathered


def _estimate(config: RunConfig, fitted: FittedStage, mesh: Mesh, text: str) -> dict:
    """Return a lower bound of the step's time from the chip's peaks, see `roofline.estimate`."""
    m, stage, chip, count = config.model, fitted.stage, devices.chip(sharding.a_device(mesh)), mesh.devices.size
    model_flops = costs.train_flops_per_token(m, stage.seq_len) * stage.tokens_per_step / count
    flops = roofline.matmul_flops(text)
    if fitted.attention in ("cudnn", "splash"):  # 2 matmuls forward, 5 backward, 2 again with remat; half of each
        matmuls = 9 if fitted.remat else 7
        flops += matmuls * m.layers * stage.seq_len * m.d * stage.tokens_per_step / count
    per_host = sum(d.process_index == 0 for d in mesh.devices.flat)
    traffic, collectives = roofline.traffic_bytes(text), hlo.collectives(text)
    seconds = roofline.estimate(chip, flops, traffic, collectives, per_host, model_flops)
    renamed = {"step_seconds": "est_step_seconds", "mfu_bound": "est_mfu_bound", "bound": "est_bound"}
    facts = {renamed.get(name, name): value for name, value in seconds.items()}
    took = seconds["step_seconds"]
    facts["est_tokens_per_s"] = took and stage.tokens_per_step / took
    return facts | {"est_stage_seconds": took and took * stage.steps}


def table(plan: dict) -> str:
    """Return the plan of `describe` as text: tables of stages, parameters, memory, collectives and estimated times."""
    p, kv, stages = plan["params"], plan["kv_bytes_per_token"], plan["stages"]
    head = f"{'stage':16}{'steps':>9}{'length':>8}{'batch':>7}{'micro':>7}{'tokens':>17}{'TFLOP/step':>12}"
    lines = [head + (f"{'memory':>18}" if any(s["device_bytes"] for s in stages) else "")]
    for s in stages:
        lines.append(
            f"{s['name']:16}{s['steps']:9,}{s['seq_len']:8,}{s['batch']:7,}{s['microbatch']:7,}{s['tokens']:17,}"
            f"{s['flops_per_step'] / 1e12:12,.2f}{_memory(s)}"
        )
    if plan["never_reached"]:
        lines.append(f"the run ends before these lengths: {', '.join(map(str, plan['never_reached']))}")
    lines += _on_devices(plan) + ["", f"{'parameters':16}{'low rank':>14}{'dense':>14}{'saved':>8}"]
    for name in [name for name in ("attention", "mlp", "embedding", "head", "norm", "total") if p[name]]:
        dense = p[f"{name}_dense"]
        lines.append(f"{name:16}{p[name]:14,}{dense:14,}{1 - p[name] / dense:8.1%}")
    cache = f"cache per token ({kv['dtype']}): {kv['latent']:,} bytes of latents; dense keys and values: "
    return "\n".join([*lines, "", f"{cache}{kv['dense']:,} bytes ({kv['dense'] / kv['latent']:.1f} times as many)"])


def _memory(s: dict) -> str:
    if not s["device_bytes"]:
        return ""
    need = f"{s['peak_bytes_per_device'] / 2**30:.2f}" if s["peak_bytes_per_device"] else "?"
    of = f"{'≤ ' if s['is_bound'] else ''}{need} of {s['device_bytes'] / 2**30:.1f}"
    extra = (" rematerialised" if s["remat"] else "") + ("" if s["fits"] else " DOES NOT FIT")
    extra += f" {s['f8_matmuls']} f8 matmuls" if s["f8_matmuls"] else ""
    return f"{of:>14} GiB{extra}"


def _on_devices(plan: dict) -> list[str]:
    """Return the tables of the stages that are compiled: memory, collectives, times."""
    compiled = [s for s in plan["stages"] if s["collective_bytes"] is not None]
    if not compiled:
        return []
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    head = (
        f"{'GiB per device:':16}{'weights':>9}{'optimizer':>11}{'temporary':>11}  {'attention':10}{'compiled in':>12}"
    )
    lines = ["", f"on {plan['devices']} x {plan['device_kind']} ({mesh})", head]
    for s in compiled:
        sizes = [s[f"{part}_bytes_per_device"] / 2**30 for part in ("param", "optimizer", "activation")]
        shown = f"{s['name']:16}{sizes[0]:9.2f}{sizes[1]:11.2f}{sizes[2]:11.2f}  {s['attention_kernel']:10}"
        lines.append(f"{shown}{s['compile_seconds']:10.0f} s" + (f"  ({s['note']})" if s["note"] else ""))
    lines += _collectives(compiled) + (_beside_twin(plan["dense_twin"], compiled) if "dense_twin" in plan else [])
    lines += _at_the_peaks([s for s in compiled if s["est_step_seconds"]], plan)
    return lines + (["", "what the plan would change", *plan["advice"]] if plan.get("advice") else [])


def _kinds(stages: list[dict]) -> list[str]:
    return [kind for kind in hlo.COLLECTIVES if any(kind in s["collective_bytes"] for s in stages)]


def _collectives(compiled: list[dict]) -> list[str]:
    if not (kinds := _kinds(compiled)):
        return []
    lines = ["", f"{'MB per step:':16}" + "".join(f"{kind:>20}" for kind in kinds)]
    for s in compiled:
        sizes = [s["collective_bytes"].get(kind, 0) / 1e6 for kind in kinds]
        lines.append(f"{s['name']:16}" + "".join(f"{size:20,.1f}" for size in sizes))
    return lines


def _beside_twin(twin: dict, compiled: list[dict]) -> list[str]:
    both = [next(s for s in compiled if s["name"] == twin["stage"]), twin]
    rows = {"all-gather of attention's weights": [s["gathered_bytes"]["attention"] for s in both]}
    rows |= {kind: [s["collective_bytes"].get(kind, 0) for s in both] for kind in _kinds(both)}
    title = f"with dense attention, MB per step of {twin['stage']}"
    lines = ["", f"{title:54}{'low rank':>12}{'dense':>12}{'saved':>8}"]
    for name, (low_rank, dense) in rows.items():
        lines.append(f"{name:54}{low_rank / 1e6:12,.1f}{dense / 1e6:12,.1f}{1 - low_rank / (dense or 1):8.1%}")
    return lines


def _at_the_peaks(timed: list[dict], plan: dict) -> list[str]:
    if not timed:
        return []
    parts = ("compute", "memory", "network")
    head = f"{'at the peaks:':16}" + "".join(f"{part:>13}" for part in (*parts, "step"))
    lines = ["", "an estimate: the chip's published peaks, with everything overlapped; a real step takes longer"]
    lines.append(f"{head}  {'waits for':10}{'MFU':>6}{'tokens/s':>13}{'whole stage':>13}")
    for s in timed:
        times = [*(s[f"{part}_seconds"] for part in parts), s["est_step_seconds"]]
        shown = f"{s['name']:16}" + "".join(f"{1e3 * seconds:10,.1f} ms" for seconds in times)
        shown += f"  {s['est_bound']:10}{s['est_mfu_bound']:6.0%}{s['est_tokens_per_s']:13,.0f}"
        lines.append(f"{shown}{s['est_stage_seconds'] / 3600:11,.1f} h")
    lines.append(f"{'all stages':99}{sum(s['est_stage_seconds'] for s in timed) / 3600:11,.1f} h")
    if plan.get("est_cost"):
        rate, tokens = plan["price_per_device_hour"], plan["est_cost_per_million_tokens"]
        total = f"at least ${plan['est_cost']:,.2f}: {plan['est_device_hours']:,.1f} device-hours at ${rate:,.2f}"
        lines.append(f"{total}, ${tokens:,.4g} per million tokens")
    return lines
