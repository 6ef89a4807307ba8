"""ALiBi and causal attention for training and prefill, with two interchangeable backends.

ALiBi (Press et al., arXiv 2108.12409): score_ij = q_i . k_j / sqrt(K) - m_h (i - j). There are no position weights,
so any length runs; positions count along the row, and shifting them changes nothing, so packed documents need a
segment mask only.

Shapes: B batch, T query length, S key length, H heads, K head width.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

MASKED = -1e30  # finite: -inf - -inf is NaN, and no causal row is ever fully masked (each query sees itself)

# Rows of queries per static chunk. Forward and backward on 2 CPU cores, H=8, K=32, 4096 tokens: 128 took 130 and
# 680 ms at T = 256 and 2048, 256 took 187 and 762, and jax.nn.dot_product_attention with a bias 272 and 3060.
CHUNK = 128


def alibi_slopes(heads: int) -> np.ndarray:
    """[H] slopes m_h: 2^(-8(h+1)/H) for a power of two, else the paper's interleaving.

    Interleaving: with n the largest power of two below H, the n slopes of n heads, then every second slope of 2n.
    """
    n = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (h + 1) / n) for h in range(n)]
    slopes += [2.0 ** (-4 * (2 * h + 1) / n) for h in range(heads - n)]
    return np.asarray(slopes, np.float32)


def alibi_bias(slopes_H: jax.Array, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
    """-m_h (i - j) in fp32, with the heads in front: [H, *query_positions.shape, S]."""
    distance = query_positions[..., None] - key_positions
    return -jnp.asarray(slopes_H).reshape(-1, *[1] * distance.ndim) * distance.astype(jnp.float32)


def attend(q_BTHK, k_BTHK, v_BTHK, segments_BT=None, backend: str = "auto") -> jax.Array:
    """Causal ALiBi attention of each token to the earlier tokens of its own segment; returns [B, T, H, K].

    `segments_BT` numbers the packed documents (None: one document a row). Scores and softmax are fp32. `backend` is
    `reference` (one T x T array, the definition), `chunked` (static query chunks), or `auto`, which is `chunked`.
    """
    run = {"auto": _chunked, "chunked": _chunked, "reference": _reference}[backend]
    return run(q_BTHK, k_BTHK, v_BTHK, segments_BT)


def _reference(q_BTHK, k_BTHK, v_BTHK, segments_BT):
    T, H, K = q_BTHK.shape[1:]
    at = jnp.arange(T)
    scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BTHK, preferred_element_type=jnp.float32) / math.sqrt(K)
    scores_BHTS += alibi_bias(alibi_slopes(H), at, at)
    visible = at[:, None] >= at
    if segments_BT is not None:
        visible = visible & (segments_BT[:, None, :, None] == segments_BT[:, None, None, :])
    probs_BHTS = jax.nn.softmax(jnp.where(visible, scores_BHTS, MASKED), axis=-1)
    return jnp.einsum("BHTS,BSHK->BTHK", probs_BHTS.astype(v_BTHK.dtype), v_BTHK)


def _chunked(q_BTHK, k_BTHK, v_BTHK, segments_BT):
    """Each chunk of queries meets only the keys up to its own end: half the square, and no T x T array."""
    T, H, K = q_BTHK.shape[1:]
    slopes_H = alibi_slopes(H)
    q, k, v = (x.swapaxes(1, 2) for x in (q_BTHK / math.sqrt(K), k_BTHK, v_BTHK))
    chunk = max(CHUNK, -(-T // 32))  # at most 32 chunks, so that compile time stays flat at long T
    out = []
    for start in range(0, T, chunk):
        stop = min(start + chunk, T)
        scores = jnp.einsum("BHTK,BHSK->BHTS", q[:, :, start:stop], k[:, :, :stop], preferred_element_type=jnp.float32)
        # A row of scores may be shifted by a constant under softmax: measuring every distance from the chunk's last
        # query makes the bias one row for all its queries.
        scores += alibi_bias(slopes_H, jnp.full((1,), stop - 1), jnp.arange(stop))
        if segments_BT is None:  # only the chunk's own square needs the causal mask
            causal = jnp.arange(start, stop)[:, None] >= jnp.arange(start, stop)
            scores = scores.at[..., start:].add(jnp.where(causal, 0.0, MASKED))
        else:
            visible = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)
            visible = visible & (segments_BT[:, start:stop, None] == segments_BT[:, None, :stop])
            scores = jnp.where(visible[:, None], scores, MASKED)
        out.append(jax.nn.softmax(scores, axis=-1).astype(v.dtype) @ v[:, :, :stop])
    return jnp.concatenate(out, axis=2).swapaxes(1, 2)
