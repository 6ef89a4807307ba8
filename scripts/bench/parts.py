"""Time each part of a training step by itself, forward and backward, beside its roofline.

The roofline of a part is the time for its FLOPs at the rate of large products, or for moving its arguments and results
once at the rate of a large addition, whichever is longer.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.config import RunConfig
from lowrank_jax.model import attention, costs, loss, network, precision
from lowrank_jax.training import optim, step
from lowrank_jax.training.plan import stages_of
from scripts.bench import harness

ROUNDS = 7


def of_step(config: RunConfig, product_rate: float, steps: int) -> list[dict]:
    """Return {part, ms, roofline_ms, gflops} of each part of a step, the whole step last; `ms` is a median."""
    (stage,) = stages_of(config)
    c, micro_tokens = config.model, stage.microbatch * stage.seq_len
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    params = step.init_params(config)
    weights = jax.tree.map(lambda w: w[0], params["blocks"])
    x_BTD = normal(stage.microbatch, stage.seq_len, c.d)
    q_BTHK = normal(stage.microbatch, stage.seq_len, c.heads, c.head_dim)
    targets = jnp.asarray(rng.integers(0, c.vocab, x_BTD.shape[:2]), jnp.int32)
    microbatches = stage.batch // stage.microbatch
    per_layer_calls = microbatches * c.layers
    per_layer = {name: costs.parameters(c)[name] / c.layers for name in ("attention", "mlp")}
    scores = 2 * micro_tokens * stage.seq_len * c.d  # two products of half a square
    bandwidth = _bandwidth()
    rows = []

    def measure(name, times, flops, run, *arguments):
        run = jax.jit(run)
        out = run(*arguments)
        moved = sum(x.nbytes for x in jax.tree.leaves((arguments, out)))
        seconds = harness.median_seconds(lambda: jax.block_until_ready(run(*arguments)), ROUNDS)
        roofline = max(flops / product_rate, moved / bandwidth)
        row = {"part": name, "ms": 1e3 * times * seconds, "roofline_ms": 1e3 * times * roofline}
        rows.append(row | {"gflops": flops / seconds / 1e9})

    gradient = lambda f: lambda g, *arguments: jax.vjp(f, *arguments)[1](g)
    measure(
        "projections",
        per_layer_calls,
        6 * micro_tokens * per_layer["attention"],
        gradient(_projected),
        x_BTD,
        weights,
        x_BTD,
    )
    attend = lambda q, k, v: attention.attend(q, k, v, jnp.zeros(targets.shape, jnp.int32))
    measure("attention", per_layer_calls, 3.5 * scores, gradient(attend), q_BTHK, q_BTHK, q_BTHK, q_BTHK)
    measure("mlp", per_layer_calls, 6 * micro_tokens * per_layer["mlp"], gradient(_mlp), x_BTD, weights["mlp"], x_BTD)
    measure("norms", 2 * per_layer_calls, 0, gradient(network.norm), x_BTD, x_BTD, weights["mlp_norm"]["gain"])
    table_VE, x_BTE = network.head(c, params, x_BTD)
    head = lambda table, x: loss.through_head(table, x, targets, jnp.ones(targets.shape))[0]
    measure("head and loss", microbatches, 6 * micro_tokens * table_VE.size, jax.grad(head, (0, 1)), table_VE, x_BTE)
    make = optim.make(config.optim)
    update = lambda grads, state, params: make.update(grads, state, params)
    measure("optimizer", 1, 0, update, params, make.init(params), params)
    batch = {name: np.ones((stage.batch, stage.seq_len), dtype) for name, dtype in step.BATCH.items()}
    seconds = harness.median_seconds(lambda: jax.block_until_ready(jax.device_put(batch)), ROUNDS)
    moved = sum(x.nbytes for x in batch.values())
    rows.append({"part": "input", "ms": 1e3 * seconds, "roofline_ms": 1e3 * moved / bandwidth, "gflops": 0.0})
    run_step, _ = harness.compiled_step(config, stage)
    placed = jax.device_put(batch)
    seconds = harness.median_seconds(lambda: run_step(placed), steps)
    flops = stage.tokens_per_step * costs.train_flops_per_token(c, stage.seq_len)
    row = {"part": "the step", "ms": 1e3 * seconds, "roofline_ms": 1e3 * flops / product_rate}
    return [*rows, row | {"gflops": flops / seconds / 1e9}]


def _projected(weights: dict, x: jax.Array) -> jax.Array:
    """Return x after the factors, or kernels, of Q, K, V and O in a row: their shapes are alike."""
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


def _bandwidth() -> float:
    """Return the bytes per second that an addition to 256 MB reads and writes."""
    x = jnp.ones(2**26)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def run():
        nonlocal x
        x = add(x).block_until_ready()

    return 2 * x.nbytes / harness.median_seconds(run, ROUNDS)
