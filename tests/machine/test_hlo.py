"""Facts read from the text of compiled programs equal hand-made arithmetic, on CPUs, TPUs and GPUs."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import described
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lowrank_jax.machine import hlo, roofline

pytestmark = pytest.mark.slow

LAYERS, WIDTH, ROWS = 5, 512, 64  # rows of a device
MATMUL = 2 * ROWS * WIDTH * WIDTH  # FLOPs of one layer on one device
WEIGHTS = 4 * LAYERS * WIDTH * WIDTH
PLACES = ["cpu", "v5e:2x4", "h100:8"]  # eight devices each


def train(weights, x):
    """A step of layers whose weights, gradients and rows are all split over the same devices."""

    def loss(weights):
        y, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)
        return (y**2).sum()

    value, gradient = jax.value_and_grad(loss)(weights)
    return value, weights - gradient


def nested(weights, x):
    again = lambda x, _: (jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0], None)
    return jax.lax.scan(again, x, None, length=3)[0]


def counted(weights, x):
    """A loop whose counter starts at 2 and grows by 3: it runs for 2, 5, 8 and 11."""
    step = lambda carry: (carry[0] + 3, carry[1] @ weights[0])
    return jax.lax.while_loop(lambda carry: carry[0] < 12, step, (2, x))[1]


def branches(weights, x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ weights[0], lambda x: jnp.tanh(x @ weights[1] @ weights[2]), x)


def batched(weights, x):
    """Dots with a batch dimension, which a TPU turns into windows."""
    heads = x.reshape(ROWS, 4, WIDTH // 4)
    return jnp.einsum("thk,shk->hts", heads, heads)


def exchange(mesh):
    """A collective of each kind, written by hand, over one of two mesh axes."""

    def run(x):  # [512, 512] on each device
        return (
            jax.lax.all_gather(x, "wide", tiled=True),
            jax.lax.psum(x * 2, "far"),
            jax.lax.psum_scatter(x * 3, "wide", tiled=True),
            jax.lax.all_to_all(x * 4, "wide", 0, 0, tiled=True),
            jax.lax.ppermute(x * 5, "wide", [(i, (i + 1) % 4) for i in range(4)]),
            jax.lax.psum(x[:1, 0], ("far", "wide")),
        )

    specs = (P("far"), P("wide"), P(("far", "wide")), P(("far", "wide")), P(("far", "wide")), P())
    return jax.shard_map(run, mesh=mesh, in_specs=P(("far", "wide")), out_specs=specs, check_vma=False)


def spec(mesh, shape, *axes, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))


def lower_train(devices, width: int = WIDTH, dtype=jnp.float32) -> jax.stages.Lowered:
    mesh = Mesh(np.array(devices), ("all",))
    weights = spec(mesh, (LAYERS, width, width), None, "all", dtype=dtype)
    run = jax.jit(train, out_shardings=(None, weights.sharding), donate_argnums=0)
    return run.lower(weights, spec(mesh, (ROWS * len(devices), width), "all", dtype=dtype))


def compile_all(devices) -> dict[str, str]:
    """Return {name: text} of the programs above; those without a sharding are compiled for one device."""
    texts = {"train": lower_train(devices).compile().as_text()}
    one = Mesh(np.array(devices[:1]), ("all",))
    for program in (nested, counted, branches, batched):
        specs = spec(one, (LAYERS, WIDTH, WIDTH)), spec(one, (ROWS, WIDTH))
        texts[program.__name__] = jax.jit(program).lower(*specs).compile().as_text()
    far = Mesh(np.array(devices).reshape(2, 4), ("far", "wide"))
    by_hand = jax.jit(exchange(far)).lower(spec(far, (512 * len(devices), 512), ("far", "wide")))
    return texts | {"exchange": by_hand.compile().as_text()}


@pytest.fixture(scope="module", params=PLACES)
def texts(request):
    if request.param != "cpu":
        return compile_all(described(request.param))
    code = "import json, jax, test_hlo; print(json.dumps(test_hlo.compile_all(jax.devices())))"
    tests = pathlib.Path(__file__).parent
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join([str(tests), str(tests.parent), str(tests.parents[1])])
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "program,matmuls", [("train", 3 * LAYERS), ("nested", 3 * LAYERS), ("counted", 4), ("branches", 3)]
)
def test_a_matmul_counts_as_often_as_it_runs(texts, program, matmuls):
    assert roofline.matmul_flops(texts[program]) == matmuls * MATMUL


def test_a_batch_dimension_adds_no_work(texts):
    assert roofline.matmul_flops(texts["batched"]) == 2 * ROWS * ROWS * WIDTH


def test_sharded_weights_are_gathered_twice_a_layer_and_their_gradients_summed_once(texts):
    """Forward and backward each need them. A TPU gathers the bf16 that it multiplies; a CPU sums on every device."""
    *layers, loss = sorted(hlo.collectives(texts["train"]), key=lambda c: -c.times)
    assert [(c.times, len(c.groups[0])) for c in layers] == 3 * [(LAYERS, 8)]
    assert all(c.sizes == (WIDTH**2,) and c.bytes / WIDTH**2 in (2, 4) for c in layers)
    kinds = sorted(c.kind for c in layers)
    assert kinds[:2] == 2 * ["all-gather"] and kinds[2] in ("reduce-scatter", "all-reduce")
    assert (loss.kind, loss.bytes, loss.times) == ("all-reduce", 4, 1)
    total = sum(hlo.collective_bytes(texts["train"]).values())
    assert total == sum(LAYERS * c.bytes for c in layers) + 4 and total in (3 * WEIGHTS + 4, 2 * WEIGHTS + 4)


def test_each_kind_of_collective_is_read_once_with_its_bytes_and_groups(texts):
    """A gather counts four devices' parts, every other kind a device's own array."""
    array_bytes, by_kind = 4 * 512 * 512, {}
    for c in hlo.collectives(texts["exchange"]):
        by_kind.setdefault(c.kind, []).append((c.bytes, c.times, tuple(sorted(c.groups))))
    wide, far = ((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 4), (1, 5), (2, 6), (3, 7))
    ring = tuple(sorted((4 * row + i, 4 * row + (i + 1) % 4) for row in (0, 1) for i in range(4)))
    assert by_kind.pop("all-gather") == [(4 * array_bytes, 1, wide)]
    assert by_kind.pop("reduce-scatter") == [(array_bytes, 1, wide)]
    assert by_kind.pop("all-to-all") == [(array_bytes, 1, wide)]
    assert by_kind.pop("collective-permute") == [(array_bytes, 1, ring)]
    assert sorted(by_kind.pop("all-reduce")) == [(4, 1, (tuple(range(8)),)), (array_bytes, 1, far)]
    assert not by_kind


@pytest.mark.parametrize(
    "written,groups",
    [
        ("replica_groups={{0,4},{1,5}}", ((0, 4), (1, 5))),
        ("replica_groups={}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("replica_groups=[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'c','a'}", ((0, 4, 1, 5), (2, 6, 3, 7))),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
    ],
)
def test_groups_are_read_in_every_notation(written, groups):
    kind = "collective-permute" if "pairs" in written else "all-reduce"
    text = f"""HloModule jit_f, is_scheduled=true, num_partitions=8

ENTRY %main (x: bf16[8]) -> bf16[8] {{
  %x = bf16[8]{{0}} parameter(0)
  ROOT %r = bf16[8]{{0}} {kind}(%x), channel_id=1, {written}, use_global_device_ids=true
}}
"""
    assert hlo.collectives(text) == [hlo.Collective(kind, 16, (8,), 1, groups)]


def test_a_collective_that_a_tpu_spreads_over_fusions_counts_once():
    text = lower_train(described("v5e:2x4"), 1024, jnp.bfloat16).compile().as_text()
    assert "AsyncCollectiveStart" in text and text.count(" all-gather(") > 2
    totals = hlo.collective_bytes(text)
    assert totals.pop("all-reduce") <= 4  # the loss
    assert totals == {"all-gather": 2 * 2 * LAYERS * 1024**2, "reduce-scatter": 2 * LAYERS * 1024**2}


def test_a_program_that_jax_cannot_print_is_written_by_its_compiler():
    with hlo.written() as (options, read):
        lower_train(described("tpu7x:2x2x1")).compile(options)
        text = read()
    assert roofline.matmul_flops(text) == 3 * LAYERS * MATMUL
    gathers = [c for c in hlo.collectives(text) if c.kind == "all-gather"]
    assert len(gathers) == 2 and {c.times for c in gathers} == {LAYERS}


def attention_kernel(text: str) -> str | None:
    """Return `cudnn` or `splash` where the program calls such a fused attention, else None."""
    for i in hlo.running(text):
        if i.target.startswith("__cudnn$fmha"):
            return "cudnn"
        if i.target == "tpu_custom_call" and "splash" in i.rest.split("backend_config=")[0]:
            return "splash"
    return None


def test_splash_attention_is_named_and_other_kernels_are_not(texts):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    one = jax.sharding.SingleDeviceSharding(described("v5e:1x1")[0])
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((256, 256))] * 2)
    kernel = splash_attention_kernel.make_splash_mha_single_device(mask)
    q = jax.ShapeDtypeStruct((2, 256, 128), jnp.bfloat16, sharding=one)
    loss = lambda q: kernel(q, q, q).astype(jnp.float32).sum()
    assert attention_kernel(jax.jit(jax.grad(loss)).lower(q).compile().as_text()) == "splash"
    assert all(attention_kernel(text) is None for text in texts.values())


def test_cudnn_attention_is_named(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    one = jax.sharding.SingleDeviceSharding(described("h100:1")[0])
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)  # as if it were installed
    q = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16, sharding=one)
    attend = lambda q: jax.nn.dot_product_attention(q, q, q, implementation="cudnn", is_causal=True)
    text = jax.jit(attend).lower(q).compile().as_text()
    assert attention_kernel(text) == "cudnn"


def test_dots_of_two_f8_operands_are_counted_wherever_they_are():
    text = """
HloModule jit_f, is_scheduled=true

%gemm_fusion_dot (a: f8e4m3fn[64,32], b: f8e5m2[32,16]) -> bf16[64,16] {
  %a = f8e4m3fn[64,32]{1,0} parameter(0)
  %b = f8e5m2[32,16]{1,0} parameter(1)
  ROOT %dot.1 = bf16[64,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%mixed (a: f8e4m3fn[64,32], b: bf16[32,16]) -> bf16[64,16] {
  %a = f8e4m3fn[64,32]{1,0} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  ROOT %dot.2 = bf16[64,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: f8e4m3fn[64,32], y: f8e4m3fn[32,16], z: bf16[64,32]) -> bf16[64,16] {
  %x = f8e4m3fn[64,32]{1,0} parameter(0)
  %y = f8e4m3fn[32,16]{1,0} parameter(1)
  %z = bf16[64,32]{1,0} parameter(2)
  %fusion = bf16[64,16]{1,0} fusion(%x, %y), kind=kCustom, calls=%gemm_fusion_dot
  %dot.3 = bf16[64,16]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %dot.4 = bf16[64,16]{1,0} dot(f8e4m3fn[64,32]{1,0} %x, f8e4m3fn[32,16]{1,0} %y), lhs_contracting_dims={1}
  ROOT %dot.5 = bf16[64,64]{1,0} dot(%z, %z), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}
"""
    assert hlo.f8_matmuls(text) == 3


def test_cublaslt_calls_are_counted_and_other_calls_are_not():
    text = """
ENTRY %main (x: f8e4m3fn[64,32], y: f8e5m2[16,32], s: f32[]) -> bf16[64,16] {
  %x = f8e4m3fn[64,32]{1,0} parameter(0)
  %y = f8e5m2[16,32]{1,0} parameter(1)
  %s = f32[] parameter(2)
  %h = bf16[64,32]{1,0} convert(%x)
  %gemm.1 = (bf16[64,16]{1,0}, s8[4194304]{0}) custom-call(%x, %y, %s, %s), custom_call_target="__cublas$lt$matmul$f8"
  %gemm.2 = (bf16[64,64]{1,0}, s8[4194304]{0}) custom-call(%h, %h), custom_call_target="__cublas$lt$matmul"
  ROOT %other = bf16[64,16]{1,0} custom-call(%x, %y), custom_call_target="SomethingElse"
}
"""
    assert hlo.f8_matmuls(text) == 1


def test_a_tpus_convolutions_are_counted():
    text = """
%fused (p: f8e4m3fn[8,64,32], q: f8e4m3fn[32,16]) -> bf16[8,64,16] {
  %p = f8e4m3fn[8,64,32]{2,1,0:T(8,128)(4,1)} parameter(0)
  %q = f8e4m3fn[32,16]{1,0:T(8,128)(4,1)S(1)} parameter(1)
  %b = bf16[32,16]{1,0:T(8,128)(2,1)} convert(%q)
  %conv.1 = bf16[8,64,16]{2,1,0:T(8,128)(2,1)} convolution(%p, %q), window={size=1}, dim_labels=0bf_io0->0bf
  %conv.2 = f32[8,64,16]{2,1,0} convolution(f8e4m3fn[8,64,32]{2,1,0:T(8,128)(4,1)} %p, f8e4m3fn[32,16]{1,0} %q)
  ROOT %conv.3 = bf16[8,64,16]{2,1,0:T(8,128)(2,1)} convolution(%p, %b), window={size=1}, dim_labels=0bf_io0->0bf
}
"""
    assert hlo.f8_matmuls(text) == 2
