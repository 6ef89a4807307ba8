"""The start of a process: huge pages where they help, one restart, and imports without JAX."""

import os
import pathlib
import pwd
import subprocess
import sys
import tempfile

import pytest

from lowrank_jax import cli
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


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with a temporary folder, a home folder in its list of users or none, and no caches yet."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    for name in ("HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, "")  # so that what the test leaves in the environment is undone
        monkeypatch.delenv(name)
    startup.cache_folder.cache_clear()
    yield tmp_path
    startup.cache_folder.cache_clear()


@pytest.mark.parametrize(
    ("home", "cache", "expected"),
    [
        ("home", None, "home/.cache"),
        ("home", "home/mine", "home/mine"),
        ("home", "", "home/.cache"),
        ("home", "~/relative", "home/.cache"),
        (None, None, None),
        ("", None, None),
        ("relative", None, None),
        ("nowhere", None, None),
        ("file", None, None),
        ("broken", None, None),
        ("home", "file", None),
        ("home", "file/below", None),
        ("home", "broken", None),
        (None, "file", None),
    ],
)
def test_caches_have_a_folder_that_can_be_written(machine, monkeypatch, capsys, home, cache, expected):
    place = lambda name: name if name in ("", "relative", "~/relative") else str(machine / name)
    for name, value in (("HOME", home), ("XDG_CACHE_HOME", cache)):
        if value is not None:
            monkeypatch.setenv(name, place(value))
    before, folder = set(os.listdir(machine)), pathlib.Path(startup.cache_folder())
    message = capsys.readouterr().err
    assert folder.is_dir() and folder.name == "lowrank_jax" and set(os.listdir(machine)) == before
    assert os.path.isdir(os.path.expanduser("~"))  # no library creates a folder named ~
    if expected:
        assert folder.parent == machine / expected and message == ""
    else:
        assert folder.is_relative_to(machine / "tmp") and message.count("\n") == 1 and str(folder.parent) in message
        assert (machine / "tmp" / f"lowrank_jax-{os.getuid()}").stat().st_mode & 0o777 == 0o700
    startup.cache_folder.cache_clear()  # a process that this one starts
    assert startup.cache_folder() == str(folder) and capsys.readouterr().err == ""


def test_a_home_that_cannot_be_written_stays_the_home(machine, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(machine / "home"))
    monkeypatch.setattr(os, "access", lambda path, mode: "home" not in path)  # root may write anywhere
    folder = startup.cache_folder()
    assert os.environ["HOME"] == str(machine / "home") and folder.startswith(str(machine / "tmp"))
    assert (
        os.environ["MPLCONFIGDIR"].startswith(str(machine / "tmp")) and "cannot be written" in capsys.readouterr().err
    )


@pytest.mark.parametrize("taken", ["a link", "a file", "open to all"])
def test_a_temporary_folder_of_somebody_else_is_not_used(machine, taken):
    folder = machine / "tmp" / f"lowrank_jax-{os.getuid()}"
    if taken == "a link":
        folder.symlink_to(machine / "home")
    elif taken == "a file":
        folder.write_text("")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    assert not pathlib.Path(startup.cache_folder()).is_relative_to(folder) and not os.listdir(machine / "home")


def test_compiled_programs_and_libraries_share_the_folder(machine, monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setitem(sys.modules, "jax", None)
    del sys.modules["jax"]
    cli.use_compilation_cache()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"].startswith(startup.cache_folder())
