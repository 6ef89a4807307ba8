"""What a config will do, before anything is trained: its stages, its parameters, and the size of its cache.

python -m lowrank_jax.plan --config=configs/custom.py [--json]
"""

from collections.abc import Sequence

import jax

from lowrank_jax import cli, costs, devices, fit, precision, sharding, stages
from lowrank_jax.config import RunConfig
from lowrank_jax.data import tokenizer
from lowrank_jax.fit import Fit


def describe(config: RunConfig, fits: Sequence[Fit] = (), topology: str | None = None) -> dict:
    """The plan as JSON values; what only a compiler can tell is None for stages of which `fits` has nothing."""
    m, counts, dense = config.model, costs.parameters(config.model), costs.dense_parameters(config.model)
    dtype, fitted = precision.policy(config.precision).dtype, {found.stage.name: found for found in fits}
    return {
        "params": counts
        | {f"{name}_dense": count for name, count in dense.items()}
        | {"attention_reduction": 1 - counts["attention"] / dense["attention"]},
        "kv_bytes_per_token": costs.kv_bytes_per_token(m, dtype.itemsize) | {"dtype": dtype.name},
        "topology": topology,
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
                "attention_kernel": "reference" if m.attention == "reference" else "chunked",
            }
            | _compiled(fitted.get(s.name))
            for s in stages.plan(config)
        ],
        "never_reached": _never_reached(config),
    }


def _compiled(found: Fit | None) -> dict:
    """What the compiler says of a stage; `device_bytes` is what it may use."""
    facts = dict.fromkeys(["remat", "peak_bytes_per_device", "device_bytes", "fits", "f8_matmuls", "compile_seconds"])
    facts |= dict.fromkeys(["collective_bytes", "est_step_seconds"])
    if found:
        facts |= {"remat": found.stage.remat, "peak_bytes_per_device": found.need, "device_bytes": found.limit}
        facts |= {"fits": found.fits, "compile_seconds": round(found.seconds, 2)}
    if found and found.program:
        facts["f8_matmuls"] = devices.f8_matmuls(found.program.as_text())
    return facts


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
    lines += ["", f"{'parameters':16}{'low rank':>14}{'dense':>14}{'saved':>8}"]
    for name in ("attention", "mlp", "embedding", "norm", "total"):
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
    of = f"{need} of {s['device_bytes'] / 2**30:.1f}"
    extra = (" rematerialised" if s["remat"] else "") + ("" if s["fits"] else " DOES NOT FIT")
    extra += f" {s['f8_matmuls']} f8 matmuls" if s["f8_matmuls"] else ""
    return f"{of:>14} GiB{extra}"


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


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--topology", default="", help=f"compile every stage for it: {devices.TOPOLOGIES}")
    args, config = parser.parse_with_config(argv)
    config, fits = resolve_vocab(config), []
    if args.topology:
        mesh = sharding.make_mesh(config, devices.topology(args.topology))
        jax.config.update("jax_enable_compilation_cache", args.topology == "cpu")  # it has no room for described ones
        limit, plan_there = fit.limit_bytes(config, mesh), stages.plan(config, sharding.row_shards(mesh))
        fits = [fit.fit(config, stage, mesh, limit) for stage in plan_there]
    plan = describe(config, fits, args.topology or None)
    print(table(plan), flush=True)
    return plan


if __name__ == "__main__":
    cli.main(command)
