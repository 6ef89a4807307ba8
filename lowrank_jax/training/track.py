"""A run's metric rows, copied to TensorBoard, Weights & Biases or MLflow as they are logged.

metrics.jsonl stays the record; trackers only show it. Each tracker has its own thread, so that neither a slow network
nor a full disk delays training; a tracker that fails is reported in one line and dropped.

tensorboard   FOLDER/tensorboard
wandb         the project WANDB_PROJECT, by default lowrank_jax; FOLDER/wandb until it is sent
mlflow        the experiment MLFLOW_EXPERIMENT_NAME, by default lowrank_jax, at MLFLOW_TRACKING_URI or FOLDER/mlflow.db

A resumed run continues the W&B or MLflow run whose name is in FOLDER/wandb.id or FOLDER/mlflow.id. TensorBoard shows
repeated steps once; the others keep both rows, which are equal unless the config was changed.
"""

import contextlib
import importlib.util
import logging
import math
import os
import pathlib
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator

from lowrank_jax.config import UsageError
from lowrank_jax.machine.console import say
from lowrank_jax.training import run_folder

PROJECT = "lowrank_jax"
PATIENCE = 15.0  # seconds that the end of a run waits for rows to be sent: a preempted machine has about 30 left
SETTING_CHARACTERS = 250  # of a setting's value in MLflow, whose servers refuse long ones
SETTINGS_AT_ONCE = 100  # MLflow's maximum
PACKAGES = {"mlflow": "mlflow-skinny"}  # of modules that are named otherwise

Write = Callable[[int, dict[str, float]], None]


def check(names: tuple[str, ...]) -> None:
    """Raise UsageError where a named tracker's package is not installed."""
    tables = () if os.environ.get("MLFLOW_TRACKING_URI") else ("sqlalchemy", "alembic")  # a server has its own tables
    needs = {"tensorboard": ("tensorboardX",), "wandb": ("wandb",), "mlflow": ("mlflow", *tables)}
    for name in names:
        missing = [PACKAGES.get(module, module) for module in needs[name] if not _installed(module)]
        if missing:
            raise UsageError(f"config.track: {name} needs packages that are missing: pip install {' '.join(missing)}")


def _installed(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None  # a mere folder of that name, such as ./wandb, has no origin


def values(row: dict) -> dict[str, float]:
    """Return the finite numbers of a row of metrics.jsonl under the names that trackers show, such as train/loss."""
    group = f"eval_{row['split']}" if "split" in row else "train"
    numbers = {key.removeprefix("eval_"): v for key, v in row.items() if key != "step" and isinstance(v, (int, float))}
    return {f"{group}/{key}": float(v) for key, v in numbers.items() if math.isfinite(v)}


def open_trackers(names: tuple[str, ...], folder: str, settings: dict, step: int) -> list["Tracker"]:
    """Return a tracker for each name; `settings` is the run's config, `step` the step from which it starts."""
    services = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
    return [Tracker(name, services[name](folder, settings, step), step) for name in names]


class Tracker:
    """A queue of rows for one service. `log` and `close` never raise, and only `close` waits.

    The service is opened after the first step: tensorboardX imports PyTorch where that is installed, 1.3 s.
    """

    def __init__(self, name: str, service: contextlib.AbstractContextManager[Write], step: int):
        self._name, self._first, self._rows = name, step, queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, args=(service,), name=f"track-{name}", daemon=True)

    def log(self, step: int, values: dict[str, float]) -> None:
        if step > self._first and not self._thread.ident:
            self._thread.start()
        if self._thread.is_alive() or not self._thread.ident:  # otherwise nobody would take the row
            self._rows.put((step, values))

    def close(self) -> None:
        if not self._thread.ident:
            if self._rows.empty():
                return
            self._thread.start()
        self._rows.put(None)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            say(f"{self._name}: not everything was sent within {PATIENCE:.0f} s; metrics.jsonl has it all")

    def _send(self, service: contextlib.AbstractContextManager[Write]) -> None:
        try:
            with service as write:
                for step, values in iter(self._rows.get, None):
                    write(step, values)
        except Exception as e:  # no failure of a service is a reason to stop training
            reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
            say(f"{self._name} is left out from now on ({reason}); metrics.jsonl has every row")


@contextlib.contextmanager
def _tensorboard(folder: str, settings: dict, step: int) -> Iterator[Write]:
    # Not SummaryWriter: when a disk is full its thread dies silently, and the tenth row after that waits forever.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary

    home = os.path.join(folder, "tensorboard")
    os.makedirs(home, exist_ok=True)
    writer = EventsWriter(os.path.join(home, "events"), f".{time.time_ns()}")  # its own clock has seconds only

    def put(step: int, **content) -> None:
        writer.write_event(Event(wall_time=time.time(), step=step, **content))
        writer.flush()

    put(step + 1, session_log=SessionLog(status=SessionLog.START))  # TensorBoard forgets later steps of before
    scalar = lambda item: Summary.Value(tag=item[0], simple_value=item[1])
    yield lambda step, values: put(step, summary=Summary(value=map(scalar, values.items())))
    writer.close()


@contextlib.contextmanager
def _wandb(folder: str, settings: dict, step: int) -> Iterator[Write]:
    import wandb

    path, name = pathlib.Path(folder, "wandb.id"), os.path.basename(os.path.abspath(folder))
    if not path.is_file():  # random, as W&B does not reuse the name of a deleted run
        run_folder.write_text(str(path), f"{re.sub('[^A-Za-z0-9_-]', '-', name)[:40]}-{secrets.token_hex(4)}")
    options = {"project": os.environ.get("WANDB_PROJECT", PROJECT), "name": name, "dir": folder, "config": settings}
    options |= {"id": path.read_text().strip(), "resume": "allow", "allow_val_change": True}
    how = {"silent": True, "console": "off", "init_timeout": 30}  # a console would wrap stdout and its progress bar
    how |= {"finish_timeout": PATIENCE - 5, "finish_timeout_raises": True}  # otherwise it waits for the network
    run = wandb.init(**options, settings=wandb.Settings(**how))
    if not run.offline:
        say(f"wandb: {run.url}")
    run.define_metric("*", step_metric="step")  # W&B's own steps only rise: repeated steps would be lost
    yield lambda step, values: run.log({"step": step} | values)
    run.finish()


@contextlib.contextmanager
def _mlflow(folder: str, settings: dict, step: int) -> Iterator[Write]:
    import mlflow
    from mlflow.entities import Metric, Param

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it reports every table that it creates
    path, database = pathlib.Path(folder, "mlflow.id"), os.path.join(os.path.abspath(folder), "mlflow.db")
    client = mlflow.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{database}")
    try:
        run = path.read_text().strip()
        client.update_run(run, status="RUNNING")
    except (OSError, mlflow.MlflowException):  # a new run, or another server than before
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = client.get_experiment_by_name(project)
        number = experiment.experiment_id if experiment else client.create_experiment(project)
        run = client.create_run(number, run_name=os.path.basename(os.path.abspath(folder))).info.run_id
        run_folder.write_text(str(path), run)
        params = [Param(key, str(value)[:SETTING_CHARACTERS]) for key, value in run_folder.flatten(settings).items()]
        for start in range(0, len(params), SETTINGS_AT_ONCE):
            client.log_batch(run, params=params[start : start + SETTINGS_AT_ONCE])

    metric = lambda item, step: Metric(*item, int(time.time() * 1000), step)
    yield lambda step, values: client.log_batch(run, metrics=[metric(item, step) for item in values.items()])
    client.set_terminated(run)
