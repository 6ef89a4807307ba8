"""Compare attention kernels and precisions with exact results, and prove which kernel each preset's step contains.

    python scripts/device/numerics.py [--small] [--seconds=90]

Attention: each kernel's output and gradients against the formula in float64 on the same rounded inputs. The bound is
twice the error of the `reference` backend in the same type, plus a float32 rounding of the largest score, which ALiBi
makes large. That backend itself may be off by four roundings of its type.

Steps: loss and gradient in each precision against float32 on the CPU. The bound is twice the error of the same
precision on the CPU. A loss, whose error may vanish by chance, gets one rounding more, and float32 one for each of
about 20 operations of a layer.

Kernels: the memory gate compiles a step of each stage with two layers, one row and a small vocabulary. Its text must
call the device's own kernel.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax import cli
from lowrank_jax.config import RunConfig, UsageError
from lowrank_jax.machine import hlo, sharding
from lowrank_jax.model import attention
from lowrank_jax.training import memory, optim, step
from lowrank_jax.training.plan import stages_of, unchanged
from scripts.bench import harness
from scripts.device import rows

NAMES = ("output", "dq", "dk", "dv")
SHAPES = [(2, 512, 6, 16), (2, 512, 6, 32), (2, 512, 6, 64), (1, 2048, 2, 64), (4, 256, 1, 64)]
ODD = [(2, 301, 4, 32), (2, 45, 4, 64)]  # packed only
WIDE = (2, 512, 6, 128)  # last, as no preset has such heads and a failing kernel may take the process with it
SMALL = [(1, 128, 3, 16), (1, 96, 2, 64)], [(1, 45, 2, 32)]
PRESETS = ("preset.py:1b", "custom.py", "preset.py:base", "quickstart.py", "preset.py:small", "preset.py:7b")
COMPILERS = 4  # programs that are compiled at once
UNITS = {"bf16": 2.0**-8, "fp8": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-24}  # a rounding; fp8's sums are in bf16
PARTS = ("loss", "gradient")
CALLS = {"__cudnn$fmha": "cudnn", "tpu_custom_call": "splash", "lowrank_attend": "native"}
QUICK = {"cpu": {"xla_backend_optimization_level": 0}, "gpu": {"xla_gpu_autotune_level": 0}}  # to compile, not to run


def main() -> None:
    p = rows.start(__doc__)
    shapes, odd = SMALL if p.small else (SHAPES, ODD)
    cases = [(shape, packed) for shape in shapes for packed in (True, False)] + [(shape, True) for shape in odd]
    for shape, packed in cases:
        compare_kernels(p, jnp.bfloat16, shape, packed)
    prove_kernels(p, ["quickstart.py"] if p.small else PRESETS)
    compare_steps(p)
    if not p.small:
        compare_kernels(p, jnp.bfloat16, WIDE, True)
    for dtype in (jnp.float16, jnp.float32):
        for shape, packed in cases[2:4]:
            compare_kernels(p, dtype, shape, packed)


# ----------------------------------------------------------------------------------------------------------- attention


def compare_kernels(p: rows.Rows, dtype, shape: tuple, packed: bool) -> None:
    """Print a row for each backend that can run here; the first is the reference, which the others' bounds use."""
    arrays, segments_BT = inputs(dtype, shape), random_segments(shape) if packed else None
    exact = functools.cache(lambda: exact_attention(*arrays, segments_BT))
    errors = functools.cache(lambda kernel: relative_errors(run_attention(kernel, *arrays, segments_BT), exact()))
    platform = jax.default_backend()
    own = [kernel for kernel, where in attention.PLATFORMS.items() if where == platform]
    for kernel in ("reference", "chunked", *own):
        facts = {"kernel": kernel, "dtype": jnp.dtype(dtype).name, "shape": list(shape), "packed": packed}
        try:
            attention.resolve(kernel, platform, dtype, shape[3], shape[1])
        except UsageError as e:
            p.row("attention", None, **facts, reason=str(e))
            continue
        score = largest_score(shape, packed and kernel in ("cudnn", "splash"))
        check = functools.partial(within, kernel, dtype, errors, score)
        p.measure("attention", check, **facts)


def within(kernel: str, dtype, errors, score: float) -> tuple[bool, dict]:
    rounding = float(jnp.finfo(jnp.float32).eps) * score
    bounds = [2 * error + rounding for error in errors("reference")]
    if kernel == "reference":  # scores, probabilities, their gradients and the result: four roundings
        bounds = [2 * float(jnp.finfo(dtype).eps) + rounding] * len(NAMES)
    ok = all(error <= bound for error, bound in zip(errors(kernel), bounds))  # False for NaN
    return ok, {"errors": dict(zip(NAMES, errors(kernel))), "bounds": dict(zip(NAMES, bounds))}


def inputs(dtype, shape: tuple) -> list[np.ndarray]:
    """Return q, k, v and the gradient of the output, rounded to `dtype`."""
    draw = np.random.default_rng(shape)
    return [np.asarray(jnp.asarray(draw.standard_normal(shape, np.float32), dtype)) for _ in range(4)]


def random_segments(shape: tuple) -> np.ndarray:
    """Return documents of about 30 tokens, numbered from 1."""
    return 1 + np.cumsum(np.random.default_rng(9).random(shape[:2]) < 1 / 30, axis=1, dtype=np.int32)


def largest_score(shape: tuple, has_channels: bool) -> float:
    """Return the size of the largest score, as a kernel adds it up: ALiBi's, and 12 channels that number documents."""
    return float(attention.alibi_slopes(shape[2]).max()) * shape[1] + (6 * attention.APART if has_channels else 0)


def run_attention(kernel: str, q, k, v, g, segments_BT) -> list[np.ndarray]:
    """Return [output, dq, dk, dv] of one backend, computed on the device."""

    @jax.jit
    def run(q, k, v, g):
        out, pull = jax.vjp(lambda *qkv: attention.attend(*qkv, segments_BT, kernel), q, k, v)
        return out, *pull(g)

    with jax.default_matmul_precision("highest" if q.dtype == np.float32 else None):
        return [np.asarray(x, np.float64) for x in run(q, k, v, g)]


def exact_attention(q, k, v, g, segments_BT) -> list[np.ndarray]:
    """Return [output, dq, dk, dv] by the definition of ALiBi and the chain rule, in float64 on the host."""
    q, k, v, g = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, k, v, g))
    T, scale = q.shape[2], q.shape[3] ** -0.5
    distance = np.arange(T)[:, None] - np.arange(T)
    visible = (distance >= 0)[None, None]
    if segments_BT is not None:
        visible = visible & (segments_BT[:, None, :, None] == segments_BT[:, None, None, :])
    slopes = attention.alibi_slopes(q.shape[1]).astype(np.float64)[:, None, None]
    scores = np.where(visible, scale * (q @ k.swapaxes(2, 3)) - slopes * distance, -np.inf)
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    d_probs = g @ v.swapaxes(2, 3)
    d_scores = scale * probs * (d_probs - (d_probs * probs).sum(-1, keepdims=True))
    results = probs @ v, d_scores @ k, d_scores.swapaxes(2, 3) @ q, probs.swapaxes(2, 3) @ g
    return [x.swapaxes(1, 2) for x in results]


def relative_errors(ours: list, exact: list) -> list[float]:
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(ours, exact)]


# ------------------------------------------------------------------------------------------------- kernels in programs


def prove_kernels(p: rows.Rows, presets: Sequence[str]) -> None:
    """Print a row for each preset and length: the kernel that its compiled step calls. AdamW compiles faster."""
    with ThreadPoolExecutor(COMPILERS) as pool:
        for preset in presets:
            config = cli.read_config([f"--config={harness.ROOT}/configs/{preset}", "--config.optim.name=adamw"])
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab=512, layers=2))
            for stage in {stage.seq_len: stage for stage in reversed(stages_of(config))}.values():
                check = functools.partial(prove, config, stage)
                pool.submit(p.measure, "kernel in the program", check, config=preset, stage=stage.name)


def prove(config: RunConfig, stage) -> tuple[bool, dict]:
    """Return whether the platform's own kernel is in the step that the memory gate compiled."""
    mesh, platform = sharding.one_device(), jax.default_backend()
    stage = dataclasses.replace(stage, batch=1, microbatch=1)
    fit = memory.fit(config, unchanged(stage), mesh, memory.limit_bytes(config, mesh), options=QUICK.get(platform))
    kernels = kernels_in(fit.program.as_text())
    own = [kernel for kernel, where in attention.PLATFORMS.items() if where == platform]
    figures = {"chosen": fit.fitted.attention, "in_the_text": kernels, "note": fit.note}
    return list(kernels) == own == [fit.fitted.attention] and not fit.note, figures


def kernels_in(text: str) -> dict[str, int]:
    """Return {attention kernel: calls} of a compiled program."""
    targets = [i.target for i in hlo.running(text)]
    counts = {name: sum(target.startswith(prefix) for target in targets) for prefix, name in CALLS.items()}
    return {name: count for name, count in counts.items() if count}


# --------------------------------------------------------------------------------------------------------------- steps


def compare_steps(p: rows.Rows) -> None:
    """Print a row for each precision: the errors of a step's loss and gradient on the device."""
    own, cpu = jax.local_devices()[0], functools.cache(lambda: jax.local_devices(backend="cpu")[0])
    toy = functools.cache(lambda: toy_step(p.small))

    def run(precision: str, kernel: str, device, matmuls=None) -> list[np.ndarray]:
        config, stage, params, batch = toy()
        fitted = dataclasses.replace(unchanged(stage), precision=precision, attention=kernel)
        scale, rates = jnp.float32(2.0**10 if precision == "fp16" else 1), optim.rates(config.pretrain, params)
        gradient = lambda params, batch: step._loss_and_gradient(config, fitted, rates, params, batch, scale)
        with jax.default_device(device), jax.default_matmul_precision(matmuls):
            loss, grads = jax.jit(gradient)(*jax.device_put((params, batch), device))
        flat = np.concatenate([np.ravel(np.asarray(g, np.float64)) for g in jax.tree.leaves(grads)])
        return [np.asarray(loss, np.float64), flat]

    exact = functools.cache(lambda: run("fp32", "reference", cpu(), "highest"))

    def compare(precision: str, matmuls=None) -> tuple[bool | None, dict]:
        on_cpu = relative_errors(run(precision, "reference", cpu()), exact())
        errors = relative_errors(run(precision, "auto", own, matmuls), exact())
        unit = UNITS[precision] * (20 * toy()[0].model.layers if precision == "fp32" else 1)
        bounds = [2 * on_cpu[0] + unit, 2 * on_cpu[1] + (unit if precision == "fp32" else 0)]
        figures = {"errors": dict(zip(PARTS, errors)), "bounds": dict(zip(PARTS, bounds))}
        if precision == "fp32" and own.platform != "cpu" and not matmuls:
            return None, figures | {"reason": "JAX multiplies float32 in fewer bits on this device unless asked"}
        return all(error <= bound for error, bound in zip(errors, bounds)), figures

    for precision in UNITS:
        p.measure("step", functools.partial(compare, precision), precision=precision)
    if own.platform != "cpu":
        p.measure("step", functools.partial(compare, "fp32", "highest"), precision="fp32, highest")


def toy_step(small: bool):
    """Return (config, stage, params, batch) of a model that is wide enough for fp8."""
    sizes = {"d": 256, "layers": 2, "heads": 4, "rank": 64, "vocab": 512} if small else {"d": 512, "layers": 4}
    length = 64 if small else 512
    changes = [f"model.{key}={value}" for key, value in sizes.items()] + ["pretrain.steps=10", "model.vocab=512"]
    changes += [f"pretrain.tokens_per_step={2 * length}", f"pretrain.block={length}", "sft.steps=0"]
    path = f"--config={harness.ROOT}/configs/preset.py:small"
    config = cli.read_config([path, *(f"--config.{change}" for change in changes)])
    (stage,) = stages_of(config)
    draw = np.random.default_rng(0)
    # The first weights are zero in places, where gradients vanish: a model after some steps is not.
    params = jax.tree.map(
        lambda w: np.asarray(w) + 0.02 * draw.standard_normal(w.shape, np.float32), step.init_params(config)
    )
    shape = (stage.batch, stage.seq_len)
    tokens, targets = (draw.integers(0, config.model.vocab, shape, np.int32) for _ in range(2))
    segments = random_segments((*shape, 1, 1))
    weights = np.ones(shape, np.float32)
    return config, stage, params, {"tokens": tokens, "targets": targets, "segments": segments, "weights": weights}


if __name__ == "__main__":
    main()
