"""The start of a process: huge pages where they help, one restart, and imports without JAX."""

import os
import pathlib
import subprocess
import sys

import pytest

from lowrank_jax.machine import startup

ROOT = pathlib.Path(__file__).parents[2]
HUGE = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@pytest.mark.parametrize(
    ("mode", "tunables", "expected"),
    [
        ("always [madvise] never", "", HUGE),
        ("[always] madvise never", "", {}),
        ("always madvise [never]", "", {}),
        ("always [madvise] never", "glibc.malloc.check=1", {}),
        (None, "", {}),
    ],
)
def test_huge_pages_are_requested_where_the_kernel_allows_it(tmp_path, monkeypatch, mode, tunables, expected):
    if mode:
        (tmp_path / "enabled").write_text(mode)
    monkeypatch.setattr(startup, "HUGE_PAGES", str(tmp_path / "enabled"))
    monkeypatch.delenv(startup.TUNABLES, raising=False)
    if tunables:
        monkeypatch.setenv(startup.TUNABLES, tunables)
    assert startup.environment() == expected


def test_the_garbage_collector_does_not_scan_imported_modules():
    line = "import gc; from lowrank_jax.machine import startup; startup.spare_imports(); "
    line += "print(gc.get_freeze_count(), *gc.get_threshold())"
    done = subprocess.run([sys.executable, "-c", line], cwd=ROOT, capture_output=True, text=True, check=True)
    frozen, threshold, *_ = map(int, done.stdout.split())
    assert frozen > 1000 and threshold > 1000


def test_a_command_restarts_once_in_the_same_process_with_its_arguments(tmp_path):
    (tmp_path / "enabled").write_text("always [madvise] never")
    (tmp_path / "command.py").write_text(
        "import os, sys\nfrom lowrank_jax.machine import startup\n"
        f"startup.HUGE_PAGES = {str(tmp_path / 'enabled')!r}\n"
        "print(os.getpid(), sys.argv[1:], os.environ.get(startup.TUNABLES), flush=True)\nstartup.prepare()\n"
    )
    clean = {key: value for key, value in os.environ.items() if key != startup.TUNABLES} | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, str(tmp_path / "command.py"), "--a=b c"]
    done = subprocess.run(line, env=clean, capture_output=True, text=True, check=True)
    before, after = done.stdout.splitlines()
    assert before.split()[0] == after.split()[0]
    assert before.endswith("['--a=b c'] None") and after.endswith("['--a=b c'] glibc.malloc.hugetlb=1")


def test_processes_that_read_data_do_not_import_jax():
    modules = ", ".join(f"lowrank_jax.machine.{name}" for name in "console faults interrupt processes startup".split())
    line = f"import sys, {modules}; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", line], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
