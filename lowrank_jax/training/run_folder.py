"""A run's folder: its config, its metrics, its ledger of events, and the lock of the process that trains in it.

All processes of a run see the same folder; only the first one writes here.

config.json     the resolved config               tokenizer/      see data/tokenizer.py
metrics.jsonl   one object per logged step        events.jsonl    one object per event, never rewritten
checkpoints/    see checkpoint.py                 report.html, loss.png
"""

import contextlib
import fcntl
import json
import os
import pathlib
import time

from lowrank_jax.config import RunConfig, UsageError
from lowrank_jax.machine import processes
from lowrank_jax.machine.console import to_json

# Keys that cannot change within a run: the weights' shapes, the tokens' meaning, the random draws, the held-out split.
IDENTITY = """
    model.vocab model.d model.layers model.heads model.rank model.rank_split model.shared_kv model.latent_norm model.mlp
    model.mlp_rank model.embed_rank model.tied seed precision tokenizer.path tokenizer.vocab_size optim.name optim.ema
    pretrain.eval_fraction sft.eval_fraction
""".split()
LATER = {"tied": True}  # newer keys of config.model, with the value that every older run has


@contextlib.contextmanager
def lock(folder: str):
    """Create the folder and lock it for this process; raises UsageError where another process trains in it."""
    path = os.path.join(folder, ".lock")
    try:
        os.makedirs(folder, exist_ok=True)
        f = open(path, "w")
    except OSError as e:
        raise UsageError(f"--workdir={folder} cannot be used: {e.strerror}") from None
    with f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is training in {folder}") from None
        try:
            yield
        finally:
            if os.listdir(folder) == [".lock"]:  # the run failed before it wrote anything
                os.remove(path)
                os.rmdir(folder)


def tokenizer_folder(folder: str) -> str:
    return os.path.join(folder, "tokenizer")


def holds_run(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, "config.json"))


def read_config(folder: str) -> RunConfig:
    """Return the config of the run in `folder`; raises UsageError where there is no run."""
    if not holds_run(folder):
        raise UsageError(f"--workdir={folder} holds no run (no config.json); train one with lowrank_jax.main")
    path = pathlib.Path(folder, "config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and isinstance(values.get("model"), dict):
            values["model"] = LATER | values["model"]
        return RunConfig.from_dict(values)
    except ValueError as e:
        raise UsageError(f"{path} is damaged: {e}") from None


def write_config(folder: str, config: RunConfig) -> None:
    write_text(os.path.join(folder, "config.json"), json.dumps(config.to_dict(), indent=2) + "\n")


def write_text(path: str, text: str) -> None:
    """Replace a file in one move, so that a kill leaves the old or the new one."""
    if not processes.is_first():
        return
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)


def differences(old: RunConfig, new: RunConfig) -> list[tuple[str, object, object]]:
    """Return (dotted key, old value, new value) of every setting that differs."""
    olds, news = flatten(old.to_dict()), flatten(new.to_dict())
    return [(key, olds[key], news[key]) for key in olds if olds[key] != news[key]]


def check_same_run(folder: str, old: RunConfig, new: RunConfig) -> None:
    """Raise UsageError where `new` describes another model, or other data, than the run in `folder`."""
    for key, was, now in differences(old, new):
        if key in IDENTITY:
            conflict = f"its config.{key} is {was}, not {now}; use another --workdir, or the config of that run"
            raise UsageError(f"{folder} holds a different run: {conflict}")


def append(folder: str, name: str, row: dict, everyone: bool = False) -> None:
    """Add one object to a .jsonl of the run, on a line of its own even after a line that a kill cut short.

    Only the first process writes, or with `everyone` each process.
    """
    if not (everyone or processes.is_first()):
        return
    with open(os.path.join(folder, name), "a+b") as f:
        f.seek(max(f.tell() - 1, 0))
        is_cut_short = f.read() not in (b"", b"\n")
        f.write(b"\n" * is_cut_short + to_json(row).encode() + b"\n")


def log_event(folder: str, event: str, step: int, everyone: bool = False, **facts) -> None:
    append(folder, "events.jsonl", {"event": event, "step": step, "time": round(time.time(), 3), **facts}, everyone)


def read_rows(folder: str, name: str) -> list[dict]:
    """Return the objects of a .jsonl, without a line that a kill cut short."""
    rows = []
    with contextlib.suppress(FileNotFoundError), open(os.path.join(folder, name), encoding="utf-8") as f:
        for line in f:
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def rewind_metrics(folder: str, step: int) -> None:
    """Drop the metrics of every step after the first `step` updates, which are about to be repeated."""
    rows = [row for row in read_rows(folder, "metrics.jsonl") if row["step"] <= step]
    write_text(os.path.join(folder, "metrics.jsonl"), "".join(to_json(row) + "\n" for row in rows))


def milestones(folder: str) -> set[tuple[str, str, int]]:
    """Return the evaluations and phase ends that the run has done, in the form of `plan.milestones`."""
    evals = {("eval", row["phase"], row["step"]) for row in read_rows(folder, "metrics.jsonl") if "split" in row}
    ends = (event for event in read_rows(folder, "events.jsonl") if event["event"] == "data")
    return evals | {("end", event["phase"], event["step"]) for event in ends}


def newest_checkpoint(folder: str) -> int | None:
    """Return the step of the newest checkpoint, whole or damaged, without opening it."""
    steps = [int(path.name) for path in pathlib.Path(folder, "checkpoints").glob("*") if path.name.isdigit()]
    return max(steps, default=None)


def finished_step(folder: str) -> int | None:
    """Return the step at which training last ended or weights were imported; None where neither has happened."""
    ends = [event["step"] for event in read_rows(folder, "events.jsonl") if event["event"] in ("finish", "import")]
    return ends[-1] if ends else None


def flatten(value, prefix: str = "") -> dict:
    """Return nested groups as one dict with dotted keys."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key in value for k, v in flatten(value[key], f"{prefix}.{key}" if prefix else key).items()}
