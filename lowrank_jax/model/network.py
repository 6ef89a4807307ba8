"""The network: a pre-norm transformer with low-rank attention, ALiBi and SwiGLU.

Only this file uses Flax NNX. Outside, parameters are a plain nested dict whose block weights are stacked over layers,
and the model is three pure functions: `init`, `features`, `logits`. inference/decoder.py adds the cache.

Shape legend, used by every file: B batch, T query length, S key length, D model, H heads, K head width (D/H), R rank,
F mlp, V vocabulary, N layers. A name ends in its shape: `x_BTD`. Weights are [in, out], so `x @ w`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lowrank_jax.config import ModelConfig
from lowrank_jax.machine.sharding import ROWS, TENSOR, constrain
from lowrank_jax.model import attention

EPS = 1e-6


def rms_norm(x: jax.Array) -> jax.Array:
    """Return x / sqrt(mean(x^2) + EPS) over the last axis, computed in fp32 (arXiv 1910.07467, without its gain)."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + EPS)).astype(x.dtype)


def norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    """Return rms_norm(x) * gain."""
    # XLA's compiler for CPUs: [1, 1024, 512] forward and backward took 7.5 ms on 2 cores, [1024, 512] takes 0.7.
    rows = x[0] if x.ndim == 3 and len(x) == 1 else x
    return (rms_norm(rows) * gain).reshape(x.shape)


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Return silu(gate) * up. The gradient computes silu again; JAX would keep two more arrays per layer."""
    return jax.nn.silu(gate) * up


def _swiglu_backward(saved, g):
    gate, up = saved
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return g * up * (sigmoid + silu * (1 - sigmoid)), g * silu


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)


class Norm(nnx.Module):
    def __init__(self, width: int):
        self.gain = nnx.Param(jnp.ones(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        return norm(x, self.gain[...])


class Linear(nnx.Module):
    """x @ kernel, or x @ down @ up with `rank`: rank (d_in + d_out) weights instead of d_in d_out.

    down ~ N(0, s/d_in) and up ~ N(0, s/d_out) are as large as U sqrt(S) and sqrt(S) V^T of the SVD of a dense matrix
    with variance 1/d_in. Its singular values reach 1 + sqrt(d_out/d_in) (Marchenko-Pastur), and s = 0.9 of that is
    about the mean of those that a rank of D/8 keeps. With N(0, 1/d_in) and N(0, 1/rank), whose product has the variance
    of a dense matrix, models ended 0.0091 +- 0.0094 bits per byte higher (docs/results.md).

    `zero` starts the map at zero through its last factor. Without `has_down` it only expands, the latent of another
    map. `matmul` multiplies by all its weights (`precision.Policy`).
    """

    def __init__(self, matmul: Callable, rngs: nnx.Rngs, d_in: int, d_out: int, rank=0, zero=False, has_down=True):
        self.matmul = matmul
        normal = lambda *shape, std: nnx.Param(std * jax.random.normal(rngs.params(), shape))
        if not rank:
            self.kernel = normal(d_in, d_out, std=0.0 if zero else d_in**-0.5)
            return
        s = 0.9 * (1 + (d_out / d_in) ** 0.5)
        if has_down:
            self.down = normal(d_in, rank, std=(s / d_in) ** 0.5)
        self.up = normal(rank, d_out, std=0.0 if zero else (s / d_out) ** 0.5)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.expand(self.reduce(x))

    def reduce(self, x: jax.Array) -> jax.Array:
        """Return the latent [..., rank] of x [..., d_in]; without factors, the result [..., d_out]."""
        return self.matmul(x, self.down[...] if hasattr(self, "up") else self.kernel[...])

    def expand(self, c: jax.Array) -> jax.Array:
        """Return the result [..., d_out] of a latent [..., rank]."""
        return self.matmul(c, self.up[...]) if hasattr(self, "up") else c


class Embedding(nnx.Module):
    """Token table, also the head where the model is `tied`; with `embed_rank` E it is [V, E] @ [E, D], up ~ N(0, 1/E).

    The table is N(0, (4/D)^2). In a new model, whose blocks are zero maps, the logit of repeating a token is D times
    the deviation: 4 is small in a softmax over thousands. With N(0, 1/D) the quickstart began at 9.0 bits per byte
    instead of 4.4, and ended at the same loss.
    """

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        width = c.embed_rank or c.d
        self.table = nnx.Param(4 / c.d * jax.random.normal(rngs.params(), (c.vocab, width)))
        self.up = nnx.Param(width**-0.5 * jax.random.normal(rngs.params(), (width, c.d))) if c.embed_rank else None

    def __call__(self, tokens: jax.Array) -> jax.Array:
        # All of the width is gathered: both uses need it, and the partitioner would move activations instead.
        rows = constrain(self.table[...], TENSOR)[tokens]
        return rows if self.up is None else rows @ self.up[...]

    def head(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.table[...], x if self.up is None else x @ self.up[...].T


def all_heads(c: ModelConfig, x: jax.Array) -> jax.Array:
    """Return [..., H, K] of the keys or values [..., kv_heads, K], each repeated for the query heads that read it."""
    return jnp.repeat(x, c.heads // c.kv_heads, axis=-2) if c.kv_heads else x


class Attention(nnx.Module):
    """Low-rank Q, K, V and O; those of rank 0 are dense. With `shared_kv`, the latent of K is also that of V."""

    def __init__(self, c: ModelConfig, matmul: Callable, rngs: nnx.Rngs):
        self.c = c
        rank_q, rank_k, rank_v, rank_o = c.ranks
        self.q = Linear(matmul, rngs, c.d, c.d, rank_q)
        self.k = Linear(matmul, rngs, c.d, c.kv_dim, rank_k)
        self.v = Linear(matmul, rngs, c.d, c.kv_dim, rank_v, has_down=not c.shared_kv)
        self.o = Linear(matmul, rngs, c.d, c.d, rank_o, zero=True)

    def _latent(self, x: jax.Array, linear: Linear) -> jax.Array:
        """Return the latent, normalised with `latent_norm`. The norm has no gain: `up` would absorb it."""
        c = linear.reduce(x)
        return constrain(rms_norm(c) if self.c.latent_norm and hasattr(linear, "up") else c, ROWS)

    def _heads(self, c: jax.Array, linear: Linear) -> jax.Array:
        return linear.expand(c).reshape(*c.shape[:-1], -1, self.c.head_dim)

    def __call__(self, x_BTD: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
        k_BTR = self._latent(x_BTD, self.k)
        v_BTR = k_BTR if self.c.shared_kv else self._latent(x_BTD, self.v)
        q_BTHK = self._heads(self._latent(x_BTD, self.q), self.q)
        k_BTHK, v_BTHK = (all_heads(self.c, self._heads(c, w)) for c, w in ((k_BTR, self.k), (v_BTR, self.v)))
        q_BTHK, k_BTHK, v_BTHK = (constrain(x, ROWS, None, TENSOR) for x in (q_BTHK, k_BTHK, v_BTHK))
        o_BTHK = attention.attend(q_BTHK, k_BTHK, v_BTHK, segments_BT, self.c.attention)
        return self.o(o_BTHK.reshape(x_BTD.shape))


class MLP(nnx.Module):
    """SwiGLU (arXiv 2002.05202): (silu(x W_gate) * x W_up) W_out."""

    def __init__(self, c: ModelConfig, matmul: Callable, rngs: nnx.Rngs):
        self.gate = Linear(matmul, rngs, c.d, c.hidden, c.mlp_rank)
        self.up = Linear(matmul, rngs, c.d, c.hidden, c.mlp_rank)
        self.out = Linear(matmul, rngs, c.hidden, c.d, c.mlp_rank, zero=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate_F, up_F = (constrain(y, ROWS, *[None] * (y.ndim - 2), TENSOR) for y in (self.gate(x), self.up(x)))
        return self.out(swiglu(gate_F, up_F))


class Block(nnx.Module):
    def __init__(self, c: ModelConfig, matmul: Callable, rngs: nnx.Rngs):
        self.attention_norm, self.attention = Norm(c.d), Attention(c, matmul, rngs)
        self.mlp_norm, self.mlp = Norm(c.d), MLP(c, matmul, rngs)

    def __call__(self, x_BTD, segments_BT):
        x_BTD = constrain(x_BTD + self.attention(self.attention_norm(x_BTD), segments_BT), ROWS)
        return constrain(x_BTD + self.mlp(self.mlp_norm(x_BTD)), ROWS)


def init(c: ModelConfig, key: jax.Array) -> dict:
    """Return fp32 parameters {"embed", "blocks", "norm"}, and an untied model's "head", shaped as the embedding.

    Every array under "blocks" has the layers [N] in front.
    """
    embed_key, blocks_key = jax.random.split(key)
    weights = lambda module: nnx.to_pure_dict(nnx.state(module, nnx.Param))
    block = lambda key: weights(Block(c, jnp.matmul, nnx.Rngs(key)))
    params = {
        "embed": weights(Embedding(c, nnx.Rngs(embed_key))),
        "blocks": jax.vmap(block)(jax.random.split(blocks_key, c.layers)),
        "norm": weights(Norm(c.d)),
    }
    if not c.tied:
        params["head"] = weights(Embedding(c, nnx.Rngs(jax.random.fold_in(embed_key, 1))))
    return params


def features(
    c: ModelConfig, params: dict, tokens_BT, segments_BT=None, dtype=jnp.float32, matmul: Callable = jnp.matmul
) -> jax.Array:
    """Return the normalised last hidden states [B, T, D] in `dtype`; `matmul` multiplies by the blocks' weights."""
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    over_layer = lambda x_BTD, weights: (block(c, weights, x_BTD, segments_BT, matmul), None)
    x_BTD = constrain(embed(c, params, tokens_BT), ROWS)
    # With `scan` one compiled body serves all layers; without it each layer has its own.
    over_layer = jax.checkpoint(over_layer) if c.remat else over_layer
    x_BTD, _ = jax.lax.scan(over_layer, x_BTD, params["blocks"], unroll=1 if c.scan else c.layers)
    return _bind(lambda: Norm(c.d), params["norm"])(x_BTD)


def embed(c: ModelConfig, params: dict, tokens_BT: jax.Array) -> jax.Array:
    """Return the first block's input [B, T, D]."""
    return _embedding(c, params["embed"])(tokens_BT)


def block(c: ModelConfig, weights: dict, x_BTD, segments_BT=None, matmul: Callable = jnp.matmul) -> jax.Array:
    """Return the output [B, T, D] of one block, whose weights are not stacked."""
    return _bind(lambda: Block(c, matmul, nnx.Rngs(0)), weights)(x_BTD, segments_BT)


def head(c: ModelConfig, params: dict, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (table [V, E], hidden states [..., E]) whose product is the logits of the final hidden states [..., D]."""
    weights = jax.tree.map(lambda w: w.astype(x.dtype), params["embed" if c.tied else "head"])
    return _embedding(c, weights).head(x)


def logits(c: ModelConfig, params: dict, x: jax.Array) -> jax.Array:
    """Return the logits [..., V] in fp32 of the final hidden states [..., D]."""
    table_VE, x = head(c, params, x)
    return jnp.einsum("...E,VE->...V", x, constrain(table_VE, TENSOR), preferred_element_type=jnp.float32)


def _bind(make: Callable, weights: dict) -> nnx.Module:
    """Return the module with these weights. Building it is abstract: no arrays, and nothing in the compiled program."""
    graph, state = nnx.split(nnx.eval_shape(make))
    nnx.replace_by_pure_dict(state, weights)
    return nnx.merge(graph, state)


def _embedding(c: ModelConfig, weights: dict) -> Embedding:
    return _bind(lambda: Embedding(c, nnx.Rngs(0)), weights)
