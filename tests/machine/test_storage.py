"""Files that are replaced in one move, appended to and locked on any file system, and reads that are tried again."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import resource
import subprocess
import sys

import pytest

from lowrank_jax.machine import storage

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(storage, "PAUSES", (0, 0, 0))


# ----------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def outside(tmp_path):
    """A file outside a folder `run`, which nothing in that folder may change."""
    (tmp_path / "run").mkdir()
    (tmp_path / "outside").write_text("precious")
    yield tmp_path / "outside"
    assert (tmp_path / "outside").read_text() == "precious"


@pytest.mark.parametrize("target", ["outside", "missing"])
def test_replacing_a_link_replaces_the_link_alone(outside, target):
    path = outside.parent / "run" / "loss.png"
    path.symlink_to(outside.with_name(target))
    storage.replace(str(path), lambda f: f.write(b"picture"))
    assert not path.is_symlink() and path.read_bytes() == b"picture" and not outside.with_name("missing").exists()
    assert os.listdir(path.parent) == ["loss.png"]


def test_nothing_is_appended_or_locked_through_a_link(outside):
    for name in ("events.jsonl", ".lock"):
        path = outside.parent / "run" / name
        path.symlink_to(outside)
        with pytest.raises(OSError, match=f"^{path} cannot be .*: it is a symbolic link; remove it$"):
            if name == ".lock":
                storage.lock(str(path)).__enter__()
            storage.append_line(str(path), b"{}")


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "events.jsonl"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    for action in (storage.append_line, lambda path, _: storage.lock(path).__enter__()):
        with pytest.raises(OSError, match=f"^{path} cannot be .*: (it is no regular file|is a directory)$"):
            action(str(path), b"{}")


def test_a_full_disk_is_named_with_the_file_which_stays_as_it_was(tmp_path):
    def fill(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "config.json"
    storage.replace(str(path), "old")
    with pytest.raises(OSError, match=f"^{path} cannot be written: no space left on device$") as e:
        storage.replace(str(path), fill)
    assert e.value.errno == errno.ENOSPC and path.read_text() == "old" and os.listdir(tmp_path) == ["config.json"]


def test_an_append_that_stops_in_the_middle_costs_its_own_line_alone(tmp_path):
    path, limits = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    storage.append_line(str(path), b"first")
    resource.setrlimit(resource.RLIMIT_FSIZE, (9, limits[1]))
    try:
        with pytest.raises(OSError, match=f"^{path} cannot be appended to: file too large$"):
            storage.append_line(str(path), b"second")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    storage.append_line(str(path), b"third")
    assert path.read_bytes() == b"first\nsec\nthird\n"


# ----------------------------------------------------------------------------------------------------------- reads


def failing(times: int, e: Exception):
    failures = iter([e] * times)

    def read():
        for failure in failures:
            raise failure
        return "contents"

    return read


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES, errno.EREMOTEIO])
def test_a_failure_that_passes_is_read_over(number):
    notes = []
    note = lambda e, pause: notes.append(e.errno)
    assert storage.again(failing(3, OSError(number, "hiccup")), note=note) == "contents" and notes == [number] * 3
    with pytest.raises(OSError, match=r"hiccup.*\(tried 4 times\)$"):
        storage.again(failing(4, OSError(number, "hiccup")))


@pytest.mark.parametrize("e", [FileNotFoundError(errno.ENOENT, "none"), ValueError("not JSON"), KeyError("a")])
def test_a_failure_that_stays_is_raised_at_once(e):
    with pytest.raises(type(e)):
        storage.again(failing(1, e))


def test_a_cause_counts_too():
    wrapped = ValueError("could not restore")
    wrapped.__cause__ = OSError(errno.EIO, "Input/output error")
    assert storage.is_transient(wrapped) and not storage.is_transient(ValueError("EIO"))


# ----------------------------------------------------------------------------------------------------------- locks


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EPERM])
def no_locks(request, monkeypatch):
    def flock(*_):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_without_locks_a_file_locks_and_is_gone_at_the_end(tmp_path, no_locks, capsys):
    path = str(tmp_path / ".lock")
    for _ in range(2):
        with storage.lock(path):
            with pytest.raises(BlockingIOError, match=f"^{path} cannot be locked: another process has it"):
                storage.lock(path).__enter__()
        assert os.listdir(tmp_path) == [".lock"]
    assert f"{path}-owner locks the folder instead" in capsys.readouterr().err


STRANGE = {"empty": "", "a list": "[]", "deep": "[" * 10**5}
STRANGE |= {"NUL": json.dumps({"token": "\0"}), "long": json.dumps({"token": "a" * 999})}


@pytest.mark.parametrize("case", ["another host", *STRANGE, "of the future", "another process of that number"])
def test_a_lock_without_signs_of_life_is_taken_over(tmp_path, no_locks, case):
    path, owner = str(tmp_path / ".lock"), tmp_path / ".lock-owner"
    record = {"host": storage._host(), "pid": os.getpid(), "started": "1", "token": "a"}
    record |= {"host": "elsewhere"} if case in ("another host", "of the future") else {}
    owner.write_text(STRANGE.get(case, json.dumps(record)))
    if case != "another process of that number":  # a process that is gone from this host is known at once
        with pytest.raises(BlockingIOError):
            storage.lock(path).__enter__()
        away = storage.STALE_SECONDS + 1
        os.utime(owner, (owner.stat().st_mtime + (away if case == "of the future" else -away),) * 2)
    with storage.lock(path):
        assert json.loads(owner.read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == [".lock"]


def test_another_error_of_the_lock_is_named_with_its_path(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match=f"^{tmp_path}/.lock cannot be locked: input/output error$"):
        storage.lock(f"{tmp_path}/.lock").__enter__()


def test_a_lock_whose_file_was_removed_is_not_held_by_the_next(tmp_path):
    path, flock = tmp_path / ".lock", fcntl.flock

    def remove_first(fd, how):
        fcntl.flock = flock
        path.unlink()
        return flock(fd, how)

    with contextlib.ExitStack() as stack:
        stack.callback(setattr, fcntl, "flock", flock)
        fcntl.flock = remove_first
        stack.enter_context(storage.lock(str(path)))
        with pytest.raises(BlockingIOError):
            storage.lock(str(path)).__enter__()


RACE = """
import errno, fcntl, os, signal, sys, time
from lowrank_jax.machine import storage
def flock(*_): raise OSError(errno.ENOSYS, "Function not implemented")
if sys.argv[2] == "without":
    fcntl.flock = flock
path = sys.argv[1] + "/.lock"
for _ in range(15):  # each round's owner is killed in the round before
    read, write = os.pipe()
    begin = time.time() + 0.02
    children = []
    for _ in range(6):
        if not (child := os.fork()):
            sys.stderr = open(os.devnull, "w")
            time.sleep(max(0, begin - time.time()))
            try:
                with storage.lock(path):
                    os.write(write, b"1")
                    time.sleep(60)
            except BlockingIOError:
                os.write(write, b"0")
            os._exit(0)
        children.append(child)
    print("".join(sorted(os.read(read, 1).decode() for _ in children)), flush=True)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
"""


@pytest.mark.parametrize("locks", ["with", "without"])
def test_of_many_starters_exactly_one_wins_also_after_a_kill(tmp_path, locks):
    line = [sys.executable, "-c", RACE, str(tmp_path), locks]
    assert subprocess.run(line, cwd=ROOT, capture_output=True, text=True).stdout.split() == ["000001"] * 15
