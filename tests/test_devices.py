"""What is said of devices and of compiled programs, and what is said where a compiler is missing."""

import os
import subprocess
import sys
import textwrap
import types

import jax
import pytest

from lowrank_jax import devices
from lowrank_jax.config import UsageError

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the compilers for GPUs and TPUs are made for Linux alone")


def device(kind: str, **attributes) -> types.SimpleNamespace:
    return types.SimpleNamespace(device_kind=kind, platform="gpu", memory_stats=lambda: None, **attributes)


def python(code: str, **env) -> subprocess.CompletedProcess:
    """Runs the code in a process of its own; an environment variable of None is taken away."""
    wanted = {key: value for key, value in (os.environ | env).items() if value is not None}
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=wanted, capture_output=True, text=True)


# -------------------------------------------------------------------------------------------------------------- chips


@pytest.mark.parametrize(
    "kind,peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("cpu", None),
    ],
)
def test_peak_flops_are_those_of_the_chip(kind, peak):
    assert devices.peak_flops(device(kind)) == peak


def test_this_machines_cpu_has_no_peak():
    assert devices.peak_flops(devices.topology("cpu")) is None


# ------------------------------------------------------------------------------------------------------------- memory


def test_the_cpus_memory_is_the_same_whatever_is_in_use():
    before = devices.memory_bytes(jax.devices("cpu")[0])
    held = bytearray(2**27)
    assert devices.memory_bytes(jax.devices("cpu")[0]) == before > len(held)


@pytest.mark.parametrize(
    "groups,files,least",
    [
        ("0::/\n", {"memory.max": "5000"}, 5000),
        ("0::/app/job\n", {"memory.max": "max", "app/memory.max": "6000", "app/job/memory.max": "7000"}, 6000),
        ("0::/only/on/the/host\n", {"memory.max": "8000"}, 8000),
        ("0::/\n", {"memory.max": "max"}, None),
        ("0::/\n", {}, None),
        ("3:cpu,memory:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": "4000"}, 4000),
        ("3:memory:/\n2:cpu:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("2:cpu:/\n", {"memory/memory.limit_in_bytes": "4000"}, None),
    ],
)
def test_a_container_has_no_more_memory_than_its_control_group(tmp_path, groups, files, least):
    for name, text in ({"proc/self/cgroup": groups} | {f"sys/fs/cgroup/{k}": v for k, v in files.items()}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    machine = devices.host_memory(tmp_path / "nothing")
    assert devices.host_memory(tmp_path) == (least or machine) and machine > 9000


def test_a_real_device_says_itself_what_it_can_give():
    real = device("NVIDIA A100-SXM4-80GB")
    real.memory_stats = lambda: {"bytes_limit": 63_000_000_000}
    assert devices.memory_bytes(real) == 63_000_000_000


def test_memory_that_nobody_knows_is_asked_for():
    with pytest.raises(UsageError, match="'Mystery 9000'.*config.memory_gb"):
        devices.memory_bytes(device("Mystery 9000"))


# ---------------------------------------------------------------------------------------------------------- topologies


@pytest.mark.parametrize("name", ["", "h100", "h100:", "h100:0", "h100:x", "v5e:1", "v5e:1x1x1", "b200:1", "CPU"])
def test_an_unknown_topology_is_told_the_known_ones(name):
    with pytest.raises(UsageError, match="cpu, h100:1, v5e:1x1, v5p:1x1x1, v6e:1x1$"):
        devices.topology(name)


@pytest.mark.parametrize("name,one", [("h100:8", "h100:1"), ("v5e:2x4", "v5e:1x1"), ("v5p:2x2x1", "v5p:1x1x1")])
def test_more_than_one_device_is_refused(name, one):
    with pytest.raises(UsageError, match=f"topology {name} has more than one device.*use {one}$"):
        devices.topology(name)


def test_a_missing_compiler_is_one_line_that_says_what_to_install():
    done = python("""
        import sys
        sys.modules["jax_plugins"] = sys.modules["libtpu"] = None  # as if they were not installed
        from lowrank_jax import devices
        for name in ("h100:1", "v6e:1x1"):
            try:
                devices.topology(name)
            except devices.UsageError as e:
                print(e)
    """)
    assert done.stdout.splitlines() == [
        'topology h100:1: its compiler is not installed; pip install "jax[cuda12]"',
        'topology v6e:1x1: its compiler is not installed; pip install "jax[tpu]"',
    ], done.stderr


@LINUX
def test_a_compiler_without_its_parts_is_one_line_too(monkeypatch):
    def compile(device):
        raise jax.errors.JaxRuntimeError("INTERNAL: libdevice not found\nSearched in:\n  here")

    monkeypatch.setattr(devices, "_try_compiler", compile)
    with pytest.raises(UsageError) as e:
        devices.topology("h100:1")
    assert "INTERNAL: libdevice not found); pip install" in str(e.value) and "\n" not in str(e.value)


@LINUX
def test_an_h100_is_described_even_after_jax_found_no_gpu():
    done = python(
        """
        import sys
        import jax
        mine = jax.devices()
        print("now", file=sys.stderr, flush=True)
        from lowrank_jax import devices
        described = devices.topology("h100:1")
        print(described.device_kind, devices.peak_flops(described), devices.memory_bytes(described))
        assert jax.devices() == mine and jax.config.jax_platforms is None
        """,
        JAX_PLATFORMS=None,
    )
    assert done.stdout == "NVIDIA H100 80GB HBM3 989000000000000.0 60000000000\n", done.stderr
    assert done.stderr.endswith("now\n"), done.stderr  # the compilers' own chatter is held back


# --------------------------------------------------------------------------------------------------- compiled programs


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
    assert devices.f8_matmuls(text) == 3


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
    assert devices.f8_matmuls(text) == 1


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
    assert devices.f8_matmuls(text) == 2
