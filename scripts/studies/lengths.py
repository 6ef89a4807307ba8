"""Bits per byte of a finished run by length and by position, on texts that it never read.

Blocks of the longest length, each from one document, are cut into rows of each length, so that all lengths have the
same targets. The control is the longest length with attention to the last tokens only.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.config import ModelConfig
from lowrank_jax.data import tokenizer
from lowrank_jax.model import attention, network
from lowrank_jax.training import trained
from scripts.studies import arms

BLOCKS = 8  # of the longest length, of each kind of text
EDGES = (0, 256, 512, 1024, 2048, 4096)  # between which positions are averaged
AT_ONCE = 8192  # tokens


def by_length(folder: str, lengths: tuple[int, ...]) -> dict:
    """Return {kind of text: {length: [bits per byte of all, then by position in the longest row]}}.

    The length "window" is the longest length with attention to the last `lengths[0]` tokens only.
    """
    run, longest = trained.open_run(folder), max(lengths)
    texts = {kind: blocks(run.tokenizer, texts, longest) for kind, texts in arms.unseen().items()}
    results = {kind: {str(length): bits(run, ids, length) for length in lengths} for kind, ids in texts.items()}
    for kind, ids in texts.items():
        results[kind]["window"] = bits(run, ids, longest, window=lengths[0])
    return results


def blocks(tok: tokenizer.Tokenizer, texts: list[str], length: int) -> np.ndarray:
    """Return the first length + 1 ids of the texts that are long enough, [BLOCKS, length + 1]."""
    ids = (tok.encode(text[: 12 * length])[: length + 1] for text in texts)
    return np.asarray(list(itertools.islice((x for x in ids if len(x) > length), BLOCKS)), np.int32)


def bits(run: trained.Trained, ids: np.ndarray, length: int, window: int = 0) -> list[float]:
    """Return bits per byte of ids [block, size + 1] in rows of `length`: of all, and between each two EDGES."""
    rows = lambda x: x.reshape(-1, length)
    tokens, targets = rows(ids[:, :-1]), rows(ids[:, 1:])
    count = max(1, AT_ONCE // length)
    parts = [
        losses(run.config.model, run.params, tokens[i : i + count], targets[i : i + count], window)
        for i in range(0, len(tokens), count)
    ]
    nats = np.concatenate(parts).reshape(len(ids), -1)
    size = run.tokenizer.byte_lengths()[ids[:, 1:]]
    spans = [(0, nats.shape[1]), *((a, b) for a, b in zip(EDGES, EDGES[1:]) if b <= nats.shape[1])]
    return [float(nats[:, a:b].sum() / math.log(2) / size[:, a:b].sum()) for a, b in spans]


@functools.partial(jax.jit, static_argnums=(0, 4))
def losses(c: ModelConfig, params: dict, tokens_BT, targets_BT, window: int) -> jax.Array:
    """Return the nats of each target, [B, T]; `window` 0 is attention to all earlier tokens."""
    x_BTD = features(c, params, tokens_BT, window) if window else network.features(c, params, tokens_BT)
    logits_BTV = network.logits(c, params, x_BTD)
    picked = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - picked


# ------------------------------------------------------------------------------- the network with a window of attention


def features(c: ModelConfig, params: dict, tokens_BT, window: int) -> jax.Array:
    """Return `network.features` of a model whose attention sees the last `window` tokens only."""
    x_BTD = network.embed(c, params, tokens_BT)
    for layer in range(c.layers):
        weights = jax.tree.map(lambda w: w[layer], params["blocks"])  # noqa: B023, called at once
        attended = _attention(c, weights["attention"], network.norm(x_BTD, weights["attention_norm"]["gain"]), window)
        x_BTD += attended
        h_BTD, mlp = network.norm(x_BTD, weights["mlp_norm"]["gain"]), weights["mlp"]
        x_BTD += _linear(network.swiglu(_linear(h_BTD, mlp["gate"]), _linear(h_BTD, mlp["up"])), mlp["out"])
    return network.norm(x_BTD, params["norm"]["gain"])


def _linear(x: jax.Array, weights: dict, normed: bool = False) -> jax.Array:
    """Return x @ kernel, or x @ down @ up, with a norm on the latent between them if `normed`."""
    if "kernel" in weights:
        return x @ weights["kernel"]
    latent = x @ weights["down"]
    return (network.rms_norm(latent) if normed else latent) @ weights["up"]


def _attention(c: ModelConfig, weights: dict, x_BTD: jax.Array, window: int) -> jax.Array:
    if c.shared_kv:
        weights = weights | {"v": weights["v"] | {"down": weights["k"]["down"]}}
    heads = lambda name: _linear(x_BTD, weights[name], c.latent_norm).reshape(*x_BTD.shape[:2], -1, c.head_dim)
    q_BTHK, k_BTHK, v_BTHK = heads("q"), *(network.all_heads(c, heads(name)) for name in "kv")
    return _linear(attend(q_BTHK, k_BTHK, v_BTHK, window).reshape(x_BTD.shape), weights["o"])


def attend(q_BTHK, k_BTHK, v_BTHK, window: int) -> jax.Array:
    """Return causal ALiBi attention to the last `window` tokens, the query's own included, [B, T, H, K]."""
    T, H, K = q_BTHK.shape[1:]
    parts, slopes_H = [], attention.alibi_slopes(H)
    for start in range(0, T, window):
        stop, first = min(start + window, T), max(start - window + 1, 0)
        i, j = jnp.arange(start, stop), jnp.arange(first, stop)
        scores = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK[:, start:stop], k_BTHK[:, first:stop]) / math.sqrt(K)
        scores += attention.alibi_bias(slopes_H, i, j)
        distance = i[:, None] - j
        visible = (distance >= 0) & (distance < window)
        probs = jax.nn.softmax(jnp.where(visible, scores, attention.MASKED), axis=-1)
        parts.append(jnp.einsum("BHTS,BSHK->BTHK", probs, v_BTHK[:, first:stop]))
    return jnp.concatenate(parts, axis=1)
