"""The plan as text: tables of stages, parameters, memory, collectives and estimated times."""

from lowrank_jax.machine import hlo


def text(plan: dict) -> str:
    """Return the plan of `forecast.describe` as tables."""
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
