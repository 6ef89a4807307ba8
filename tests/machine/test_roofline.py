"""Traffic and matmuls of compiled programs equal hand-made arithmetic, and seconds follow from the chips' peaks."""

import math

import jax
import jax.numpy as jnp
import pytest
from conftest import described

from lowrank_jax.machine import devices, roofline
from lowrank_jax.machine.devices import Chip
from lowrank_jax.machine.hlo import Collective

STEPS, SIZE = 5, 2**26  # arrays of 256 MB, too large for a cache or VMEM; nothing runs
PLACES = ["cpu", "v5e:1x1", "h100:1"]


@pytest.fixture(params=PLACES)
def compile(request):
    """A function that compiles f(stacked [STEPS, SIZE], x [SIZE]) for a device."""
    one = jax.sharding.SingleDeviceSharding(described(request.param)[0])
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=one)

    def run(f, **options) -> jax.stages.Compiled:
        return jax.jit(f, **options).lower(spec(STEPS, SIZE), spec(SIZE)).compile()

    return run


def arrays_moved(compiled) -> float:
    return roofline.traffic_bytes(compiled.as_text()) / (4 * SIZE)


def test_a_fusion_reads_its_operands_and_writes_its_result(compile):
    compiled = compile(lambda stacked, x: jnp.tanh(x) * 2 + x)
    assert arrays_moved(compiled) == 2
    if cost := compiled.cost_analysis():  # XLA's own count, which it does not have for a GPU
        assert cost["bytes accessed"] == pytest.approx(2 * 4 * SIZE)


def test_a_loop_that_reads_slices_reads_the_whole_once(compile):
    """A turn moves a slice, the carry and its new value: 3. A TPU copies the slice first: 5. The carry is copied once.

    If each turn counted the whole stack, it would move 7 or more.
    """
    compiled = compile(lambda stacked, x: jax.lax.scan(lambda x, w: (x + w, None), x, stacked)[0])
    turn = round((arrays_moved(compiled) - 2) / STEPS, 3)
    assert turn in (3, 5)


def test_a_loop_that_writes_slices_in_place_writes_the_whole_once(compile):
    """A turn reads the carry and writes it, for its slice and for the new carry: 4, or 5 or 6 with copies.

    Before the loop, the stack is zeroed (STEPS) and the carry copied (2). Writing the whole stack would add 10 a turn.
    """
    compiled = compile(lambda stacked, x: jax.lax.scan(lambda x, _: (x * 2, x * 3), x, None, length=STEPS))
    assert 4 * STEPS <= round(arrays_moved(compiled), 3) <= 6 * STEPS + STEPS + 2


def test_an_update_in_place_moves_only_the_update(compile):
    assert arrays_moved(compile(lambda stacked, x: stacked.at[2].set(x), donate_argnums=0)) == pytest.approx(
        2, abs=0.01
    )


def test_a_fusion_that_a_gpu_starts_and_awaits_moves_what_one_instruction_moves():
    """JAX 0.12 for CUDA writes such pairs; the start's tuple holds the operands, the results and a context."""
    program = """HloModule update

%fused (whole: f32[5,64], row: f32[64]) -> f32[5,64] {
  %whole = f32[5,64]{1,0} parameter(0)
  %row = f32[64]{0} parameter(1)
  %bitcast = f32[1,64]{1,0} bitcast(%row)
  %zero = s32[] constant(0)
  ROOT %written = f32[5,64]{1,0} dynamic-update-slice(%whole, %bitcast, %zero, %zero)
}

ENTRY %main (stacked: f32[5,64], x: f32[64]) -> f32[5,64] {
  %stacked = f32[5,64]{1,0} parameter(0)
  %x = f32[64]{0} parameter(1)
  LAST
}
"""
    one = "ROOT %all = f32[5,64]{1,0} fusion(%stacked, %x), kind=kLoop, calls=%fused"
    two = """%start = ((f32[5,64]{1,0}, f32[64]{0}), f32[5,64]{1,0}, u32[]) fusion-start(%stacked, %x), calls=%fused
  ROOT %all = f32[5,64]{1,0} fusion-done(%start)"""
    assert [roofline.traffic_bytes(program.replace("LAST", last)) for last in (one, two)] == [2 * 4 * 64] * 2


def test_a_small_array_of_a_tpu_stays_in_vmem():
    one = jax.sharding.SingleDeviceSharding(described("v5e:1x1")[0])
    x = jax.ShapeDtypeStruct((512, 512), jnp.float32, sharding=one)
    squarings = lambda x: jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, None, length=100)[0]
    text = jax.jit(squarings).lower(x).compile().as_text()
    assert 2 * 4 * 512**2 <= roofline.traffic_bytes(text) < 10 * 4 * 512**2  # and not 200 times
    assert roofline.matmul_flops(text) == 100 * 2 * 512**3


@pytest.mark.parametrize("triton", [True, False])
def test_matmuls_are_counted_in_triton_fusions_and_in_cublas_calls(triton):
    one = jax.sharding.SingleDeviceSharding(described("h100:1")[0])
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=one)
    lowered = jax.jit(lambda a, b: jnp.einsum("nij,njk->nik", a, b)).lower(spec(8, 256, 512), spec(8, 512, 128))
    text = lowered.compile({"xla_gpu_enable_triton_gemm": triton}).as_text()
    assert ("__cublas" in text) != triton
    assert roofline.matmul_flops(text) == 8 * 2 * 256 * 512 * 128
    operands, result, moved = 2 * 8 * 512 * (256 + 128), 2 * 8 * 256 * 128, roofline.traffic_bytes(text)
    # cuBLAS's workspace is not data. A Triton fusion leaves fp32 parts of the sum to another fusion.
    assert moved > operands + result if triton else moved == operands + result


TPU, GPU = Chip(100.0, 1, 10.0, 2.0), Chip(100.0, 1, 10.0, 2.0, 0.5)


def collective(kind: str, *groups: tuple, bytes: float = 8.0, times: int = 1) -> Collective:
    return Collective(kind, bytes, (bytes // 2,), times, groups)


@pytest.mark.parametrize(
    "kind,sent",
    [("all-gather", 6), ("reduce-scatter", 6), ("all-to-all", 6), ("all-reduce", 12), ("collective-permute", 8)],
)
def test_a_ring_of_four_sends_the_least_that_it_can(kind, sent):
    groups = [(0, 1, 2, 3)] if kind != "collective-permute" else [(0, 1), (1, 2)]
    assert roofline.network_seconds(TPU, collective(kind, *groups, times=10), 0) == pytest.approx(10 * sent / 2.0)


@pytest.mark.parametrize(
    "groups,bandwidth",
    [
        ([(0, 1, 2, 3), (4, 5, 6, 7)], 2.0),  # each on one host
        ([(0, 1), (2, 3)], 2.0),
        ([(0, 4, 1, 5)], 1.0),  # two of each host
        ([(0, 1, 2, 4, 5, 6)], 1.5),
        ([(0, 1, 2, 3, 4, 5, 6, 7)], 2.0),  # four: no faster than the links
        ([(0, 4), (1, 5)], 0.5),
        ([(0, 1), (3, 4)], 0.5),  # the slowest group
    ],
)
def test_groups_over_hosts_share_the_network_of_their_hosts(groups, bandwidth):
    c, n = collective("all-gather", *groups), len(groups[0])
    assert roofline.network_seconds(GPU, c, per_host=4) == pytest.approx(8 * (n - 1) / n / bandwidth)
    assert roofline.network_seconds(TPU, c, per_host=4) == pytest.approx(8 * (n - 1) / n / 2.0)  # one network


def test_a_step_takes_as_long_as_its_slowest_part_and_names_it():
    gather = [collective("all-gather", (0, 1), times=2)]  # 4 seconds
    assert roofline.estimate(TPU, 500.0, 30.0, gather, 0, 500.0) == {
        "compute_seconds": 5.0,
        "memory_seconds": 3.0,
        "network_seconds": 4.0,
        "step_seconds": 5.0,
        "mfu_bound": 1.0,
        "bound": "compute",
    }
    memory = roofline.estimate(TPU, 500.0, 100.0, gather, 0, 400.0)
    assert (memory["step_seconds"], memory["mfu_bound"], memory["bound"]) == (10.0, 0.4, "memory")
    network = roofline.estimate(GPU, 100.0, 10.0, [collective("all-reduce", (0, 4), times=4)], 4, 100.0)
    assert (network["step_seconds"], network["bound"]) == (64.0, "network")
    assert network["mfu_bound"] == pytest.approx(1 / 64)


def test_an_unknown_chip_has_no_estimates():
    assert set(roofline.estimate(None, 500.0, 1.0, [], 0, 500.0).values()) == {None}


def test_a_large_step_takes_the_time_of_hand_made_arithmetic():
    """125M parameters and a million tokens per step on 32 H100s are 0.75 PFLOP, a bit over 24 ms."""
    h100 = devices.CHIPS["H100"]
    hosts = collective("all-reduce", tuple(range(32)), bytes=4 * 125e6)
    flops = 6 * 125e6 * 2**20 / 32
    step = roofline.estimate(h100, flops, 10e9, [hosts], 8, flops)
    assert step["bound"] == "compute" and math.isclose(step["step_seconds"], 0.0248, rel_tol=0.01)
    assert math.isclose(step["network_seconds"], 2 * 31 / 32 * 0.5e9 / 400e9, rel_tol=1e-6)  # eight networks of 50 GB/s
