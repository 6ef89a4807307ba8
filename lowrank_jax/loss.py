"""The one loss of pretraining, SFT and evaluation: a weighted sum over tokens, divided by nobody here."""

import jax
import jax.numpy as jnp


def cross_entropy_sum(logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """Sum of weight x negative log-likelihood in nats, in fp32.

    It is a sum so that accumulated microbatches with different numbers of trained tokens weigh every token alike: the
    caller adds sums and counts, and divides once.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jnp.sum((jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT) * weights_BT)
