"""Trackers: the rows that TensorBoard, W&B and MLflow show after a resume; none of them delays a run."""

import contextlib
import math
import pathlib
import struct
import subprocess
import sys
import threading
import time

import pytest

from lowrank_jax.config import UsageError
from lowrank_jax.training import track

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
TRAIN = {"step": 10, "phase": "sft", "stage": "sft-64", "seq_len": 64, "batch": 4, "tokens": 2560, "loss": 3.5}
TRAIN |= {"lr": 0.01, "grad_norm": math.inf, "tokens_per_s": 99.5, "mfu": None, "skipped": 0}
EVAL = {"step": 10, "phase": "sft", "stage": "sft-64", "split": "sft", "eval_loss": 3.0, "bits_per_byte": 2.5}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(
        track, "PATIENCE", 120.0
    )  # MLflow takes seconds to make its tables, more of them on a busy machine
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)


def send(name: str, folder, steps: range, start: int) -> None:
    """Log 1/step at each of `steps`, as a run that resumes from step `start`."""
    (tracker,) = track.open_trackers((name,), str(folder), {"seed": 3, "model": {"d": 16, "heads": [1, 2]}}, start)
    for step in steps:
        tracker.log(step, {"train/loss": 1 / step, "train/lr": 0.5})
    tracker.close()


def wait_for(ready) -> None:
    """Wait until `ready()` is True, for at most 30 seconds."""
    deadline = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def events(folder) -> list:
    """Return the events in TensorBoard's files, in the order of their writing."""
    from tensorboardX.proto.event_pb2 import Event

    read = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            (size,) = struct.unpack("<Q", data[:8])
            read.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return read


def shown(folder, tag: str) -> list[tuple[int, float]]:
    """Return the points that TensorBoard shows: a session hides older points from its first step on."""
    points = []
    for event in events(folder):
        if event.session_log.status == 1:
            points = [point for point in points if point[0] < event.step]
        points += [(event.step, v.simple_value) for v in event.summary.value if v.tag == tag]
    return points


# ------------------------------------------------------------------------------------------------- rows and packages


def test_rows_get_names_for_their_numbers_and_lose_what_is_not_a_finite_number():
    names = ("seq_len", "batch", "tokens", "loss", "lr", "tokens_per_s", "skipped")
    assert track.values(TRAIN) == {f"train/{name}": TRAIN[name] for name in names}
    assert track.values(EVAL) == {"eval_sft/loss": 3.0, "eval_sft/bits_per_byte": 2.5}
    assert track.values({"step": 1, "loss": None, "grad_norm": math.nan, "lr": 0.5}) == {"train/lr": 0.5}


def test_a_missing_package_is_named_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "a_mere_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not track._installed("a_mere_folder") and track._installed("json")
    monkeypatch.setattr(track, "_installed", lambda module: module in ("tensorboardX", "mlflow"))
    track.check(("tensorboard",))
    with pytest.raises(UsageError, match="wandb .*: pip install wandb$"):
        track.check(("tensorboard", "wandb"))
    with pytest.raises(UsageError, match="mlflow .*: pip install sqlalchemy alembic$"):
        track.check(("mlflow",))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # a server keeps its own tables
    track.check(("mlflow",))


def test_checking_imports_nothing():
    code = "import sys; from lowrank_jax.training import track; track.check(('tensorboard', 'wandb', 'mlflow'));"
    code += "print({'tensorboardX', 'wandb', 'mlflow', 'sqlalchemy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# ---------------------------------------------------------------------------------------------------------- services


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    send("tensorboard", tmp_path, range(1, 9), start=0)
    send("tensorboard", tmp_path, range(5, 11), start=4)
    assert shown(tmp_path, "train/loss") == [(step, pytest.approx(1 / step)) for step in range(1, 11)]
    assert [step for step, _ in shown(tmp_path, "train/lr")] == list(range(1, 11))


def test_tensorboard_has_a_row_on_disk_without_waiting_for_the_end(tmp_path):
    (tracker,) = track.open_trackers(("tensorboard",), str(tmp_path), {}, 0)
    tracker.log(1, {"train/loss": 2.0})
    wait_for(lambda: (tmp_path / "tensorboard").is_dir() and shown(tmp_path, "train/loss"))
    assert shown(tmp_path, "train/loss") == [(1, 2.0)]
    tracker.close()


def test_wandb_goes_on_in_the_same_run(tmp_path):
    folder = tmp_path / "my run"
    folder.mkdir()
    send("wandb", folder, range(1, 4), start=0)
    first = (folder / "wandb.id").read_text()
    send("wandb", folder, range(3, 6), start=2)
    assert (folder / "wandb.id").read_text() == first and first.startswith("my-run-")
    files = list(folder.glob(f"wandb/offline-run-*-{first}*/run-{first}.wandb"))
    assert files
    for file in files:  # W&B's own process writes them, and may end a little after the run
        wait_for(lambda file=file: b"train/loss" in file.read_bytes())
        assert b"lowrank_jax" in file.read_bytes()


def test_mlflow_goes_on_in_the_same_run_with_the_settings_as_parameters(tmp_path):
    import mlflow

    send("mlflow", tmp_path, range(1, 4), start=0)
    send("mlflow", tmp_path, range(4, 6), start=3)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("lowrank_jax")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == (tmp_path / "mlflow.id").read_text()
    assert (run.info.run_name, run.info.status) == (tmp_path.name, "FINISHED")
    assert run.data.params == {"seed": "3", "model.d": "16", "model.heads": "[1, 2]"}
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(step, 1 / step) for step in range(1, 6)]


# ----------------------------------------------------------------------------------------------------------- failures


def test_a_full_disk_is_reported_once_and_training_goes_on(tmp_path, monkeypatch, capfd):
    from tensorboardX import record_writer

    monkeypatch.setattr(record_writer, "open_file", lambda path: open("/dev/full", "wb"))
    started = time.monotonic()
    send("tensorboard", tmp_path, range(1, 2000), start=0)
    assert time.monotonic() - started < 5
    (line,) = capfd.readouterr().err.splitlines()
    assert "tensorboard is left out" in line and "No space left on device" in line


def test_a_server_that_is_away_is_reported_once_and_training_goes_on(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    send("mlflow", tmp_path, range(1, 20), start=0)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "left out" in line]
    assert "mlflow" in line and not (tmp_path / "mlflow.id").exists()


@pytest.mark.parametrize("last", [7, 8])
def test_a_service_is_opened_after_the_first_step_or_at_the_end(last):
    opened, written = threading.Event(), []

    @contextlib.contextmanager
    def service():
        opened.set()
        yield lambda step, values: written.append(step)

    tracker = track.Tracker("it", service(), step=7)
    tracker.log(7, {"eval_pretrain/loss": 1.0})
    assert not opened.wait(0.2)
    if last == 8:
        tracker.log(8, {"train/loss": 1.0})
        assert opened.wait(10)
    tracker.close()
    assert opened.is_set() and written == list(range(7, last + 1))


def test_a_run_without_a_row_opens_no_service():
    tracker = track.Tracker("it", contextlib.nullcontext(pytest.fail), step=7)
    tracker.close()
    tracker.close()


def test_a_slow_service_holds_up_neither_a_step_nor_the_end(monkeypatch, capfd):
    @contextlib.contextmanager
    def slow():
        yield lambda step, values: time.sleep(2)

    monkeypatch.setattr(track, "PATIENCE", 0.1)
    started = time.monotonic()
    tracker = track.Tracker("slow", slow(), step=0)
    for step in range(100):
        tracker.log(step, {"a": 1.0})
    tracker.close()
    assert time.monotonic() - started < 1
    assert "slow: not everything was sent" in capfd.readouterr().err
