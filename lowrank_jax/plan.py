"""What a config will do, before anything is trained: its stages, its parameters, and the size of its cache.

python -m lowrank_jax.plan --config=configs/custom.py [--json]
"""

from lowrank_jax import cli, costs, precision, stages
from lowrank_jax.config import RunConfig
from lowrank_jax.data import tokenizer


def describe(config: RunConfig) -> dict:
    """The plan as JSON values; what only a compiler for a real device can tell is None."""
    m, counts, dense = config.model, costs.parameters(config.model), costs.dense_parameters(config.model)
    dtype = precision.compute_dtype(config.precision)
    unknown = dict.fromkeys(
        ["peak_bytes_per_device", "device_bytes", "fits", "f8_matmuls", "collective_bytes", "est_step_seconds"]
    )
    return {
        "params": counts
        | {f"{name}_dense": count for name, count in dense.items()}
        | {"attention_reduction": 1 - counts["attention"] / dense["attention"]},
        "kv_bytes_per_token": costs.kv_bytes_per_token(m, dtype.itemsize) | {"dtype": dtype.name},
        "topology": None,
        "stages": [
            {
                "name": s.name,
                "phase": s.phase,
                "start": s.start,
                "seq_len": s.seq_len,
                "batch": s.batch,
                "microbatch": s.microbatch,
                "steps": s.steps,
                "tokens": s.steps * s.tokens_per_step,
                "flops_per_step": costs.train_flops_per_token(m, s.seq_len) * s.tokens_per_step,
                "attention_kernel": "reference" if m.attention == "reference" else "chunked",
            }
            | unknown
            for s in stages.plan(config)
        ],
        "never_reached": _never_reached(config),
    }


def table(plan: dict) -> str:
    """The plan for a reader."""
    p, kv = plan["params"], plan["kv_bytes_per_token"]
    lines = [f"{'stage':16}{'steps':>9}{'length':>8}{'batch':>7}{'micro':>7}{'tokens':>17}{'TFLOP/step':>12}"]
    for s in plan["stages"]:
        lines.append(
            f"{s['name']:16}{s['steps']:9,}{s['seq_len']:8,}{s['batch']:7,}{s['microbatch']:7,}{s['tokens']:17,}"
            f"{s['flops_per_step'] / 1e12:12,.2f}"
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
    args, config = cli.Parser(__doc__).parse_with_config(argv)
    plan = describe(resolve_vocab(config))
    print(table(plan), flush=True)
    return plan


if __name__ == "__main__":
    cli.main(command)
