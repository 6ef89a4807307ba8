"""The decoder on a CPU: decoder.read in C++ (cpp/decode.cc) for few tokens, in one call for all layers.

A step for one row is some hundred products with vectors. As operations of XLA, each shares its work out anew and reads
its weights in 32 bits; here all are one call, and weights are read as small as they are kept (docs/inference.md).
"""

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.config import ModelConfig
from lowrank_jax.inference import decoder, panels, quantize
from lowrank_jax.model import attention
from lowrank_jax.model.kernels import build
from lowrank_jax.model.network import rms_norm

LANES = 16  # latents, and the tokens of a window, are read so many at a time


def pack(c: ModelConfig, w: decoder.Weights) -> decoder.Weights | None:
    """The weights in panels, for `read` and for decoder.py, or None where the C++ cannot be used.

    That is on devices other than one CPU, for models without latents or with ranks of keys and values that LANES does
    not divide, and without a compiler. What is float16 becomes float32.
    """
    latent = c.rank and all(rank % LANES == 0 for rank in c.ranks[1:3])
    here = [device.platform for device in w.norm.sharding.device_set] == ["cpu"]
    if not (latent and here and build.load("decode")):
        return None
    w = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.float16 else x, w)
    some = lambda f, *w: None if w[0] is None else f(*w)
    layers = tuple(
        decoder.Layer(
            latents=quantize.matrix(l.latents),
            q_up=quantize.matrix(l.q_up),
            k_up=quantize.matrix(l.k_up),
            v_up=quantize.matrix(l.v_up),
            query=some(quantize.matrix, l.query),
            k_heads=some(lambda w: quantize.matrix(w.swapaxes(1, 2)), l.k_heads),
            v_heads=quantize.matrix(l.v_heads),
            o_down=quantize.matrix(l.o_down),
            o_up=quantize.matrix(l.o_up),
            mlp_in=quantize.matrix(l.mlp_in, parts=2),
            gate_up=some(lambda both: tuple(map(quantize.matrix, both)), l.gate_up),
            mlp_out=tuple(map(quantize.matrix, l.mlp_out)),
        )
        for l in w.layers
    )
    backwards = lambda w: some(lambda w: quantize.matrix(w, outputs=0), w)
    table, head = backwards(w.table), w.head and tuple(map(backwards, w.head))
    if w.table_up is not None and head is None:
        head = table, backwards(w.table_up)
    return decoder.Weights(table, some(quantize.matrix, w.table_up), head, layers, w.norm.astype(jnp.float32))


def read(
    c: ModelConfig, w: decoder.Weights, cache: dict, window: tuple, tokens_BT, starts_B, at, row=0
) -> tuple[jax.Array, tuple]:
    """decoder.read, in one call where the weights are packed and attention is absorbed.

    A window of packed weights has a multiple of LANES tokens.
    """
    if not isinstance(w.table, panels.Matrix) or not decoder.absorbs(c, tokens_BT.shape[1]):
        return decoder.read(c, w, cache, window, tokens_BT, starts_B, at, row)
    assert window[0]["k"].shape[1] % LANES == 0, window[0]["k"].shape
    absorbed_query = w.layers[0].query is not None
    given = [tokens_BT, starts_B, jnp.int32(at), jnp.int32(row), jnp.asarray(attention.alibi_slopes(c.heads)), cache]
    windows, structure = jax.tree.flatten(window)
    matrices = [w.table, w.table_up]
    for l in w.layers:
        matrices += [l.latents, l.query or l.q_up, None if absorbed_query else l.k_heads, l.v_heads, l.o_down, l.o_up]
        matrices += [l.mlp_in, l.gate_up, l.mlp_out]
    first = len(jax.tree.leaves(given))
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in windows]
    call = jax.ffi.ffi_call(
        "lowrank_read",
        [jax.ShapeDtypeStruct((*tokens_BT.shape, c.d), jnp.float32), *results],
        input_output_aliases={first + i: 1 + i for i in range(len(windows))},
    )
    x_BTD, *windows = call(
        *jax.tree.leaves((given, windows, matrices)),
        layers=np.int64(c.layers),
        heads=np.int64(c.heads),
        head_dim=np.int64(c.head_dim),
        rank_q=np.int64(c.ranks[0]),
        absorbed_query=absorbed_query,
        latent_norm=c.latent_norm,
        shared=c.shared_kv,
        embed_factors=w.table_up is not None,
        mlp_factors=w.layers[0].gate_up is not None,
    )
    return rms_norm(x_BTD) * w.norm, jax.tree.unflatten(structure, windows)
