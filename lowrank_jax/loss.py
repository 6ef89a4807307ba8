"""The one loss of pretraining, SFT and evaluation: a weighted sum over tokens, divided by nobody here."""

import jax
import jax.numpy as jnp


def cross_entropy_sum(logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """Sum of weight x negative log-likelihood in nats, in fp32.

    It is a sum so that accumulated microbatches with different numbers of trained tokens weigh every token alike: the
    caller adds sums and counts, and divides once.
    """
    return objective_sum(logits_BTV, targets_BT, weights_BT)[1]


def objective_sum(
    logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """(what training makes smaller, the cross-entropy in it), both as sums of nats over weighted tokens.

    `smoothing` spreads that share of each target evenly over the vocabulary (Szegedy et al., arXiv 1512.00567, section
    7); `z_loss` x log(Z)^2 keeps the softmax's normaliser Z near 1 (PaLM, arXiv 2204.02311, section 5).
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    cross_entropy = objective = jnp.sum((log_z_BT - picked_BT) * weights_BT)
    if smoothing:
        uniform = jnp.sum((log_z_BT - logits_BTV.mean(axis=-1)) * weights_BT)
        objective = (1 - smoothing) * cross_entropy + smoothing * uniform
    if z_loss:
        objective += z_loss * jnp.sum(log_z_BT**2 * weights_BT)
    return objective, cross_entropy
