"""What a training process needs before JAX is imported: asked for where it helps, once, and in the same process."""

import os
import pathlib
import subprocess
import sys

import pytest

from lowrank_jax.machine import startup

ROOT = pathlib.Path(__file__).parents[2]
ASKED = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@pytest.mark.parametrize(
    ("mode", "given", "expected"),
    [
        ("always [madvise] never", "", ASKED),
        ("[always] madvise never", "", {}),
        ("always madvise [never]", "", {}),
        ("always [madvise] never", "glibc.malloc.check=1", {}),
        (None, "", {}),
    ],
)
def test_huge_pages_are_asked_for_where_they_come_on_request(tmp_path, monkeypatch, mode, given, expected):
    if mode:
        (tmp_path / "enabled").write_text(mode)
    monkeypatch.setattr(startup, "HUGE_PAGES", str(tmp_path / "enabled"))
    monkeypatch.delenv(startup.TUNABLES, raising=False)
    if given:
        monkeypatch.setenv(startup.TUNABLES, given)
    assert startup.environment() == expected


def test_the_garbage_collector_leaves_what_was_imported_alone():
    line = "import gc; from lowrank_jax import startup; startup.spare_imports(); "
    line += "print(gc.get_freeze_count(), *gc.get_threshold())"
    done = subprocess.run([sys.executable, "-c", line], cwd=ROOT, capture_output=True, text=True, check=True)
    frozen, threshold, *_ = map(int, done.stdout.split())
    assert frozen > 1000 and threshold > 1000


def test_a_command_starts_anew_once_with_its_arguments_and_process(tmp_path):
    (tmp_path / "enabled").write_text("always [madvise] never")
    (tmp_path / "it.py").write_text(
        "import os, sys\nfrom lowrank_jax import startup\n"
        f"startup.HUGE_PAGES = {str(tmp_path / 'enabled')!r}\n"
        "print(os.getpid(), sys.argv[1:], os.environ.get(startup.TUNABLES), flush=True)\nstartup.prepare()\n"
    )
    clean = {key: value for key, value in os.environ.items() if key != startup.TUNABLES} | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, str(tmp_path / "it.py"), "--a=b c"]
    done = subprocess.run(line, env=clean, capture_output=True, text=True, check=True)
    before, after = done.stdout.splitlines()
    assert before.split()[0] == after.split()[0]
    assert before.endswith("['--a=b c'] None") and after.endswith("['--a=b c'] glibc.malloc.hugetlb=1")
