"""The trained network as inference runs it: the same function of the same parameters, over a cache of latents.

`prepare` lays out the weights once. It gives each layer its own arrays, because slicing them out of a stack copies them
at every step; joins matrices that multiply the same input; and multiplies gains and scales in. `read` runs new tokens
against the cache: one token of every row is decoding, many tokens of one row are prefill.

Attention has two forms, which differ only in the order of multiplication; `absorbs` chooses the cheaper one. Expanded:
keys and values are rebuilt from the cached latents. Absorbed: U_K multiplies the query and U_V the average, so that all
heads read the latents themselves. Both are exact, because nothing nonlinear stands between a cached latent and the
heads (the associativity of DeepSeek-V2's MLA, arXiv 2405.04434, section 2.1.2, here without its RoPE exception).

Shapes, beside those of network.py: W tokens of the window, G groups of queries that read the same keys (1 absorbed,
`kv_heads` or H expanded), Q queries of a group (H T / G), E width of what they read.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowrank_jax.config import ModelConfig
from lowrank_jax.inference import quantize
from lowrank_jax.inference.quantize import times
from lowrank_jax.model import attention, network
from lowrank_jax.model.network import rms_norm

BLOCK = 128  # cached tokens per pass of attention: a row costs what it holds, whatever the size of the cache


class Layer(NamedTuple):
    """Weights [in, out] of one block; None is an identity, or a matrix that this form does not need."""

    latents: jax.Array  # [D, Rq + Rk + Rv], of widths instead of ranks where dense; without Rv for a shared latent
    q_up: jax.Array | None  # [Rq, D], divided by sqrt(K)
    k_up: jax.Array | None  # [Rk, D], or as wide as `kv_heads`
    v_up: jax.Array | None  # [Rv, D], likewise
    query: jax.Array | None  # [Rq, H Rk]: q_up times k_up, where that is less work
    k_heads: jax.Array | None  # [H, Rk, K]: k_up for the absorbed form, without `query`
    v_heads: jax.Array | None  # [H, Rv, K]: v_up for the absorbed form, reshaped once instead of at every step
    o_down: jax.Array | None  # [D, Ro]
    o_up: jax.Array  # [Ro, D], or [D, D] where dense
    mlp_in: jax.Array  # gate and up: [D, 2F], or [D, 2M] before the factors
    gate_up: tuple[jax.Array, jax.Array] | None  # with a rank M: [M, F] each
    mlp_out: tuple[jax.Array, ...]  # [F, D], or [F, M] and [M, D]


class Weights(NamedTuple):
    table: jax.Array  # [V, D], or [V, E] with a factored embedding
    table_up: jax.Array | None  # [E, D]
    head: tuple | None  # the head's own table and `up`, unless it is tied
    layers: tuple[Layer, ...]
    norm: jax.Array  # [D], in the type that `read` computes in and the cache is kept in


class Place(NamedTuple):
    """The place of new tokens: row b of them follows `starts_B[b]` cached tokens and `offset` tokens of the window."""

    starts_B: jax.Array
    offset: jax.Array | int = 0
    row: jax.Array | int = 0  # the cache's row of the first row


def absorbs(c: ModelConfig, T: int) -> bool:
    """Return True if T new tokens of a row need fewer multiplications absorbed than expanded."""
    _, k, v, _ = c.ranks
    return bool(c.rank) and T * c.heads * (k + v) <= (k + v) * c.kv_dim + T * 2 * c.d


@functools.partial(jax.jit, static_argnames=("c", "kind", "dtype"))
def prepare(c: ModelConfig, params: dict, kind: str, dtype) -> Weights:
    """Return the weights of `params` (see network.init) laid out for `read`, which computes in `dtype`.

    `kind` is one of quantize.KINDS. With int8 and int4, vectors stay in `dtype`. With int4 the embedding is int8,
    because the last hidden state is compared with its rows.
    """

    def keep(w, table=False):
        w = w.astype(dtype)
        if not kind.startswith("int") or w.ndim != 2:
            return w
        return quantize.pack(w, "int8", outputs=0) if table else quantize.pack(w, kind)

    layer = lambda n: jax.tree.map(keep, _layer(c, jax.tree.map(lambda w: w[n], params["blocks"])))
    tables = lambda w: (keep(w["table"], table=True), w["up"].astype(dtype) if "up" in w else None)
    head = None if c.tied else tables(params["head"])
    layers = tuple(map(layer, range(c.layers)))
    return Weights(*tables(params["embed"]), head, layers, keep(params["norm"]["gain"]))


def _layer(c: ModelConfig, block: dict) -> Layer:
    a, m, scale = block["attention"], block["mlp"], 1 / math.sqrt(c.head_dim)
    first = [a[name].get("down", a[name].get("kernel")) for name in "qkv"]  # None for V with the latent of K
    latents = jnp.concatenate([w for w in first if w is not None], axis=1)
    latents *= block["attention_norm"]["gain"][:, None]
    q_up = k_up = v_up = query = k_heads = v_heads = None
    rank_q, rank_k, _, rank_o = c.ranks
    if rank_q:
        q_up = a["q"]["up"] * scale
    else:
        latents = latents.at[:, : c.d].multiply(scale)
    o_down, o_up = (a["o"]["down"], a["o"]["up"]) if rank_o else (None, a["o"]["kernel"])
    if c.rank:
        k_up, v_up = a["k"]["up"], a["v"]["up"]
        k_RHK, v_RHK = (network.all_heads(c, w.reshape(len(w), -1, c.head_dim)) for w in (k_up, v_up))
        v_heads = v_RHK.swapaxes(0, 1)
        if rank_q and c.heads * rank_q * rank_k <= (rank_q + rank_k) * c.d:
            query = jnp.einsum("QHK,RHK->QHR", _by_head(c, q_up), k_RHK).reshape(rank_q, -1)
        else:
            k_heads = k_RHK.swapaxes(0, 1)
    first = "down" if c.mlp_rank else "kernel"
    mlp_in = jnp.concatenate([m["gate"][first], m["up"][first]], axis=1) * block["mlp_norm"]["gain"][:, None]
    gate_up = (m["gate"]["up"], m["up"]["up"]) if c.mlp_rank else None
    mlp_out = (m["out"]["down"], m["out"]["up"]) if c.mlp_rank else (m["out"]["kernel"],)
    return Layer(latents, q_up, k_up, v_up, query, k_heads, v_heads, o_down, o_up, mlp_in, gate_up, mlp_out)


def _by_head(c: ModelConfig, x):
    return x.reshape(*x.shape[:-1], c.heads, -1)


def empty_cache(c: ModelConfig, rows: int, size: int, dtype) -> dict[str, jax.Array]:
    """Return {"k": [N, rows, size, Rk], "v": [N, rows, size, Rv]}, or only "k" when K and V share their latent."""
    widths = {"k": c.ranks[1], "v": c.ranks[2]} if c.rank else {"k": c.kv_dim, "v": c.kv_dim}
    if c.shared_kv and c.rank:
        del widths["v"]
    return {name: jnp.zeros((c.layers, rows, size, R), dtype) for name, R in widths.items()}


def empty_window(c: ModelConfig, rows: int, size: int, dtype) -> tuple[dict, ...]:
    """Return room for latents that are not in the cache yet: for each layer {"k": [rows, size, Rk], ...}."""
    return tuple({name: x[n] for name, x in empty_cache(c, rows, size, dtype).items()} for n in range(c.layers))


def read(c: ModelConfig, w: Weights, cache: dict, window: tuple, tokens_BT, place: Place) -> tuple[jax.Array, tuple]:
    """Read T new tokens of B rows; return their normalised last hidden states [B, T, D] and the window with them.

    The cache is only read: XLA would copy all of it at every step of a loop that also writes to it.
    """
    x_BTD, windows = quantize.rows(w.table, tokens_BT, w.norm.dtype), []
    x_BTD = x_BTD if w.table_up is None else times(x_BTD, w.table_up)
    for n, layer in enumerate(w.layers):
        out_BTD, latents = _attention(c, layer, rms_norm(x_BTD), cache, n, window[n], place)
        x_BTD += out_BTD
        gate, up = jnp.split(times(rms_norm(x_BTD), layer.mlp_in), 2, axis=-1)
        if layer.gate_up:
            gate, up = times(gate, layer.gate_up[0]), times(up, layer.gate_up[1])
        x_BTD += functools.reduce(times, layer.mlp_out, jax.nn.silu(gate) * up)
        windows.append(latents)
    return rms_norm(x_BTD) * w.norm, tuple(windows)


def keep(cache: dict, window: tuple, starts_B, row=0) -> dict:
    """Return the cache with each row's window behind its `starts_B` tokens; all of the window must fit."""
    stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *window)
    for b in range(len(starts_B)):
        put = lambda old, new, b=b: jax.lax.dynamic_update_slice(old, new[:, b : b + 1], (0, row + b, starts_B[b], 0))
        cache = jax.tree.map(put, cache, stacked)
    return cache


def logits(w: Weights, x_BD: jax.Array) -> jax.Array:
    """Return fp32 logits [B, V] of normalised hidden states.

    The barrier keeps the product table @ x, in which XLA's CPU dot reads the table as it is stored. Transposed, 8 rows
    of 16,384 logits took 7 ms instead of 0.8.
    """
    table, up = w.head or (w.table, w.table_up)
    x_BD = x_BD if up is None else times(x_BD, up, outputs=0)
    if not isinstance(table, jax.Array) or x_BD.dtype != jnp.float32:
        return times(x_BD, table, outputs=0).astype(jnp.float32)
    return jax.lax.optimization_barrier(table @ x_BD.T).T


def _attention(c: ModelConfig, layer: Layer, x_BTD, cache: dict, n: int, window: dict, place: Place) -> tuple:
    """Return layer n's contribution to the residual stream, and its window with the new tokens' latents."""
    (B, T, _), (starts_B, offset, row) = x_BTD.shape, place
    absorbed = absorbs(c, T)
    q_BGQE, window = _queries(c, layer, x_BTD, window, offset)
    slopes_H11 = jnp.asarray(attention.alibi_slopes(c.heads))[:, None, None]

    def scores_and_values(latents: dict, distance_BTS, visible_BTS):
        k_BGSE, v_BGSE = _keys_values(c, layer, latents, absorbed)
        bias_BHTS = -slopes_H11 * distance_BTS[:, None].astype(jnp.float32)
        bias_BHTS = jnp.where(visible_BTS[:, None], bias_BHTS, attention.MASKED)
        s_BGQS = jnp.einsum("BGQE,BGSE->BGQS", q_BGQE, k_BGSE, preferred_element_type=jnp.float32)
        return s_BGQS + bias_BHTS.reshape(-1, *s_BGQS.shape[1:]), v_BGSE

    def mean(p_BGQS, v_BGSE):
        return jnp.einsum("BGQS,BGSE->BGQE", p_BGQS.astype(v_BGSE.dtype), v_BGSE, preferred_element_type=jnp.float32)

    # Softmax in one pass over blocks (Milakov & Gimelshein, arXiv 1805.02867). The window comes first: every query sees
    # a key in it, while the cache may be empty.
    query_T, key_W = offset + jnp.arange(T), jnp.arange(window["k"].shape[1])
    distance_TW = query_T[:, None] - key_W
    s, v = scores_and_values(window, distance_TW[None], (distance_TW >= 0)[None])
    top = s.max(-1, keepdims=True)
    p = jnp.exp(s - top)
    state = top, p.sum(-1, keepdims=True), mean(p, v)

    def add_block(i, state):
        top, total, acc = state
        key_S = i * BLOCK + jnp.arange(BLOCK)
        distance_BTS = (starts_B[:, None] + query_T)[..., None] - key_S
        block = lambda x: jax.lax.dynamic_slice(x, (n, row, i * BLOCK, 0), (1, B, BLOCK, x.shape[-1]))[0]
        s, v = scores_and_values(jax.tree.map(block, cache), distance_BTS, (key_S < starts_B[:, None])[:, None])
        higher = jnp.maximum(top, s.max(-1, keepdims=True))
        p, factor = jnp.exp(s - higher), jnp.exp(top - higher)
        return higher, total * factor + p.sum(-1, keepdims=True), acc * factor + mean(p, v)

    blocks = (jnp.max(starts_B) + BLOCK - 1) // BLOCK
    _, total, acc = jax.lax.fori_loop(0, blocks, add_block, state)
    o_BHTE = (acc / total).astype(x_BTD.dtype).reshape(B, c.heads, T, -1)
    o_BTHK = jnp.einsum("BHTR,HRK->BTHK", o_BHTE, layer.v_heads) if absorbed else o_BHTE.swapaxes(1, 2)
    o_BTD = o_BTHK.reshape(B, T, c.d)
    return times(o_BTD if layer.o_down is None else times(o_BTD, layer.o_down), layer.o_up), window


def _queries(c: ModelConfig, layer: Layer, x_BTD, window: dict, offset) -> tuple[jax.Array, dict]:
    """Return the new tokens' queries [B, G, Q, E], and the window with their latents at `offset`."""
    B, T, _ = x_BTD.shape
    rank_q, rank_k = c.ranks[0] or c.d, window["k"].shape[-1]
    parts = jnp.split(times(x_BTD, layer.latents), (rank_q, rank_q + rank_k)[: 1 + ("v" in window)], axis=-1)
    query_BTR, *latents = [rms_norm(c_BTR) for c_BTR in parts] if c.latent_norm and c.rank else parts
    query_BTR = query_BTR if c.ranks[0] else parts[0]
    new = dict(zip(("k", "v"), latents))
    window = jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, offset, 0)), window, new)
    absorbed = absorbs(c, T)
    if absorbed and layer.query is not None:
        q_BTHE = _by_head(c, times(query_BTR, layer.query))
    else:
        q_BTHE = _by_head(c, query_BTR if layer.q_up is None else times(query_BTR, layer.q_up))
        if absorbed:
            q_BTHE = jnp.einsum("BTHK,HRK->BTHR", q_BTHE, layer.k_heads)
    q_BHTE = q_BTHE.swapaxes(1, 2)
    groups = 1 if absorbed else c.kv_heads or c.heads
    return q_BHTE.reshape(B, groups, c.heads // groups * T, -1), window


def _keys_values(c: ModelConfig, layer: Layer, latents: dict, absorbed: bool) -> tuple[jax.Array, jax.Array]:
    """Return keys and values [B, G, S, E] of cached latents."""
    k_BSR, v_BSR = latents["k"], latents.get("v", latents["k"])
    if absorbed:
        return k_BSR[:, None], v_BSR[:, None]
    heads = lambda x: x.reshape(*x.shape[:-1], -1, c.head_dim).swapaxes(1, 2)
    expand = lambda x, up: heads(x if up is None else times(x, up))
    return expand(k_BSR, layer.k_up), expand(v_BSR, layer.v_up)
