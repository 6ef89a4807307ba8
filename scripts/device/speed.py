"""Time the training step of presets on this accelerator, beside the dense twin, with MFU and the top kernels.

    python scripts/device/speed.py               # one JSON object a line; --small: toy sizes on a CPU

The step is the program that `main` compiles with the preset's own settings (`memory.fit`). Only two settings differ:
one length instead of a plan of lengths, and for `1b` 4 microbatches a step instead of 16, which counts its optimizer
four times. A step is timed from its call until its metrics are on the host; figures are medians, after a first step.

MFU is model FLOPs over the chip's published peak for dense bf16 products, for fp8 too. Model FLOPs are those of
`costs.train_flops_per_token`: 6 per weight used and token, and causal attention; rematerialisation does not count.
`roofline` is the least time of the compiled program by the chip's peaks (`roofline.estimate`) over the measured time.
Kernels come from jax.profiler's trace of a step, which jax.profiler.ProfileData reads.
"""

import collections
import dataclasses
import gc
import glob
import math
import os
import re
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

from lowrank_jax import cli
from lowrank_jax.config import RunConfig, RunFailure
from lowrank_jax.model import costs
from scripts.device import part

STEPS = 5  # timed, or fewer where they would take longer than SECONDS
SECONDS = 6.0
TOP = 12  # kernels of a trace that are listed
SLICES = {"1b": 2**17}  # tokens of a step, where the preset's own step takes many seconds
TINY = {"model.d": 64, "model.layers": 2, "model.heads": 4, "model.rank": 16, "tokenizer.vocab_size": 256}
TINY |= {"pretrain.tokens_per_step": 512, "pretrain.microbatch_tokens": 256}
UNROLLED = {"model.scan": False, "model.remat": False}  # less traffic, where the preset has a scan
LEAN = {"model.scan": True, "model.remat": True}  # less memory and faster to compile
MFU, TWIN, FP8 = 0.5, 1.15, 1.15  # least MFU, and least ratio to the dense twin and of fp8 to bf16: `1b`, 4,096 tokens
MAIN = "step of 1b, 4096 tokens"
KINDS = {  # the first whose pattern occurs in a kernel's name
    "attention": r"fmha|sdpa|flash|attention|lowrank_attend",
    "matmul": r"gemm|nvjet|cutlass|cublas|xmma|\bdot|convolution",
    "copy": r"copy|memcpy|memset|transpose|dynamic.(update.)?slice|concatenate|scatter|gather",
}


def arms(small: bool) -> list[dict]:
    """Return the arms, most important first: the bounds' own, each preset and length in bf16, changed settings, fp8."""
    order = [("1b", 4096), ("base", 1024), ("custom", 1024), ("base", 4096), ("custom", 4096), ("1b", 1024)]
    order = [("1b", 64)] if small else order
    in_bf16 = [(*shape, "bf16", model, {}) for shape in order for model in ("low rank", "dense")]
    in_fp8 = [(*shape, "fp8", model, {}) for model in ("low rank", "dense") for shape in order]
    changed = [(preset, 1024, "bf16", "low rank", UNROLLED) for preset in ("base", "custom")]
    changed += [("1b", 4096, "bf16", "low rank", LEAN)]
    plan = [*in_bf16[:2], in_fp8[0], *in_bf16[2:6], *changed, *in_bf16[6:], *in_fp8[1:]]
    names = ("preset", "length", "precision", "model", "changes")
    rows = [dict(zip(names, arm)) for arm in (plan[:3] if small else plan)]
    return [{"check": name_of(arm), "small": small, "trace": arm["model"] == "low rank"} | arm for arm in rows]


def name_of(arm: dict) -> str:
    settings = [f"{key.removeprefix('model.')}={value}" for key, value in arm["changes"].items()]
    settings += ["dense twin"] if arm["model"] == "dense" else []
    return ", ".join([f"step of {arm['preset']}, {arm['length']} tokens, {arm['precision']}", *settings])


def config_of(arm: dict) -> RunConfig:
    """Return the preset's own config with one length, one precision and a known vocabulary."""
    from lowrank_jax.training import forecast

    preset = arm["preset"]
    changes = {
        "pretrain.block": arm["length"],
        "pretrain.auto_grow": False,
        "sft.steps": 0,
        "precision": arm["precision"],
    }
    changes |= {"pretrain.steps": 1000} | ({"pretrain.tokens_per_step": SLICES[preset]} if preset in SLICES else {})
    changes |= arm.get("changes", {}) | (TINY if arm["small"] else {})
    path = f"{part.ROOT}/configs/" + ("custom.py" if preset == "custom" else f"preset.py:{preset}")
    config = cli.read_config([f"--config={path}", *(f"--config.{key}={value}" for key, value in changes.items())])
    if arm["model"] == "dense":
        config = dataclasses.replace(config, model=costs.dense_twin(config.model))
    return forecast.resolve_vocab(config)


def mfu(config: RunConfig, length: int, tokens_per_s: float, peak_flops: float | None) -> float | None:
    """Return model FLOPs per second over the chip's peak; None for a chip whose peak is unknown."""
    flops = costs.train_flops_per_token(config.model, length)
    return flops * tokens_per_s / peak_flops if peak_flops else None


def measure(arm: dict) -> dict:
    """Return the figures of one arm's step."""
    cli.use_compilation_cache()
    import jax

    from lowrank_jax.training import memory
    from lowrank_jax.training.plan import make, unchanged

    gc.collect()  # the last arm's arrays
    config = config_of(arm)
    plan = make(config, jax.devices()[:1])
    (stage,) = plan.stages
    started = time.perf_counter()
    fit = memory.fit(config, unchanged(stage), plan.mesh, memory.limit_bytes(config, plan.mesh))
    if not fit.fits:
        return {"ok": False, "reason": memory.refusal(fit)}
    facts = {"compile_seconds": round(time.perf_counter() - started, 1)}
    run = stepper(config, fit)
    run()
    seconds = [run()]
    seconds += [run() for _ in range(min(STEPS, int(SECONDS / seconds[0])) - 1)]
    facts |= figures(config, plan, fit, statistics.median(seconds)) | {"timed_steps": len(seconds)}
    return facts | (trace(run) if arm["trace"] else {})


def stepper(config: RunConfig, fit):
    """Return a function that trains a step of the fitted program on random tokens, and returns its seconds."""
    import jax

    from lowrank_jax.training import step
    from scripts.bench import harness

    state, batch = step.first_state(config, step.init_params(config)), harness.random_batch(config, fit.stage)

    def run() -> float:
        nonlocal state
        started = time.perf_counter()
        state, metrics = fit.program(state, batch)
        loss = float(jax.device_get(metrics)["loss"])
        seconds = time.perf_counter() - started
        if not math.isfinite(loss):
            raise RunFailure(f"the loss is {loss}")
        return seconds

    return run


def figures(config: RunConfig, plan, fit, seconds: float) -> dict:
    """Return speed, MFU and share of the roofline of a step that takes so many seconds."""
    import jax

    from lowrank_jax.machine import devices
    from lowrank_jax.training import forecast

    stage, chip = fit.stage, devices.chip(jax.devices()[0])
    tokens_per_s = stage.tokens_per_step / seconds
    share = mfu(config, stage.seq_len, tokens_per_s, chip and chip.peak_flops)
    text = fit.program.as_text()
    described = forecast.describe(config, plan, [fit], None, {stage.name: text})["stages"][0]
    names = ("attention_kernel", "note", "remat", "batch", "microbatch", "peak_bytes_per_device", "f8_matmuls")
    facts = {"seconds": seconds, "tokens_per_s": tokens_per_s, "mfu": share} | {name: described[name] for name in names}
    if least := described["est_step_seconds"]:
        facts |= {"roofline": least / seconds, "roofline_bound": described["est_bound"]}
        facts |= {f"roofline_{what}_ms": 1e3 * described[f"{what}_seconds"] for what in ("compute", "memory")}
    return facts


def trace(run) -> dict:
    """Return the kernels of a step that `run` trains."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            seconds = run()
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        times = kernel_times(jax.profiler.ProfileData.from_file(path))
    return {"traced_step_ms": 1e3 * seconds} | summary(times)


def summary(times: dict[str, tuple[float, int]]) -> dict:
    """Return the longest kernels of `kernel_times`, and the milliseconds of each of KINDS."""
    total, kinds = sum(ms for ms, _ in times.values()), collections.Counter()
    for name, (ms, _) in times.items():
        kinds[next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.I)), "other")] += ms
    longest = sorted(times.items(), key=lambda item: -item[1][0])[:TOP]
    top = [
        {"kernel": name[:100], "ms": round(ms, 2), "calls": n, "share": round(ms / total, 3)}
        for name, (ms, n) in longest
    ]
    kinds = {kind: round(ms, 2) for kind, ms in kinds.most_common()}
    return {"kernels_ms": total, "kinds_ms": kinds, "top_kernels": top}


def kernel_times(profile) -> dict[str, tuple[float, int]]:
    """Return {kernel: (milliseconds, calls)} of a trace; kernels that differ in their number alone count as one.

    A GPU's kernels are the events of its streams, a TPU's those of `XLA Ops`, and a CPU's those that name an operation
    of XLA and are no loop or call, whose events contain others.
    """
    times, planes = {}, list(profile.planes)
    on_device = [plane for plane in planes if re.match(r"/device:(GPU|TPU)", plane.name)]
    for line in (line for plane in on_device or planes for line in plane.lines):
        for event in line.events if not on_device or re.match("Stream|XLA Ops", line.name) else ():
            name = re.sub(r"([._]\d+)+$", "", event.name)
            if on_device or any(key == "hlo_op" for key, _ in event.stats) and not re.match("while|call|condit", name):
                ms, calls = times.get(name, (0.0, 0))
                times[name] = ms + event.duration_ns / 1e6, calls + 1
    return times


def judge(rows: list[dict]) -> list[dict]:
    """Return the ratios of the rows so far, and the bounds of `1b` at 4,096 tokens in bf16."""
    speed = {row["check"]: row["tokens_per_s"] for row in rows if "tokens_per_s" in row}
    shares = {row["check"]: row["mfu"] for row in rows if row.get("mfu")}
    results = []
    for name in (name for name in speed if "twin" not in name):
        is_main, twin = name.startswith(MAIN), f"{name}, dense twin"
        if "=" in name:
            others = [(", ".join(name.split(", ")[:3]), "the preset's own settings", None)]
        elif name.endswith("fp8"):
            others = [(name.replace("fp8", "bf16"), "bf16", FP8 if is_main else None), (twin, "dense twin", None)]
        else:
            others = [(twin, "dense twin", TWIN if is_main else None)]
            results += [part.bound(f"MFU, {name}", shares[name], MFU)] if is_main and name in shares else []
        ratios = [(than, speed[name] / speed[other], least) for other, than, least in others if other in speed]
        results += [part.bound(f"{name} / {than}", ratio, least) for than, ratio, least in ratios]
    return results


if __name__ == "__main__":
    part.main(__file__, arms, measure, judge)
