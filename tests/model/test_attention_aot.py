"""Attention as compilers for GPUs and TPUs compile it: kernels, no T x T array, linear memory, no collectives."""

import collections
import functools
import math
import os
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import described
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lowrank_jax.machine.sharding import AXES, ROWS, TENSOR
from lowrank_jax.model import attention

pytestmark = pytest.mark.slow

ONE = {"cudnn": "h100:1", "splash": "v5e:1x1"}
EIGHT = {"cudnn": "h100:8", "splash": "v5e:2x4"}
FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
TPU = "tpu_custom_call"  # once in the forward pass, and twice in the backward pass
both_kernels = pytest.mark.parametrize("kernel", ["cudnn", "splash"])


def compile_gradient(kernel: str, topology: str, shape: tuple, mesh_shape=(1, 1, 1), layers=0) -> jax.stages.Compiled:
    """Compile dq, dk and dv of packed [B, T, H, K] in bf16; with `layers`, of a scan of rematerialised layers."""
    mesh = Mesh(np.asarray(described(topology)).reshape(mesh_shape), AXES, axis_types=(AxisType.Auto,) * 3)

    def gradient(q, k, v, segments_BT, of_out):
        once = lambda q, k, v: attention.attend(q, k, v, segments_BT, kernel)
        block = jax.checkpoint(lambda q, scale, k, v: once(jnp.tanh(q) * scale, k, v))
        scanned = lambda q, k, v: jax.lax.scan(lambda q, s: (block(q, s, k, v), None), q, jnp.ones(layers, q.dtype))[0]
        return jax.vjp(scanned if layers else once, q, k, v)[1](of_out)

    qkv = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(ROWS, None, TENSOR)))
    segments = jax.ShapeDtypeStruct(shape[:2], jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(ROWS)))
    with jax.set_mesh(mesh):
        return jax.jit(gradient).lower(qkv, qkv, qkv, segments, qkv).compile()


def largest_array(text: str) -> int:
    """Return the size of the largest array in a compiled program's text."""
    return max(math.prod(map(int, dims.split(","))) for dims in re.findall(r"\w\[([\d,]+)\]", text))


def calls(text: str) -> dict[str, int]:
    counts = collections.Counter(re.findall(r'custom_call_target="([^"]+)"', text))
    return {name: counts[name] for name in (FORWARD, BACKWARD, TPU) if counts[name]}


def collectives(text: str) -> list[str]:
    return re.findall(r" (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(", text)


@both_kernels
def test_the_kernel_runs_and_memory_is_linear_in_the_length(kernel):
    """Compare the same tokens in rows four times as long: no square of the length, and no more memory."""
    short, long = (compile_gradient(kernel, ONE[kernel], (8192 // T, T, 2, 32)) for T in (2048, 8192))
    for compiled in (short, long):
        text = compiled.as_text()
        assert calls(text) == ({FORWARD: 1, BACKWARD: 1} if kernel == "cudnn" else {TPU: 3})
        assert largest_array(text) < 2048**2
    # A TPU's masks have a byte for each block of 512 x 512: 4 x 4 and 16 x 16 bytes.
    need = [compiled.memory_analysis().temp_size_in_bytes for compiled in (short, long)]
    assert 0 < need[1] < 1.01 * need[0]


def test_an_h100_takes_heads_of_128_with_their_channels():
    text = compile_gradient("cudnn", "h100:1", (1, 256, 2, 128)).as_text()
    assert calls(text) == {FORWARD: 1, BACKWARD: 1} and "bf16[1,256,2,144]" in text


def test_the_reference_has_a_square():
    compiled = compile_gradient("reference", "h100:1", (1, 1024, 2, 32))
    assert largest_array(compiled.as_text()) >= 2 * 1024**2


def test_cudnn_receives_the_models_scale_and_a_causal_mask():
    text = compile_gradient("cudnn", "h100:1", (1, 256, 2, 32)).as_text()
    scales = [float(x) for x in re.findall(r'"fmha_scale": ?([\d.e-]+)', text)]
    assert scales == pytest.approx([32**-0.5] * 2) and re.findall(r'"mask_type": ?"(\w+)"', text) == ["CAUSAL"] * 2


def test_a_gpu_does_not_lose_the_second_part_of_a_slope():
    """x - float32(bfloat16(x)) would be 0: XLA for GPUs drops the casts."""
    (h100,) = described("h100:1")
    spec = functools.partial(jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(h100))
    qk, slopes_H = spec((1, 256, 6, 32), jnp.bfloat16), spec((6,), jnp.float32)
    compiled = jax.jit(lambda q, k, m: attention._augment(q, k, m, 32**-0.5)).lower(qk, qk, slopes_H).compile()
    assert " reduce-precision(" in compiled.as_text()


@both_kernels
def test_layers_in_a_scan_are_rematerialised(kernel):
    text = compile_gradient(kernel, ONE[kernel], (1, 2048, 2, 32), layers=3).as_text()
    assert calls(text) == ({FORWARD: 2, BACKWARD: 1} if kernel == "cudnn" else {TPU: 4})
    assert largest_array(text) < 2048**2


@both_kernels
def test_each_of_8_devices_attends_with_its_own_rows_and_heads(kernel):
    """Four devices split the rows, two the heads, without any collective."""
    B, T, H, K = shape = 8, 512, 6, 32
    text = compile_gradient(kernel, EIGHT[kernel], shape, (1, 4, 2)).as_text()
    assert calls(text) and not collectives(text)
    assert largest_array(text) <= B * T * H * 128 // 8  # 128: a TPU's lanes


def test_on_8_devices_chunked_and_splash_equal_the_reference():
    """Run on 8 devices of a CPU; each device's splash has its own slopes."""
    code = r"""
        import functools, re, jax, numpy as np
        from jax.experimental.pallas.ops.tpu import splash_attention as splash
        from jax.sharding import AxisType, NamedSharding, PartitionSpec
        from lowrank_jax.model import attention

        splash.make_splash_mha_single_device = functools.partial(splash.make_splash_mha_single_device, interpret=True)
        draw = np.random.default_rng(0)
        arrays = [draw.standard_normal((8, 256, 6, 8), np.float32) for _ in range(4)]
        segments = np.cumsum(draw.random((8, 256)) < 0.05, axis=1)

        def program(backend):
            def run(q, k, v, of_out, segments):
                out, pull = jax.vjp(lambda *qkv: attention.attend(*qkv, segments, backend), q, k, v)
                return out, *pull(of_out)
            return jax.jit(run)

        exact = program("reference")(*arrays, segments)
        mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
        at = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
        by_row = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        shared = [*(jax.device_put(x, at) for x in arrays), jax.device_put(segments, by_row)]
        with jax.set_mesh(mesh):
            for backend in ("chunked", "splash"):
                compiled = program(backend).lower(*shared).compile()
                for ours, theirs in zip(compiled(*shared), exact):
                    np.testing.assert_allclose(ours, theirs, atol=5e-5)
                    assert ours.addressable_shards[0].data.shape == (2, 256, 3, 8)
                assert not re.findall(r" (all-\w+|collective-\w+|reduce-scatter)\(", compiled.as_text())
        print("the same")
    """
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True)
    assert done.stdout == "the same\n", done.stderr
