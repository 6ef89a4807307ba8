"""The loss of pretraining, SFT and evaluation: a sum over weighted tokens, which the caller divides once.

A sum lets accumulated microbatches with different numbers of trained tokens weigh every token alike.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lowrank_jax.machine import sharding

# Tokens whose logits a device has at once. With fewer, adding up the table's gradient (8 V E bytes per part) takes a
# TPU v5e more than a sixth of the time of the products (6 V E FLOPs per token).
TOKENS = 2048


def objective_sum(
    logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Return (the objective of training, the cross-entropy in it), both in fp32 as sums of nats over weighted tokens.

    `smoothing` spreads that share of each target evenly over the vocabulary (Szegedy et al., arXiv 1512.00567, section
    7). `z_loss` x log(Z)^2 keeps the softmax's normaliser Z near 1 (PaLM, arXiv 2204.02311, section 5).
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    picked_BT = _pick(logits_BTV, targets_BT)
    cross_entropy = objective = jnp.sum((log_z_BT - picked_BT) * weights_BT)
    if smoothing:
        uniform = jnp.sum((log_z_BT - logits_BTV.mean(axis=-1)) * weights_BT)
        objective = (1 - smoothing) * cross_entropy + smoothing * uniform
    if z_loss:
        objective += z_loss * jnp.sum(log_z_BT**2 * weights_BT)
    return objective, cross_entropy


@jax.custom_jvp
def _pick(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Return each token's logit of its target, with a gradient that compares instead of scattering, except on a CPU.

    A scatter into all logits keeps XLA from fusing the gradient of the softmax: by a GPU's compiler, a step of `base`
    moved 238 GB through memory, and 213 without it. A CPU took 7% to 19% longer to compare.
    """
    return _take(logits_BTV, targets_BT)


def _take(logits_BTV, targets_BT):
    return jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]


def _compare(logits_BTV, targets_BT):
    is_target_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
    return jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1)


@_pick.defjvp
def _pick_tangent(primals, tangents):
    (logits_BTV, targets_BT), (tangent_BTV, _) = primals, tangents
    tangent_BT = jax.lax.platform_dependent(tangent_BTV, targets_BT, cpu=_take, default=_compare)
    return _pick(logits_BTV, targets_BT), tangent_BT


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def through_head(table_VE, x_BTE, targets_BT, weights_BT, scale=1.0, smoothing: float = 0.0, z_loss: float = 0.0):
    """Return (`scale` x the objective, the cross-entropy) of `objective_sum` for logits x table^T, in parts.

    A part is some tokens of every row, at most TOKENS on a device, so all logits are never in memory at once. Under
    differentiation, each part's gradient is computed while its logits are in memory. The gradients contain `scale` from
    the start, which fp16 needs. Only the first result has a gradient.
    """
    table_VE = sharding.constrain(table_VE, sharding.TENSOR)

    def add(sums, part):
        logits_BTV = jnp.einsum("BTE,VE->BTV", part[0], table_VE, preferred_element_type=jnp.float32)
        objective, nats = objective_sum(logits_BTV, *part[1:], smoothing, z_loss)
        return (sums[0] + scale * objective, sums[1] + nats), None

    rows = len(x_BTE) // sharding.context_size(*_row_axes(len(x_BTE)))
    # Devices have different rows: XLA inserts the all-reduce of these sums.
    return jax.lax.scan(add, (jnp.zeros(()), jnp.zeros(())), _parts(rows, x_BTE, targets_BT, weights_BT))[0]


def _forward(table_VE, x_BTE, targets_BT, weights_BT, scale, smoothing, z_loss):
    """Each device sums its own rows' gradient of the table over all parts; the devices add their sums once."""
    table_VE, axes = sharding.constrain(table_VE, sharding.TENSOR), _row_axes(len(x_BTE))
    scatter = sharding.FSDP in axes and x_BTE.shape[2] % sharding.context_size(sharding.FSDP) == 0

    def run(*arrays):
        objective, nats, grad_VE, grad_BTE = _with_gradients(*arrays, smoothing, z_loss)
        if scatter:
            grad_VE = jax.lax.psum_scatter(grad_VE, sharding.FSDP, scatter_dimension=1, tiled=True)
        if others := tuple(axis for axis in axes if not (scatter and axis == sharding.FSDP)):
            grad_VE = jax.lax.psum(grad_VE, others)
        if axes:
            objective, nats = jax.lax.psum((objective, nats), axes)
        return objective, nats, grad_VE, grad_BTE

    if axes:
        rows, whole = PartitionSpec(axes), PartitionSpec()
        table = PartitionSpec(None, sharding.FSDP) if scatter else whole
        specs = {"in_specs": (whole, rows, rows, rows, whole), "out_specs": (whole, whole, table, rows)}
        run = jax.shard_map(run, axis_names=set(axes), check_vma=False, **specs)
    objective, nats, *grads = run(table_VE, x_BTE, targets_BT, weights_BT, jnp.asarray(scale, jnp.float32))
    return (objective, nats), grads


def _with_gradients(table_VE, x_BTE, targets_BT, weights_BT, scale, smoothing, z_loss):
    """Return (scaled objective, cross-entropy, gradient of the table, gradient of x) of one device's rows."""

    def add(sums, part):
        x, targets, weights = part
        of_logits = lambda logits_BTV: objective_sum(logits_BTV, targets, weights, smoothing, z_loss)
        logits_BTV = jnp.einsum("BTE,VE->BTV", x, table_VE, preferred_element_type=jnp.float32)
        objective, pull, nats = jax.vjp(of_logits, logits_BTV, has_aux=True)
        grad_BTV = pull(scale)[0].astype(x.dtype)
        grad_VE = jnp.einsum("BTV,BTE->VE", grad_BTV, x, preferred_element_type=jnp.float32)
        new = scale * objective, nats, grad_VE
        return jax.tree.map(jnp.add, sums, new), jnp.einsum("BTV,VE->BTE", grad_BTV, table_VE)

    zero = jnp.zeros(()), jnp.zeros(()), jnp.zeros(table_VE.shape)
    parts = _parts(len(x_BTE), x_BTE, targets_BT, weights_BT)
    (objective, nats, grad_VE), grads = jax.lax.scan(add, zero, parts)
    return objective, nats, grad_VE.astype(table_VE.dtype), grads.swapaxes(0, 1).reshape(x_BTE.shape)


def _backward(smoothing, z_loss, grads, cotangents):
    """Scale the gradients by the objective's cotangent; the cross-entropy's is ignored."""
    return *(g * cotangents[0].astype(g.dtype) for g in grads), None, None, None


through_head.defvjp(_forward, _backward)


def _parts(rows: int, *arrays):
    """Reshape arrays [B, T, ...] to [n, B, T / n, ...], with the smallest n whose parts have at most TOKENS tokens.

    `rows` is the number of the B rows that one device has.
    """
    B, T = arrays[0].shape[:2]
    n = T // max((d for d in range(1, T + 1) if T % d == 0 and rows * d <= TOKENS), default=1)
    return tuple(x.reshape(B, n, T // n, *x.shape[2:]).swapaxes(0, 1) for x in arrays)


def _row_axes(rows: int) -> tuple[str, ...]:
    """Return the axes of the context's mesh that split so many rows."""
    axes = sharding.spec((rows,), sharding.ROWS)[0]
    return (axes,) if isinstance(axes, str) else axes or ()
