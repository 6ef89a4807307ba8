"""Devices: their peaks, their memory, described topologies, and the messages where a compiler is missing."""

import math
import os
import re
import subprocess
import sys
import textwrap
import types

import jax
import pytest
from conftest import described

from lowrank_jax.config import UsageError
from lowrank_jax.machine import devices


def device(kind: str, **attributes) -> types.SimpleNamespace:
    return types.SimpleNamespace(device_kind=kind, platform="gpu", memory_stats=lambda: None, **attributes)


def python(code: str, **env) -> subprocess.CompletedProcess:
    """Run the code in a process of its own; an environment variable of None is removed."""
    variables = {key: value for key, value in (os.environ | env).items() if value is not None}
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=variables, capture_output=True, text=True)


@pytest.mark.parametrize(
    "kind,peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
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
    chip = devices.chip(device(kind))
    assert (chip and chip.peak_flops) == peak


def test_this_machines_cpu_has_no_peak():
    assert devices.chip(devices.topology("cpu")[0]) is None


@pytest.mark.parametrize("name", sorted(devices.CHIPS))
def test_the_peaks_of_a_chip_have_the_right_order_of_magnitude(name):
    """Find slips of a power of ten, or bits for bytes: memory, links and hosts are each slower than the one before."""
    chip = devices.CHIPS[name]
    assert 100 < chip.peak_flops / chip.memory_bandwidth < 600  # FLOPs per byte at which both peaks are reached
    assert 3 < chip.memory_bandwidth / chip.link_bandwidth < 40
    assert 0.01 < chip.memory / chip.memory_bandwidth < 0.05  # seconds to read all of it
    assert (chip.host_bandwidth is None) == name.startswith("TPU")
    assert chip.host_bandwidth is None or 1 < chip.link_bandwidth / chip.host_bandwidth < 30


def test_the_cpus_memory_does_not_depend_on_what_is_in_use():
    before = devices.memory_bytes(jax.devices("cpu")[0])
    in_use = bytearray(2**27)
    assert devices.memory_bytes(jax.devices("cpu")[0]) == before > len(in_use)


@pytest.mark.parametrize(
    "groups,files,limit",
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
def test_a_containers_memory_is_the_limit_of_its_control_group(tmp_path, groups, files, limit):
    for name, text in ({"proc/self/cgroup": groups} | {f"sys/fs/cgroup/{k}": v for k, v in files.items()}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    machine = devices.host_memory(tmp_path / "nothing")
    assert devices.host_memory(tmp_path) == (limit or machine) and machine > 9000


def test_a_real_device_reports_its_own_limit():
    real = device("NVIDIA A100-SXM4-80GB")
    real.memory_stats = lambda: {"bytes_limit": 63_000_000_000}
    assert devices.memory_bytes(real) == 63_000_000_000


def test_unknown_memory_is_an_error_that_names_the_config_key():
    with pytest.raises(UsageError, match="'Mystery 9000'.*config.memory_gb"):
        devices.memory_bytes(device("Mystery 9000"))


UNKNOWN = ["", "h100", "h100:", "h100:0", "h100:9", "h100:8x0", "9xh100", "b20:1", "v4:2x2x1", "v4-32", "cpu:2"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_topology_is_an_error_with_examples(name):
    with pytest.raises(UsageError, match="is unknown; use a name such as cpu, v5e:4x4, .*h100:8 or h100:8x4 "):
        devices.topology(name)


@pytest.mark.parametrize(
    "name, meant", [("h10:8", "h100:8"), ("h100", "h100:8"), ("gh200:8", "h200:8"), ("8xh20", "8xh200"), ("zzz", None)]
)
def test_a_near_miss_of_a_topology_is_answered_with_the_name_that_was_meant(name, meant):
    with pytest.raises(UsageError) as e:
        devices.standard_name(name)
    assert str(e.value).endswith(f"; did you mean {meant}?") == bool(meant) and "\n" not in str(e.value)


NAMES = {"v5e-16": "v5e:4x4", "v5litepod-16": "v5e:4x4", "v5litepod:2x4": "v5e:2x4", "V6E-8": "v6e:2x4"}
NAMES |= {"v5p-128": "v5p:4x4x4", "v5p-8": "v5p:2x2x1", "8xh100": "h100:8", "h100x8": "h100:8", "h100:32": "h100:8x4"}
NAMES |= {
    "a100:8": "a100:8",
    "8xA100": "a100:8",
    "a100-80gb:4": "a100-80gb:4",
    "h200:8": "h200:8",
    "16xb200": "b200:8x2",
}
NAMES |= {"h100:8x4": "h100:8x4", "h100:4x1": "h100:4", " CPU ": "cpu", "tpu7x:2x2x1": "tpu7x:2x2x1"}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_people_type_are_understood(name):
    assert devices.standard_name(name) == NAMES[name] == devices.standard_name(NAMES[name])


@pytest.mark.parametrize("family, per_chip", [("v5e", 1), ("v6e", 1), ("v5p", 2)])
def test_googles_names_of_slices_count_chips_or_cores(family, per_chip):
    for count, grid in devices.TPUS[family]["sizes"].items():
        assert int(count) == per_chip * math.prod(map(int, grid.split("x")))
        assert devices.standard_name(f"{family}-{count}") == f"{family}:{grid}"


@pytest.mark.parametrize("name", ["v5e-15", "v6e-512", "v5p-4"])
def test_a_size_that_no_slice_has_is_an_error_with_those_that_exist(name):
    with pytest.raises(
        UsageError, match=f"topology '{name}': use one of {name[:3]}-.*, or a grid, such as {name[:3]}:"
    ):
        devices.standard_name(name)


@pytest.mark.parametrize("gpu", devices.GPUS)
def test_a_described_gpu_is_one_of_the_chips_with_its_peaks(gpu):
    text = devices._gpu_description(gpu)
    kind = re.search(r'device_description_str: "(.*)"', text)[1]
    chip = devices.chip(device(kind))
    assert gpu[:4].upper() in kind and f"device_memory_size: {chip.memory}\n" in text
    assert f"memory_bandwidth: {chip.memory_bandwidth:.0f}\n" in text


@pytest.mark.parametrize(
    "name,expected",
    [
        ("v5e:1", "2 sides and at most 256 chips, such as v5e:4x4"),
        ("v5e:4x4x4", "2 sides"),
        ("v6e:0x2", "2 sides"),  # libtpu would kill the process
        ("v6e:16x32", "at most 256 chips"),
        ("v5p:4x4", "3 sides and at most 8960 chips, such as v5p:4x4x4"),
        ("tpu7x:", "3 sides"),
        ("v5e:-2x2", "2 sides"),
    ],
)
def test_a_grid_that_no_slice_has_is_an_error_with_an_example(name, expected):
    with pytest.raises(UsageError) as e:
        devices.topology(name)
    assert str(e.value).startswith(f"topology {name!r}: ") and expected in str(e.value)


@pytest.mark.parametrize(
    "name,count,hosts,kind",
    [
        ("v5e:1x1", 1, 1, "TPU v5 lite"),
        ("v5e:4x4", 16, 4, "TPU v5 lite"),
        ("v5p:1x1x1", 1, 1, "TPU v5"),
        ("v5p:4x4x4", 64, 16, "TPU v5"),
        ("v6e:4x4", 16, 4, "TPU v6 lite"),
        ("tpu7x:2x2x1", 8, 1, "TPU7x"),
        ("h100:1", 1, 1, "NVIDIA H100 80GB HBM3"),
        ("h100:8", 8, 1, "NVIDIA H100 80GB HBM3"),
        ("h100:8x4", 32, 4, "NVIDIA H100 80GB HBM3"),
        ("8xa100", 8, 1, "NVIDIA A100-SXM4-40GB"),
        ("h200:8", 8, 1, "NVIDIA H200"),
        ("b200:8", 8, 1, "NVIDIA B200"),
    ],
)
def test_a_topology_has_the_devices_and_hosts_of_its_name(name, count, hosts, kind):
    topology = described(name)
    on_host = [d.process_index for d in topology]
    assert len(topology) == count and {d.device_kind for d in topology} == {kind}
    assert {on_host.count(host) for host in range(hosts)} == {count // hosts}
    if kind.startswith("NVIDIA"):  # the roofline assumes that devices on one host are neighbours in the list
        assert on_host == sorted(on_host)
    assert devices.memory_bytes(topology[0]) > 10 * 2**30


def test_a_grid_that_cuts_a_host_in_two_is_an_error_in_one_line():
    described("v5e:1x1")
    with pytest.raises(UsageError) as e:
        devices.topology("v5e:3x5")
    assert "v5e:3x5 is no grid of whole hosts (Topology layout" in str(e.value) and "\n" not in str(e.value)


def test_cpu_names_all_cpu_devices_of_this_machine():
    assert devices.topology("cpu") == jax.devices("cpu")


def test_a_missing_compiler_is_an_error_that_says_what_to_install():
    done = python("""
        import sys
        sys.modules["jax_plugins"] = sys.modules["libtpu"] = None  # as if they were not installed
        from lowrank_jax.machine import devices
        for name in ("h100:1", "v6e:1x1"):
            try:
                devices.topology(name)
            except devices.UsageError as e:
                print(e)
    """)
    assert done.stdout.splitlines() == [
        'topology h100:1: its compiler is not installed; pip install "jax[cuda13]"',
        'topology v6e:1x1: its compiler is not installed; pip install "jax[tpu]"',
    ], done.stderr


def test_a_compiler_that_fails_is_an_error_in_one_line(monkeypatch):
    described("h100:1")

    def compile(device):
        raise jax.errors.JaxRuntimeError("INTERNAL: libdevice not found\nSearched in:\n  here")

    monkeypatch.setattr(devices, "_try_compiler", compile)
    with pytest.raises(UsageError) as e:
        devices.topology("h100:1")
    assert "INTERNAL: libdevice not found); pip install" in str(e.value) and "\n" not in str(e.value)


def test_an_h100_can_be_described_after_jax_started_without_a_gpu():
    described("h100:1")
    done = python(
        """
        import sys
        import jax
        real = jax.devices()
        print("now", file=sys.stderr, flush=True)
        from lowrank_jax.machine import devices
        described = devices.topology("h100:1")[0]
        print(described.device_kind, devices.chip(described).peak_flops, devices.memory_bytes(described))
        assert jax.devices() == real and jax.config.jax_platforms is None
        """,
        JAX_PLATFORMS=None,
    )
    assert done.stdout == "NVIDIA H100 80GB HBM3 989000000000000.0 60000000000\n", done.stderr
    assert done.stderr.endswith("now\n"), done.stderr  # the compilers write nothing
