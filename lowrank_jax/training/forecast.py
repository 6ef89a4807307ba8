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

from lowrank_jax import cli
from lowrank_jax.config import RunConfig
from lowrank_jax.data import tokenizer
from lowrank_jax.machine import devices, hlo, roofline, sharding
from lowrank_jax.model import costs, precision
from lowrank_jax.training import memory, step
from lowrank_jax.training import plan as stages
from lowrank_jax.training.memory import Fit
from lowrank_jax.training.plan import Stage

COMPILED = ("remat", "peak_bytes_per_device", "is_bound", "device_bytes", "fits", "f8_matmuls", "compile_seconds")
COMPILED += ("note",)
COMPILED += ("param_bytes_per_device", "optimizer_bytes_per_device", "activation_bytes_per_device")
COMPILED += ("collective_bytes", "gathered_bytes", "compute_seconds", "memory_seconds", "network_seconds")
COMPILED += ("est_step_seconds", "est_mfu_bound", "est_bound", "est_stage_seconds")


def describe(
    config: RunConfig,
    fits: Sequence[Fit] = (),
    mesh: Mesh | None = None,
    topology: str | None = None,
    texts: Mapping[str, str] = MappingProxyType({}),
) -> dict:
    """The plan as JSON values; what only a compiler can tell is None for stages of which `fits` has nothing.

    `texts` are those of the stages' programs, by name.
    """
    m, counts, dense = config.model, costs.parameters(config.model), costs.dense_parameters(config.model)
    platform = sharding.a_device(mesh).platform if mesh else None
    dtype = precision.policy(precision.resolve(config.precision, platform)).dtype
    fitted = {found.stage.name: found for found in fits}
    shards = sharding.row_shards(mesh) if mesh else 1
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
                "microbatch": fitted[s.name].stage.microbatch if s.name in fitted else s.microbatch,
                "steps": s.steps,
                "tokens": s.steps * s.tokens_per_step,
                "flops_per_step": costs.train_flops_per_token(m, s.seq_len) * s.tokens_per_step,
                "attention_kernel": fitted[s.name].stage.attention if s.name in fitted else m.attention,
            }
            | dict.fromkeys(COMPILED)
            | (_compiled(config, fitted[s.name], mesh, texts.get(s.name)) if s.name in fitted else {})
            for s in stages.plan(config, shards)
        ],
        "never_reached": _never_reached(config),
    }


def _compiled(config: RunConfig, found: Fit, mesh: Mesh, text: str | None) -> dict:
    """What the compiler says of a stage; `device_bytes` is what it may use."""
    facts = {"remat": found.stage.remat, "peak_bytes_per_device": found.need, "device_bytes": found.limit}
    facts |= {"fits": found.fits, "compile_seconds": round(found.seconds, 2), "note": found.note}
    facts["is_bound"] = found.is_bound
    state = step.abstract_state(config, mesh)
    facts["param_bytes_per_device"] = _bytes(state.params)
    facts["optimizer_bytes_per_device"] = _bytes(state) - _bytes(state.params)
    if text is None:
        return facts
    facts["activation_bytes_per_device"] = found.program.memory_analysis().temp_size_in_bytes
    facts |= {"f8_matmuls": hlo.f8_matmuls(text), "collective_bytes": hlo.collective_bytes(text)}
    facts["gathered_bytes"] = gathered_bytes(config, mesh, text)
    return facts | _estimate(config, found.stage, mesh, text)


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


def _estimate(config: RunConfig, stage: Stage, mesh: Mesh, text: str) -> dict:
    """A lower bound of the step's time from the chip's peaks, see `roofline.estimate`."""
    m, chip, count = config.model, devices.chip(sharding.a_device(mesh)), mesh.devices.size
    model_flops = costs.train_flops_per_token(m, stage.seq_len) * stage.tokens_per_step / count
    flops = roofline.matmul_flops(text)
    if stage.attention in ("cudnn", "splash"):  # 2 matmuls forward, 5 backward, and 2 once more; causal: half of each
        matmuls = 9 if stage.remat else 7
        flops += matmuls * m.layers * stage.seq_len * m.d * stage.tokens_per_step / count
    per_host = sum(d.process_index == 0 for d in mesh.devices.flat) or None
    seconds = roofline.estimate(
        chip, flops, roofline.traffic_bytes(text), hlo.collectives(text), per_host, model_flops=model_flops
    )
    renamed = {"step_seconds": "est_step_seconds", "mfu_bound": "est_mfu_bound", "bound": "est_bound"}
    facts = {renamed.get(name, name): value for name, value in seconds.items()}
    return facts | {"est_stage_seconds": seconds["step_seconds"] and seconds["step_seconds"] * stage.steps}


def dense_twin(config: RunConfig, found: Fit, mesh: Mesh) -> dict:
    """What the twin with dense attention exchanges in the same stage: compiled alike."""
    twin = dataclasses.replace(config, model=costs.dense_twin(config.model))
    with hlo.written() as (options, read):
        step.lower(twin, found.stage, mesh).compile(options)
        text = read()
    gathered = gathered_bytes(twin, mesh, text)
    return {"stage": found.stage.name, "gathered_bytes": gathered, "collective_bytes": hlo.collective_bytes(text)}


# --------------------------------------------------------------------------------------------------------- for a reader


def table(plan: dict) -> str:
    """The plan for a reader."""
    p, kv, known = plan["params"], plan["kv_bytes_per_token"], any(s["device_bytes"] for s in plan["stages"])
    lines = [f"{'stage':16}{'steps':>9}{'length':>8}{'batch':>7}{'micro':>7}{'tokens':>17}{'TFLOP/step':>12}"]
    lines[0] += f"{'memory':>18}" if known else ""
    for s in plan["stages"]:
        lines.append(
            f"{s['name']:16}{s['steps']:9,}{s['seq_len']:8,}{s['batch']:7,}{s['microbatch']:7,}{s['tokens']:17,}"
            f"{s['flops_per_step'] / 1e12:12,.2f}{_memory(s)}"
        )
    if plan["never_reached"]:
        lines.append(f"never reached in so few steps: lengths {', '.join(map(str, plan['never_reached']))}")
    lines += _on_devices(plan) + ["", f"{'parameters':16}{'low rank':>14}{'dense':>14}{'saved':>8}"]
    for name in [name for name in ("attention", "mlp", "embedding", "head", "norm", "total") if p[name]]:
        dense = p[f"{name}_dense"]
        lines.append(f"{name:16}{p[name]:14,}{dense:14,}{1 - p[name] / dense:8.1%}")
    lines += [
        "",
        f"cache per token ({kv['dtype']}): {kv['latent']:,} bytes of latents; "
        f"dense keys and values: {kv['dense']:,} bytes ({kv['dense'] / kv['latent']:.1f} times as much)",
    ]
    return "\n".join(lines)


def _memory(s: dict) -> str:
    if not s["device_bytes"]:
        return ""
    need = f"{s['peak_bytes_per_device'] / 2**30:.2f}" if s["peak_bytes_per_device"] else "?"
    of = f"{'≤ ' if s['is_bound'] else ''}{need} of {s['device_bytes'] / 2**30:.1f}"
    extra = (" rematerialised" if s["remat"] else "") + ("" if s["fits"] else " DOES NOT FIT")
    extra += f" {s['f8_matmuls']} f8 matmuls" if s["f8_matmuls"] else ""
    return f"{of:>14} GiB{extra}"


def _on_devices(plan: dict) -> list[str]:
    """What the compiled stages do on their devices."""
    compiled = [s for s in plan["stages"] if s["collective_bytes"] is not None]
    if not compiled:
        return []
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    lines = ["", f"on {plan['devices']} x {plan['device_kind']} ({mesh})"]
    lines += _per_device(compiled) + _exchanged(compiled)
    lines += _beside_twin(plan["dense_twin"], compiled) if "dense_twin" in plan else []
    return lines + _at_the_peaks([s for s in compiled if s["est_step_seconds"]])


def _per_device(compiled: list[dict]) -> list[str]:
    lines = [
        f"{'GiB a device:':16}{'weights':>9}{'optimizer':>11}{'temporary':>11}  {'attention':10}{'compiled in':>12}"
    ]
    for s in compiled:
        sizes = [s[f"{part}_bytes_per_device"] / 2**30 for part in ("param", "optimizer", "activation")]
        shown = f"{s['name']:16}{sizes[0]:9.2f}{sizes[1]:11.2f}{sizes[2]:11.2f}  {s['attention_kernel']:10}"
        lines.append(f"{shown}{s['compile_seconds']:10.0f} s" + (f"  ({s['note']})" if s["note"] else ""))
    return lines


def _exchanged(compiled: list[dict]) -> list[str]:
    kinds = [kind for kind in hlo.COLLECTIVES if any(kind in s["collective_bytes"] for s in compiled)]
    if not kinds:
        return []
    lines = ["", f"{'MB a step:':16}" + "".join(f"{kind:>20}" for kind in kinds)]
    for s in compiled:
        lines.append(
            f"{s['name']:16}" + "".join(f"{s['collective_bytes'].get(kind, 0) / 1e6:20,.1f}" for kind in kinds)
        )
    return lines


def _beside_twin(twin: dict, compiled: list[dict]) -> list[str]:
    both = next(s for s in compiled if s["name"] == twin["stage"]), twin
    kinds = [kind for kind in hlo.COLLECTIVES if any(kind in s["collective_bytes"] for s in both)]
    rows = {"all-gather of attention's weights": [s["gathered_bytes"]["attention"] for s in both]}
    rows |= {kind: [s["collective_bytes"].get(kind, 0) for s in both] for kind in kinds}
    lines = ["", f"{'with dense attention, MB a step of ' + twin['stage']:54}{'low rank':>12}{'dense':>12}{'saved':>8}"]
    for name, (ours, theirs) in rows.items():
        lines.append(f"{name:54}{ours / 1e6:12,.1f}{theirs / 1e6:12,.1f}{1 - ours / (theirs or 1):8.1%}")
    return lines


def _at_the_peaks(timed: list[dict]) -> list[str]:
    if not timed:
        return []
    parts = ("compute", "memory", "network")
    head = f"{'at the peaks:':16}" + "".join(f"{part:>13}" for part in (*parts, "step"))
    lines = ["", "an estimate: by the chip's published peaks, with everything overlapped; a real step takes longer"]
    lines.append(f"{head}  {'waits for':10}{'MFU':>6}{'whole stage':>13}")
    for s in timed:
        times = [*(s[f"{part}_seconds"] for part in parts), s["est_step_seconds"]]
        shown = f"{s['name']:16}" + "".join(f"{1e3 * seconds:10,.1f} ms" for seconds in times)
        hours = s["est_stage_seconds"] / 3600
        lines.append(f"{shown}  {s['est_bound']:10}{s['est_mfu_bound']:6.0%}{hours:11,.1f} h")
    return [*lines, f"{'all stages':86}{sum(s['est_stage_seconds'] for s in timed) / 3600:11,.1f} h"]


# --------------------------------------------------------------------------------------------------------- the command


def vocab(config: RunConfig) -> int:
    """The size of the named tokenizer, or the size that one will be trained to."""
    t = config.tokenizer
    return tokenizer.load(t.path).vocab_size if t.path else t.vocab_size


def resolve_vocab(config: RunConfig) -> RunConfig:
    return config.with_vocab(vocab(config))


def _never_reached(config: RunConfig) -> list[int]:
    reached = {(s.phase, s.seq_len) for s in stages.plan(config)}
    phases = [("pretrain", config.pretrain)] + ([("sft", config.sft)] if config.sft.steps else [])
    return sorted({n for phase, p in phases for n in stages.lengths(p) if (phase, n) not in reached})


def for_topology(config: RunConfig, topology: str) -> dict:
    """The plan with every stage compiled for the topology, and beside the longest its dense twin."""
    # The cache has no room for described devices; JAX looks at this when it compiles for the first time.
    jax.config.update("jax_enable_compilation_cache", topology == "cpu")
    mesh = sharding.make_mesh(config, devices.topology(topology))
    limit, plan = memory.limit_bytes(config, mesh), stages.plan(config, sharding.row_shards(mesh))
    fits, texts = [], {}
    for stage in plan:
        with hlo.written() as (options, read):
            fits.append(memory.fit(config, stage, mesh, limit, options=options))
            texts[stage.name] = read() if fits[-1].program else None
    described = describe(config, fits, mesh, topology, texts)
    compiled = [found for found in fits if found.program]
    if mesh.devices.size > 1 and config.model.rank and compiled:
        described["dense_twin"] = dense_twin(config, max(compiled, key=lambda found: found.stage.seq_len), mesh)
    return described


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--topology", default="", help=f"compile every stage for it: {devices.TOPOLOGIES}")
    args, config = parser.parse_with_config(argv)
    config = resolve_vocab(config)
    plan = for_topology(config, args.topology) if args.topology else describe(config)
    print(table(plan), flush=True)
    return plan


if __name__ == "__main__":
    cli.main(command)
