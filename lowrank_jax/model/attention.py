"""ALiBi and causal attention for training and prefill, with five interchangeable backends.

ALiBi (Press et al., arXiv 2108.12409): score_ij = q_i . k_j / sqrt(K) - m_h (i - j). It has no position weights, so any
length runs. Shifting all positions changes nothing, so packed documents only need a segment mask.

The fused kernels of GPUs and TPUs take a bias only as a T x T array. But softmax ignores a term that a whole row
shares, so m j replaces -m (i - j), and m j is a product of channels that are added to q and k (`_augment`).
"""

import functools
import math
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lowrank_jax.config import UsageError
from lowrank_jax.machine import sharding
from lowrank_jax.model.kernels import build

MASKED = -1e30  # finite: -inf - -inf is NaN, and no causal row is ever fully masked (each query sees itself)

# Rows of queries per static chunk. Forward and backward on 2 CPU cores, H=8, K=32, 4096 tokens: 128 took 130 and
# 680 ms at T = 256 and 2048, 256 took 187 and 762, and jax.nn.dot_product_attention with a bias 272 and 3060.
CHUNK = 128

PLATFORMS = {"cudnn": "gpu", "splash": "tpu", "native": "cpu"}  # kernels that run on one platform alone
WIDEST = 240  # heads on cuDNN: 256 with ALiBi's channels, on a Hopper
APART = 256  # how much the scores of other documents are lowered, where a kernel takes no mask


def alibi_slopes(heads: int) -> np.ndarray:
    """Return the slopes m_h [H]: 2^(-8(h+1)/H) for a power of two.

    Otherwise, with n the largest power of two below H, the n slopes of n heads and then every second slope of 2n heads.
    """
    n = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (h + 1) / n) for h in range(n)]
    slopes += [2.0 ** (-4 * (2 * h + 1) / n) for h in range(heads - n)]
    return np.asarray(slopes, np.float32)


def alibi_bias(slopes_H: jax.Array, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
    """Return -m_h (i - j) in fp32, with the heads in front: [H, *query_positions.shape, S]."""
    distance = query_positions[..., None] - key_positions
    return -jnp.asarray(slopes_H).reshape(-1, *[1] * distance.ndim) * distance.astype(jnp.float32)


def attend(q_BTHK, k_BTHK, v_BTHK, segments_BT=None, backend: str = "auto") -> jax.Array:
    """Return the causal ALiBi attention [B, T, H, K] of each token to the earlier tokens of its own segment.

    `segments_BT` numbers the packed documents (None: one document per row). Scores and softmax are fp32. `backend` is
    `reference` (one T x T array, the definition), `chunked` (static query chunks), `cudnn` (NVIDIA GPUs), `splash`
    (TPUs), `native` (C++ for CPUs), or `auto`: the choice of `resolve` for this process's devices. A named kernel can
    be compiled for a described device. Raises UsageError where a named kernel does not take these shapes.
    """
    T, _, K = q_BTHK.shape[1:]
    platform = PLATFORMS.get(backend) or jax.default_backend()
    kernel, _ = resolve(backend, platform, q_BTHK.dtype, K, T)
    run = {"reference": _reference, "chunked": _chunked, "cudnn": _cudnn, "splash": _splash, "native": _native}[kernel]
    run = functools.partial(_on_each_device, run) if kernel in PLATFORMS else run
    return run(q_BTHK, k_BTHK, v_BTHK, segments_BT)


def resolve(backend: str, platform: str, dtype, head_dim: int, seq_len: int) -> tuple[str, str]:
    """Return (kernel, reason): what `backend` means on `cpu`, `gpu` (or `cuda`) or `tpu`.

    `auto` is the platform's own kernel where it takes these shapes, else `chunked`, and `reason` says why. Raises
    UsageError for a named backend that cannot run there.
    """
    platform = "gpu" if platform == "cuda" else platform
    own = {platform: kernel for kernel, platform in PLATFORMS.items()}.get(platform, "chunked")
    kernel = own if backend == "auto" else backend
    reason = _refusal(kernel, platform, jnp.dtype(dtype).name, head_dim, seq_len)
    if reason and backend != "auto":
        raise UsageError(f"config.model.attention={backend}: {reason}; set config.model.attention=auto")
    return ("chunked" if reason else kernel), reason


def _refusal(kernel: str, platform: str, dtype: str, head_dim: int, seq_len: int) -> str:
    if kernel in PLATFORMS and platform != PLATFORMS[kernel]:
        return f"{kernel} is for a {PLATFORMS[kernel].upper()}, not a {platform.upper()}"
    if kernel == "cudnn" and dtype not in ("bfloat16", "float16"):
        return f"cudnn takes bfloat16 and float16, not {dtype}"
    if kernel == "cudnn" and (head_dim % 8 or head_dim > WIDEST):
        return f"cudnn takes heads whose width is a multiple of 8 and at most {WIDEST}, not {head_dim}"
    if kernel == "cudnn" and jax.default_backend() == "gpu":
        return _refused_by_cudnn(dtype, head_dim, seq_len if seq_len % 64 else 64)
    if kernel == "splash" and dtype not in ("bfloat16", "float32"):
        return f"splash takes bfloat16 and float32, not {dtype}"
    if kernel == "native" and (dtype != "float32" or head_dim % build.LANES):
        return f"native takes float32 and heads whose width is a multiple of {build.LANES}, not {dtype} and {head_dim}"
    if kernel == "native" and not build.load("attend"):
        return "native is not compiled on this machine"
    if kernel == "splash" and seq_len % 128:
        return f"splash takes lengths that are a multiple of 128, not {seq_len}"
    return ""


@functools.cache
def _refused_by_cudnn(dtype: str, head_dim: int, seq_len: int) -> str:
    """Return why this process's GPU cannot run cuDNN's kernel and its gradient on such heads, or an empty text.

    It depends on the GPU, the shape and cuDNN's version: Hoppers take heads of 256 and other GPUs 128, those before
    Ampere none, and cuDNN 9.10.0 refuses all. Compiling the smallest case asks cuDNN itself, once for all users.
    """
    shape = jax.ShapeDtypeStruct((1, seq_len, 1, head_dim), dtype)
    attend = lambda q, k, v, segments_BT: _cudnn(q, k, v, alibi_slopes(1), segments_BT)
    gradient = lambda q, k, v, segments_BT, g: jax.vjp(lambda *x: attend(*x, segments_BT), q, k, v)[1](g)
    arrays = shape, shape, shape, jax.ShapeDtypeStruct((1, seq_len), jnp.int32), shape
    compile_alone = lambda: jax.jit(gradient).lower(*arrays).compile()
    try:  # in a thread of its own, where no mesh is set and nothing is being traced
        with ThreadPoolExecutor(1) as pool:
            pool.submit(compile_alone).result()
    except (RuntimeError, ValueError, NotImplementedError) as e:  # JaxRuntimeError is a RuntimeError
        if "RESOURCE_EXHAUSTED" not in str(e):
            return f"cudnn refuses {dtype} heads of width {head_dim} on this GPU ({' '.join(str(e).split())[:200]})"
    return ""


def _reference(q_BTHK, k_BTHK, v_BTHK, segments_BT):
    T, H, K = q_BTHK.shape[1:]
    positions = jnp.arange(T)
    scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BTHK, preferred_element_type=jnp.float32) / math.sqrt(K)
    scores_BHTS += alibi_bias(alibi_slopes(H), positions, positions)
    visible = positions[:, None] >= positions
    if segments_BT is not None:
        visible = visible & (segments_BT[:, None, :, None] == segments_BT[:, None, None, :])
    probs_BHTS = jax.nn.softmax(jnp.where(visible, scores_BHTS, MASKED), axis=-1)
    return jnp.einsum("BHTS,BSHK->BTHK", probs_BHTS.astype(v_BTHK.dtype), v_BTHK)


def _chunked(q_BTHK, k_BTHK, v_BTHK, segments_BT):
    """Compute the scores of each chunk of queries with the keys up to its end: half the work, and no T x T array."""
    T, H, K = q_BTHK.shape[1:]
    slopes_H = alibi_slopes(H)
    q, k, v = (x.swapaxes(1, 2) for x in (q_BTHK / math.sqrt(K), k_BTHK, v_BTHK))
    chunk = max(CHUNK, -(-T // 32))  # at most 32 chunks, so that compile time stays flat at long T
    out = []
    for start in range(0, T, chunk):
        stop = min(start + chunk, T)
        scores = jnp.einsum("BHTK,BHSK->BHTS", q[:, :, start:stop], k[:, :, :stop], preferred_element_type=jnp.float32)
        # Softmax ignores a constant shift of a row, so all distances are measured from the chunk's last query: one row
        # of the bias serves all its queries.
        scores += alibi_bias(slopes_H, jnp.full((1,), stop - 1), jnp.arange(stop))
        if segments_BT is None:  # only the chunk's own keys need the causal mask
            causal = jnp.arange(start, stop)[:, None] >= jnp.arange(start, stop)
            scores = scores.at[..., start:].add(jnp.where(causal, 0.0, MASKED))
        else:
            visible = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)
            visible = visible & (segments_BT[:, start:stop, None] == segments_BT[:, None, :stop])
            scores = jnp.where(visible[:, None], scores, MASKED)
        out.append(jax.nn.softmax(scores, axis=-1).astype(v.dtype) @ v[:, :, :stop])
    return jnp.concatenate(out, axis=2).swapaxes(1, 2)


def _augment(q_BTHK, k_BTHK, slopes_H, scale: float, segments_BT=None) -> tuple[jax.Array, jax.Array]:
    """Return q and k with more channels, [B, T, H, K + 8 or K + 16], for a kernel that scales their product by `scale`.

    Four channels add m j to the scores. A position is 256 a + b, with a and b exact in bf16 (below 65,536). A slope is
    the sum of two numbers, the first exact in bf16; the first alone would be off by up to 1/512 of the slope.

    With `segments_BT`, twelve more channels hold the bits of the document's number as +1 and -1. They add the same to
    all keys of the query's own document and at least APART less to any other key, whose share then vanishes: exp(-103)
    is 0 in fp32. This holds for numbers less than 4096 apart, unless q . k / sqrt(K) is 150 higher for the other key.
    Scores grow by 1536, less than m j does (5800 at T = 8192), where fp32 has steps of 1/8192. Relative errors at T =
    2048, of the output and of all gradients, with 1, 5, 64 or 300 documents, are 3e-5 to 5e-5 in fp32 and, as the
    reference's, 2e-3 to 3e-3 in bf16.
    """
    B, T, H, _ = q_BTHK.shape
    m_H, j_T = slopes_H / scale, jnp.arange(T)
    high_H = jax.lax.reduce_precision(m_H, 8, 7)  # as bf16; XLA for GPUs drops casts to bf16 and back
    low_H = m_H - high_H
    q_HE = jnp.stack([256 * high_H, high_H, 256 * low_H, low_H], axis=-1)
    k_T1E = jnp.stack([j_T // 256, j_T % 256] * 2, axis=-1)[:, None]
    if segments_BT is None:  # zeros, as cuDNN's heads are a multiple of 8 wide
        of_q = of_k = jnp.zeros(4)
    else:
        of_k = 2 * (segments_BT[:, :, None, None] >> jnp.arange(12) & 1) - 1
        of_q = of_k * (APART / 2 / scale)
    widen = lambda x: jnp.broadcast_to(x, (B, T, H, x.shape[-1])).astype(q_BTHK.dtype)
    join = lambda *parts: jnp.concatenate([widen(x) for x in parts], axis=-1)
    return join(q_BTHK, q_HE, of_q), join(k_BTHK, k_T1E, of_k)


def _cudnn(q_BTHK, k_BTHK, v_BTHK, slopes_H, segments_BT):
    K = q_BTHK.shape[-1]
    scale = 1 / math.sqrt(K)
    q_BTHE, k_BTHE = _augment(q_BTHK, k_BTHK, slopes_H, scale, segments_BT)
    v_BTHE = jnp.pad(v_BTHK, [(0, 0)] * 3 + [(0, q_BTHE.shape[-1] - K)])  # cuDNN takes q, k and v of one width
    options = {"scale": scale, "is_causal": True, "implementation": "cudnn"}
    return jax.nn.dot_product_attention(q_BTHE, k_BTHE, v_BTHE, **options)[..., :K]


def _splash(q_BTHK, k_BTHK, v_BTHK, slopes_H, segments_BT):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # 0.15 s, needed on TPUs alone

    T, H, K = q_BTHK.shape[1:]
    block = max(n for n in (128, 256, 384, 512) if T % n == 0)
    mask = splash.MultiHeadMask([splash.CausalMask((T, T))] * H)  # a function of two positions, no array
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=splash.BlockSizes(*[block] * 8))
    scaled_BTHK = (q_BTHK.astype(jnp.float32) / math.sqrt(K)).astype(q_BTHK.dtype)  # the kernel has no scale
    qkv = *_augment(scaled_BTHK, k_BTHK, slopes_H, 1.0), v_BTHK
    of_row = lambda q, k, v, s_T: kernel(q, k, v, None if s_T is None else splash.SegmentIds(s_T, s_T))
    return jax.vmap(of_row)(*(x.swapaxes(1, 2) for x in qkv), segments_BT).swapaxes(1, 2)


def _native_forward(q_BTHK, k_BTHK, v_BTHK, slopes_H, segments_BT):
    B, T, H, _ = q_BTHK.shape
    segments_BT = jnp.zeros((B, T), jnp.int32) if segments_BT is None else segments_BT
    inputs = q_BTHK, k_BTHK, v_BTHK, segments_BT, jnp.asarray(slopes_H)
    results = [jax.ShapeDtypeStruct(q_BTHK.shape, jnp.float32), jax.ShapeDtypeStruct((B, H, T), jnp.float32)]
    o_BTHK, log_sums_BHT = jax.ffi.ffi_call("lowrank_attend", results)(*inputs)
    return o_BTHK, (*inputs, o_BTHK, log_sums_BHT)


def _native_backward(saved, g_BTHK):
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in saved[:3]]
    return *jax.ffi.ffi_call("lowrank_attend_gradient", results)(*saved, g_BTHK), None, None


_native = jax.custom_vjp(lambda *arrays: _native_forward(*arrays)[0])
_native.defvjp(_native_forward, _native_backward)


def _on_each_device(kernel, q_BTHK, k_BTHK, v_BTHK, segments_BT):
    """Run the kernel on each device of the context's mesh, with the device's own rows and heads.

    XLA cannot split a Pallas kernel, and splits cuDNN's only through callbacks, which a described GPU may lack.
    """
    slopes_H = alibi_slopes(q_BTHK.shape[2])
    if jax.sharding.get_abstract_mesh().size > 1:
        spec = sharding.spec(q_BTHK.shape, sharding.ROWS, None, sharding.TENSOR)
        specs = (spec, spec, spec, PartitionSpec(spec[2]), PartitionSpec(spec[0]))
        kernel = jax.shard_map(kernel, in_specs=specs, out_specs=spec, check_vma=False)
    return kernel(q_BTHK, k_BTHK, v_BTHK, slopes_H, segments_BT)
