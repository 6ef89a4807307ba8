"""Runs in buckets: an fsspec filesystem in memory, where every request can fail or be the last one."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys

import fsspec
import pytest

from lowrank_jax.config import RunFailure, UsageError, local_path
from lowrank_jax.machine import storage
from lowrank_jax.machine.bucket import Bucket
from lowrank_jax.training import mirror, run_folder

URL = "memory://bucket/runs/a"


@pytest.fixture(autouse=True)
def bucket(tmp_path, monkeypatch):
    """An empty bucket, local copies in `tmp_path`, and a sender that works when a test says so."""
    monkeypatch.setenv(mirror.VARIABLE, str(tmp_path / "copies"))
    monkeypatch.setattr(mirror, "LOOK_SECONDS", 1000)
    monkeypatch.setattr(storage, "PAUSES", (0, 0))
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


def objects(system) -> dict[str, bytes]:
    return {name.removeprefix("/bucket/runs/a/"): system.cat(name) for name in system.find("/bucket/runs/a")}


def write(name: str, text: str) -> None:
    path = pathlib.Path(mirror.place(URL), name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def save(step: int, text: str = "") -> None:
    """Leave what a run leaves at a save: a row for every step, and a checkpoint."""
    write(f"checkpoints/{step}/meta/metadata", f"step {step}")
    write(f"checkpoints/{step}/state/d/{step}", text or f"weights {step}")
    write("metrics.jsonl", "".join(f"row {n}\n" for n in range(step + 1)))
    write("config.json", "{}")


def forget(step: int) -> None:
    for name in ("meta/metadata", f"state/d/{step}"):
        os.remove(pathlib.Path(mirror.place(URL), "checkpoints", str(step), name))
    for name in ("meta", "state/d", "state", ""):
        os.rmdir(pathlib.Path(mirror.place(URL), "checkpoints", str(step), name))


def on_another_host(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(mirror.VARIABLE, str(tmp_path / f"host{len(list(tmp_path.iterdir()))}"))


@contextlib.contextmanager
def training():
    with run_folder.lock(mirror.place(URL)), mirror.trained(URL):
        yield pathlib.Path(mirror.place(URL))


def test_a_run_goes_on_on_another_host_and_the_bucket_is_its_folder(bucket, tmp_path, monkeypatch):
    with training():
        save(2), save(4)
    assert {*json.loads(objects(bucket)["mirror.json"])["checkpoints"]} == {"2", "4"}
    assert objects(bucket)["metrics.jsonl"].endswith(b"row 4\n") and ".lock-owner" not in objects(bucket)
    on_another_host(tmp_path, monkeypatch)
    with training() as folder:
        assert run_folder.checkpoint_steps(folder) == [4, 2]
        assert (folder / "checkpoints/4/state/d/4").read_text() == "weights 4"
        forget(2), save(6)
    assert run_folder.checkpoint_steps(folder) == [6, 4]
    assert not any(name.startswith("checkpoints/2/") for name in objects(bucket))


def test_a_kill_at_any_request_leaves_the_newest_whole_checkpoint_and_its_metrics(bucket, tmp_path, monkeypatch):
    """The sender dies before its n-th change of the bucket, for every n; another host goes on from what is left."""

    class Killed(BaseException):
        pass

    def die_at(system, last: int):
        count = iter(range(last))

        def wrapped(do):
            def request(*args, **kwargs):
                if next(count, None) is None:
                    raise Killed
                return do(*args, **kwargs)

            return request

        for name in ("pipe_file", "put_file", "rm_file"):
            monkeypatch.setattr(type(system), name, wrapped(getattr(type(system), name)))

    is_over, last, seen = False, 0, set()
    while not is_over:
        bucket.store.clear()
        on_another_host(tmp_path, monkeypatch)
        with training():
            save(2)
        with monkeypatch.context() as patch:
            patch.setattr(mirror, "_Sender", mirror._Sender)
            before = {name: getattr(type(bucket), name) for name in ("pipe_file", "put_file", "rm_file")}
            try:
                with contextlib.ExitStack() as stack:
                    stack.enter_context(training())
                    save(4), forget(2)
                    die_at(bucket, last)
                is_over = True
            except Killed:
                pass
            finally:
                for name, do in before.items():
                    setattr(type(bucket), name, do)
        bucket.store.pop("/bucket/runs/a/.lock-owner", None)  # its lease ends
        on_another_host(tmp_path, monkeypatch)
        with training() as folder:
            newest = run_folder.newest_checkpoint(folder)
            seen.add(newest)
            assert (folder / f"checkpoints/{newest}/state/d/{newest}").read_text() == f"weights {newest}"
            rows = (folder / "metrics.jsonl").read_text().splitlines()
            assert len(rows) > newest
            save(6)
        assert {name.split("/")[1] for name in objects(bucket) if name.startswith("checkpoints/")} >= {"6"}
        tracked = json.loads(objects(bucket)["mirror.json"])["checkpoints"]
        assert all(n.split("/")[1] in tracked for n in objects(bucket) if n.startswith("checkpoints/")), "left behind"
        last += 1
    assert seen == {2, 4} and last > 8
