"""The plan as text: tables of stages, parameters, memory, collectives and estimated times."""

from lowrank_jax.machine import hlo


def text(plan: dict) -> str:
    """Return the plan of `forecast.describe` as tables."""
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
    return lines + _at_the_peaks([s for s in compiled if s["est_step_seconds"]])


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


def _at_the_peaks(timed: list[dict]) -> list[str]:
    if not timed:
        return []
    parts = ("compute", "memory", "network")
    head = f"{'at the peaks:':16}" + "".join(f"{part:>13}" for part in (*parts, "step"))
    lines = ["", "an estimate: the chip's published peaks, with everything overlapped; a real step takes longer"]
    lines.append(f"{head}  {'waits for':10}{'MFU':>6}{'whole stage':>13}")
    for s in timed:
        times = [*(s[f"{part}_seconds"] for part in parts), s["est_step_seconds"]]
        shown = f"{s['name']:16}" + "".join(f"{1e3 * seconds:10,.1f} ms" for seconds in times)
        lines.append(f"{shown}  {s['est_bound']:10}{s['est_mfu_bound']:6.0%}{s['est_stage_seconds'] / 3600:11,.1f} h")
    return [*lines, f"{'all stages':86}{sum(s['est_stage_seconds'] for s in timed) / 3600:11,.1f} h"]
