"""Where a training step's time goes: each of its parts by itself, forward and backward, beside its roofline.

The roofline of a part is the least time in which this machine can do its FLOPs (at the best product's rate) or move its
arguments and results once (at the best copy's), whichever takes longer.
"""

import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.config import RunConfig
from lowrank_jax.model import attention, costs, loss, network, precision
from lowrank_jax.training import optim, step
from lowrank_jax.training.plan import stages_of

ROUNDS = 7


def of_step(config: RunConfig, peak_flops: float, steps: int) -> list[dict]:
    """{part, ms, roofline_ms, gflops} of each part of a step, the whole step last; `ms` is the best of some runs."""
    (stage,) = stages_of(config)
    c, at_once = config.model, stage.microbatch * stage.seq_len
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    params = step.init_params(config)
    weights = jax.tree.map(lambda w: w[0], params["blocks"])
    x_BTD = normal(stage.microbatch, stage.seq_len, c.d)
    q_BTHK = normal(stage.microbatch, stage.seq_len, c.heads, c.head_dim)
    targets = jnp.asarray(rng.integers(0, c.vocab, x_BTD.shape[:2]), jnp.int32)
    often, once = stage.batch // stage.microbatch * c.layers, stage.batch // stage.microbatch
    per_layer = {name: costs.parameters(c)[name] / c.layers for name in ("attention", "mlp")}
    scores = 2 * at_once * stage.seq_len * c.d  # two products of half a square
    bandwidth = _bandwidth()
    found = []

    def measure(name, times, flops, run, *arguments):
        run = jax.jit(run)
        out = run(*arguments)
        moved = sum(x.nbytes for x in jax.tree.leaves((arguments, out)))
        seconds = best(lambda: jax.block_until_ready(run(*arguments)))
        least = max(flops / peak_flops, moved / bandwidth)
        row = {"part": name, "ms": 1e3 * times * seconds, "roofline_ms": 1e3 * times * least}
        found.append(row | {"gflops": flops / seconds / 1e9})

    gradient = lambda f: lambda g, *arguments: jax.vjp(f, *arguments)[1](g)
    measure("projections", often, 6 * at_once * per_layer["attention"], gradient(_projected), x_BTD, weights, x_BTD)
    attend = lambda q, k, v: attention.attend(q, k, v, jnp.zeros(targets.shape, jnp.int32))
    measure("attention", often, 3.5 * scores, gradient(attend), q_BTHK, q_BTHK, q_BTHK, q_BTHK)
    measure("mlp", often, 6 * at_once * per_layer["mlp"], gradient(_mlp), x_BTD, weights["mlp"], x_BTD)
    measure("norms", 2 * often, 0, gradient(network.norm), x_BTD, x_BTD, weights["mlp_norm"]["gain"])
    table_VE, x_BTE = network.head(c, params, x_BTD)
    head = lambda table, x: loss.through_head(table, x, targets, jnp.ones(targets.shape))[0]
    measure("head and loss", once, 6 * at_once * table_VE.size, jax.grad(head, (0, 1)), table_VE, x_BTE)
    make = optim.make(config.optim)
    update = lambda grads, state, params: make.update(grads, state, params)
    measure("optimizer", 1, 0, update, params, make.init(params), params)
    batch = {name: np.ones((stage.batch, stage.seq_len), dtype) for name, dtype in step.BATCH.items()}
    seconds = best(lambda: jax.block_until_ready(jax.device_put(batch)))
    moved = sum(x.nbytes for x in batch.values())
    found.append({"part": "input", "ms": 1e3 * seconds, "roofline_ms": 1e3 * moved / bandwidth, "gflops": 0.0})
    return [*found, _whole(config, stage, peak_flops, batch, steps)]


def _whole(config: RunConfig, stage, peak_flops: float, batch: dict, steps: int) -> dict:
    run, state = step.lower(config, stage).compile(), step.first_state(config, step.init_params(config))
    placed, seconds = jax.device_put(batch), math.inf
    for _ in range(steps + 1):
        started = time.perf_counter()
        state, metrics = run(state, placed)
        float(metrics["loss"])
        seconds = min(seconds, time.perf_counter() - started)
    flops = stage.batch * stage.seq_len * costs.train_flops_per_token(config.model, stage.seq_len)
    row = {"part": "the step", "ms": 1e3 * seconds, "roofline_ms": 1e3 * flops / peak_flops}
    return row | {"gflops": flops / seconds / 1e9}


def _projected(weights: dict, x: jax.Array) -> jax.Array:
    """x through the factors, or kernels, of Q, K, V and O, one after another so that all have the same shapes."""
    for name in "qkvo":
        for w in (
            weights["attention"][name][key] for key in ("down", "up", "kernel") if key in weights["attention"][name]
        ):
            x = precision.matmul(x, w)
    return x


def _mlp(weights: dict, x: jax.Array) -> jax.Array:
    through = lambda x, factors: functools.reduce(precision.matmul, factors.values(), x)
    gate, up = (through(x, weights[name]) for name in ("gate", "up"))
    return through(network.swiglu(gate, up), weights["out"])


def best(run) -> float:
    """Seconds of the fastest of some runs, behind one that is not counted."""
    run()
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _bandwidth() -> float:
    """Bytes a second that are read and written, of an addition to 256 MB."""
    x = jnp.ones(2**26)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    seconds = math.inf
    for _ in range(ROUNDS):
        started = time.perf_counter()
        x = add(x).block_until_ready()
        seconds = min(seconds, time.perf_counter() - started)
    return 2 * x.nbytes / seconds
