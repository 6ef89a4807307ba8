"""Runs in buckets: an fsspec filesystem in memory, where every request can fail or be the last one."""

import contextlib
import json
import os
import pathlib
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


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package catches it."""


def die_at(monkeypatch, system, last: int) -> None:
    """Let every change of the bucket after the first `last` ones raise Killed."""
    count = iter(range(last))

    def dying(do):
        def request(*args, **kwargs):
            if next(count, None) is None:
                raise Killed
            return do(*args, **kwargs)

        return request

    for name in ("pipe_file", "put_file", "rm_file"):
        monkeypatch.setattr(type(system), name, dying(getattr(type(system), name)))


def test_a_kill_at_any_request_leaves_the_newest_whole_checkpoint_and_its_metrics(bucket, tmp_path, monkeypatch):
    """The sender dies before its n-th change of the bucket, for every n; another host goes on from what is left."""
    is_over, last, seen = False, 0, set()
    while not is_over:
        bucket.store.clear()
        on_another_host(tmp_path, monkeypatch)
        with training():
            save(2)
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            with training():
                save(4), forget(2)
                die_at(patch, bucket, last)
            is_over = True
        bucket.store.pop("/bucket/runs/a/.lock-owner", None)  # its lease ends
        on_another_host(tmp_path, monkeypatch)
        with training() as folder:
            newest = run_folder.newest_checkpoint(folder)
            assert (folder / f"checkpoints/{newest}/state/d/{newest}").read_text() == f"weights {newest}"
            assert len((folder / "metrics.jsonl").read_text().splitlines()) > newest
            save(6)
        whole = json.loads(objects(bucket)["mirror.json"])["checkpoints"]
        assert {name.split("/")[1] for name in objects(bucket) if name.startswith("checkpoints/")} == {*whole}
        seen.add(newest)
        last += 1
    assert seen == {2, 4} and last > 8


def test_what_a_host_could_not_send_is_sent_by_its_next_start(bucket, monkeypatch):
    with training():
        save(2)
    refuse = lambda *args, **kwargs: (_ for _ in ()).throw(PermissionError("access denied"))
    with monkeypatch.context() as patch, pytest.raises(RunFailure, match="access denied; the run is whole in .*same"):
        with training():
            save(4)
            patch.setattr(type(bucket), "put_file", refuse)
    assert "checkpoints/4/meta/metadata" not in objects(bucket)
    with training() as folder:
        assert run_folder.newest_checkpoint(folder) == 4
    assert "checkpoints/4/meta/metadata" in objects(bucket)


def test_a_folder_whose_run_another_host_went_on_with_is_replaced(bucket, tmp_path, monkeypatch):
    first = os.environ[mirror.VARIABLE]
    with training():
        save(2)
    on_another_host(tmp_path, monkeypatch)
    with training():
        save(4)
    monkeypatch.setenv(mirror.VARIABLE, first)
    with training() as folder:
        assert run_folder.checkpoint_steps(folder) == [4, 2]
    bucket.rm("/bucket/runs/a", recursive=True)  # by its owner, who begins again
    with training() as folder:
        assert not run_folder.holds_run(folder) and run_folder.checkpoint_steps(folder) == []


def test_a_reader_gets_the_newest_whole_checkpoint_while_the_run_is_trained(bucket, tmp_path, monkeypatch, capsys):
    with training():
        save(2), save(4)
    with training(), mirror.opened(URL) as folder, mirror.opened(URL, writes=("report.html",)) as second:
        assert run_folder.checkpoint_steps(folder) == [4] == run_folder.checkpoint_steps(second)
        pathlib.Path(second, "report.html").write_text("page")
    assert objects(bucket)["report.html"] == b"page"
    bucket.pipe("/bucket/runs/a/checkpoints/4/state/d/4", b"weights 5")
    with mirror.opened(URL) as folder:
        assert (pathlib.Path(folder) / "checkpoints/4/state/d/4").read_text() == "weights 4"  # it was fetched whole
    on_another_host(tmp_path, monkeypatch)
    with mirror.opened(URL) as folder:
        assert run_folder.checkpoint_steps(folder) == [4, 2]  # the restore finds 4 damaged, and says so
    assert "checkpoints/4 is not what was sent" in capsys.readouterr().err


def test_a_copy_of_a_local_run_in_a_bucket_is_a_run(bucket, tmp_path, monkeypatch):
    save(2), save(4)
    bucket.put(mirror.place(URL) + "/", "/bucket/runs/a/", recursive=True)
    on_another_host(tmp_path, monkeypatch)
    with mirror.opened(URL) as folder:
        assert run_folder.checkpoint_steps(folder) == [4, 2]
    with training() as folder:
        assert run_folder.checkpoint_steps(folder) == [4, 2]
    assert {*json.loads(objects(bucket)["mirror.json"])["checkpoints"]} == {"2", "4"}
    for name in ("meta/metadata", "state/d/4"):  # of a run that went on elsewhere
        bucket.copy(f"/bucket/runs/a/checkpoints/4/{name}", f"/bucket/runs/a/checkpoints/8/{name}")
    with mirror.opened(URL) as folder:
        assert run_folder.checkpoint_steps(folder) == [8, 4, 2]


def test_one_process_trains_in_a_bucket(bucket, tmp_path, monkeypatch):
    with training():
        on_another_host(tmp_path, monkeypatch)
        monkeypatch.setattr(storage, "_host", lambda: "another")
        with pytest.raises(UsageError, match="another process is training in memory://bucket/runs/a, or did 120 s ago"):
            training().__enter__()
        monkeypatch.setattr(storage, "STALE_SECONDS", -1)  # no heartbeat for long
        with training():
            owner = json.loads(objects(bucket)[".lock-owner"])
            assert owner["host"] == "another"
            sender = mirror._Sender(Bucket(URL), mirror.place(URL), {"id": "", "checkpoints": {}}, lambda: False)
            with pytest.raises(TimeoutError, match="may belong to another process"):
                sender._declare({}, [])
        monkeypatch.undo()
        monkeypatch.setenv(mirror.VARIABLE, str(tmp_path / "copies"))
    assert ".lock-owner" not in objects(bucket)


def test_a_run_that_fails_before_its_first_file_leaves_nothing(bucket, tmp_path):
    with pytest.raises(UsageError, match="memory://bucket/runs/a/x is wrong"), training() as folder:
        raise UsageError(f"{folder}/x is wrong")
    assert objects(bucket) == {} and not folder.exists()


def test_a_damaged_manifest_and_names_that_lead_out_are_not_followed(bucket, tmp_path, monkeypatch):
    with training():
        save(2)
    manifest = json.loads(objects(bucket)["mirror.json"])
    manifest["checkpoints"]["4"] = {"../../../x": None}
    bucket.pipe("/bucket/runs/a/mirror.json", json.dumps(manifest).encode())
    with mirror.opened(URL) as folder:
        assert run_folder.checkpoint_steps(folder) == [2]
    for text in (b"[", b"[]", b"{}", b'{"id": 1, "checkpoints": {"x": {}}}'):
        bucket.pipe("/bucket/runs/a/mirror.json", text)
        with pytest.raises(UsageError, match="mirror.json is damaged; delete it"):
            mirror.opened(URL).__enter__()


@pytest.mark.parametrize("url, package", [("s3://b/r", "s3fs"), ("gs://b/r", "gcsfs")])
def test_a_missing_package_is_named(monkeypatch, url, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, url[:2], raising=False)
    with pytest.raises(UsageError, match=f"--workdir={url} needs the package {package}: pip install {package}"):
        mirror.trained(url).__enter__()


@pytest.mark.parametrize("flag", ["--workdir", "workdir", "folder", "config.init_from"])
def test_an_address_in_a_bucket_names_a_run_and_nothing_else(flag):
    for url in ("s3://bucket/run", "gs://bucket/a/b"):
        assert local_path(url, flag) == url
        with pytest.raises(UsageError, match="only local paths"):
            local_path(url, "--out")
    for text in ("s3://bucket", "s3://bucket/", "s3:/bucket/run", "http://host/run", "file:///tmp/x"):
        with pytest.raises(UsageError, match="only local paths"):
            local_path(text, flag)


def test_a_run_in_a_local_folder_does_not_touch_any_of_this(tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "Bucket", None)
    with mirror.trained(str(tmp_path)), mirror.opened(str(tmp_path)) as folder:
        assert folder == mirror.place(str(tmp_path)) == str(tmp_path) and not list(tmp_path.iterdir())
