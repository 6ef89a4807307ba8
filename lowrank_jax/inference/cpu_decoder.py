"""The decoder on a CPU: decoder.read in C++ (model/kernels/decode.cc) for few tokens, in one call for all layers.

A step for one row is about a hundred matrix-vector products. XLA distributes each of them over threads anew and reads
weights in 32 bits. The C++ does them in one call and reads weights as small as they are kept (docs/inference.md).
"""

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.config import ModelConfig
from lowrank_jax.inference import decoder, quantize
from lowrank_jax.model import attention
from lowrank_jax.model.kernels import build
from lowrank_jax.model.network import rms_norm


def pack(c: ModelConfig, w: decoder.Weights) -> decoder.Weights | None:
    """Return the weights in panels, for `read` and for decoder.py, or None where the C++ cannot be used.

    It needs one CPU device, a compiler, and factors of Q, K, V and O, whose ranks of keys and values build.LANES
    divides. float16 becomes float32.
    """
    has_latents = all(c.ranks) and all(rank % build.LANES == 0 for rank in c.ranks[1:3])
    is_cpu = [device.platform for device in w.norm.sharding.device_set] == ["cpu"]
    if not (has_latents and is_cpu and build.load("decode")):
        return None
    w = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.float16 else x, w)
    layers = []
    for layer in w.layers:
        k_heads = jax.tree.map(lambda x: x.swapaxes(1, 2), layer.k_heads)
        packed = quantize.in_panels(layer._replace(mlp_in=None, k_heads=k_heads))
        layers.append(packed._replace(mlp_in=quantize.in_panels(layer.mlp_in, parts=2)))
    table, head = quantize.in_panels((w.table, w.head), outputs=0)
    if w.table_up is not None and head is None:
        head = table, quantize.in_panels(w.table_up, outputs=0)
    return decoder.Weights(table, quantize.in_panels(w.table_up), head, tuple(layers), w.norm.astype(jnp.float32))


def read(c: ModelConfig, w: decoder.Weights, cache: dict, window: tuple, tokens_BT, place: decoder.Place) -> tuple:
    """Do what decoder.read does; in one call, if the weights are packed and attention is absorbed.

    The window of packed weights must have a multiple of build.LANES tokens.
    """
    if not isinstance(w.table, quantize.Panels) or not decoder.absorbs(c, tokens_BT.shape[1]):
        return decoder.read(c, w, cache, window, tokens_BT, place)
    assert window[0]["k"].shape[1] % build.LANES == 0, window[0]["k"].shape
    absorbed_query, slopes = w.layers[0].query is not None, jnp.asarray(attention.alibi_slopes(c.heads))
    inputs = [tokens_BT, place.starts_B, jnp.int32(place.offset), jnp.int32(place.row), slopes, cache]
    windows, structure = jax.tree.flatten(window)
    matrices = [w.table, w.table_up]
    for l in w.layers:
        matrices += [l.latents, l.query or l.q_up, None if absorbed_query else l.k_heads, l.v_heads, l.o_down, l.o_up]
        matrices += [l.mlp_in, l.gate_up, l.mlp_out]
    first = len(jax.tree.leaves(inputs))
    results = [jax.ShapeDtypeStruct((*tokens_BT.shape, c.d), jnp.float32)]
    results += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in windows]
    aliases = {first + i: 1 + i for i in range(len(windows))}
    call = jax.ffi.ffi_call("lowrank_read", results, input_output_aliases=aliases)
    sizes = dict(layers=c.layers, heads=c.heads, head_dim=c.head_dim, rank_q=c.ranks[0])
    forms = dict(absorbed_query=absorbed_query, latent_norm=c.latent_norm, shared=c.shared_kv)
    forms |= dict(embed_factors=w.table_up is not None, mlp_factors=w.layers[0].gate_up is not None)
    arrays = jax.tree.leaves((inputs, windows, matrices))
    x_BTD, *windows = call(*arrays, **jax.tree.map(np.int64, sizes), **forms)
    return rms_norm(x_BTD) * w.norm, jax.tree.unflatten(structure, windows)
