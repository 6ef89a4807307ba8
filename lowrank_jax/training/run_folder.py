"""A run's folder: its config, its metrics, its ledger of events, and the lock of the process that trains in it.

All processes of a run see the same folder; only the first one writes here. Each line of a .jsonl ends with a checksum,
so that a line which was changed on disk is passed over alone.

config.json     the resolved config, and the hash of the tokenizer's files
tokenizer/      see data/tokenizer.py
metrics.jsonl   one object per logged step        events.jsonl    one object per event, never rewritten
checkpoints/    see checkpoint.py                 report.html, loss.png
"""

import contextlib
import functools
import json
import os
import re
import time
import zlib
from typing import NamedTuple

from lowrank_jax.config import RECORDED, RunConfig, RunFailure, UsageError, shown
from lowrank_jax.machine import processes, storage
from lowrank_jax.machine.console import say, to_json

# Keys that cannot change within a run: the weights' shapes, the tokens' meaning, the random draws, the held-out split.
IDENTITY = """
    model.vocab model.d model.layers model.heads model.kv_heads model.rank model.rank_split
    model.shared_kv model.latent_norm model.mlp model.mlp_rank model.embed_rank model.tied
    seed precision tokenizer.path tokenizer.vocab_size optim.name optim.ema
    pretrain.eval_fraction sft.eval_fraction
""".split()
LATER = {"tied": True, "kv_heads": 0}  # newer keys of config.model, with the value that every older run has
LATER_OF_RUN = {"model": LATER, "every": {"tasks": 0}, "tasks": (), "task_limit": 200}  # and of the whole config
# What code reads of a row without asking, and the types of what it reads: checked in rows that have no checksum.
NEEDED = {"metrics.jsonl": "step phase stage", "events.jsonl": "event step", "training": "tokens seq_len"}
NEEDED |= {"evaluation": "eval_loss bits_per_byte", "sample": "phase prompt text", "data": "phase", "tasks": "phase"}
NEEDED |= {"oom": "device", "compile": "stage microbatch remat precision attention peak_bytes note"}
TEXTS = "event phase stage split note device precision attention prompt text".split()
NUMBERS = """
    step time tokens seq_len batch loss lr grad_norm tokens_per_s eval_loss bits_per_byte peak_bytes microbatch
    microbatch_tokens blocked_seconds compile_seconds stall_seconds stall_steps
""".split()


@contextlib.contextmanager
def lock(folder: str):
    """Create the folder and lock it for this process; raises UsageError where another process trains in it."""
    path = os.path.join(folder, ".lock")
    try:
        os.path.abspath(folder).encode()
    except UnicodeEncodeError:  # TensorStore would refuse it at the first save
        raise UsageError(f"--workdir={folder}: checkpoints need a path in UTF-8; rename its folders") from None
    with contextlib.ExitStack() as stack:
        try:
            os.makedirs(folder, exist_ok=True)
            stack.enter_context(storage.lock(path))
            storage.clear_unfinished(folder)
        except BlockingIOError:
            raise UsageError(f"another process is training in {folder}") from None
        except OSError as e:
            raise UsageError(f"--workdir={folder} cannot be used: {e.strerror or e}") from None
        try:
            yield
        finally:
            if {*os.listdir(folder)} <= {".lock", ".lock-owner"}:  # the run failed before it wrote anything
                with contextlib.suppress(OSError):
                    for name in os.listdir(folder):
                        os.remove(os.path.join(folder, name))
                    os.rmdir(folder)


def tokenizer_folder(folder: str) -> str:
    return os.path.join(folder, "tokenizer")


def holds_run(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, "config.json"))


def check_presence(folder: str) -> None:
    """Raise RunFailure where a run that is being trained was removed or moved: its files would be scattered."""
    try:  # another host may see a new file later
        processes.is_first() and storage.again(lambda: os.lstat(os.path.join(folder, "config.json")))
    except FileNotFoundError:
        remedy = "put it back and run the same command again"
        raise RunFailure(f"{folder} was removed or moved while it was trained; {remedy}") from None


def read_config(folder: str, flag: str = "--workdir") -> RunConfig:
    """Return the config of the run in `folder`, which `flag` names; raises UsageError where there is no run."""
    return read_identity(folder, flag)[0]


def read_identity(folder: str, flag: str = "--workdir") -> tuple[RunConfig, str]:
    """Return the config of the run in `folder` and the hash of its tokenizer's files, "" for a run of before."""
    if not holds_run(folder):
        raise UsageError(f"{flag}={folder} holds no run (no config.json); train one with lowrank_jax.main")
    path = os.path.join(folder, "config.json")
    try:
        values = json.loads(storage.read(path).decode("utf-8-sig"))  # an editor may have added a BOM
        older = isinstance(values, dict) and RECORDED not in values
        values = with_later(values)
        if older and isinstance(values.get("pretrain"), dict) and values["pretrain"].get("steps") == 0:
            values["pretrain"]["steps"] = -1  # what 0 meant then
        config = RunConfig.from_dict(values)
    except UsageError as e:
        raise UsageError(f"{path}: {e}") from None
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{path} is damaged: {e}") from None
    return config, "" if older else str(values[RECORDED])


def with_later(values, later: dict = LATER_OF_RUN):
    """Return a run's settings with the keys of LATER_OF_RUN that they lack."""
    if not isinstance(values, dict):
        return values
    groups = {k: with_later(values[k], new) for k, new in later.items() if isinstance(new, dict) and k in values}
    return {key: new for key, new in later.items() if not isinstance(new, dict)} | values | groups


def write_config(folder: str, config: RunConfig, tokenizer_sha256: str = "") -> None:
    values = config.to_dict() | ({RECORDED: tokenizer_sha256} if tokenizer_sha256 else {})
    write_text(os.path.join(folder, "config.json"), json.dumps(values, indent=2) + "\n")


def write_text(path: str, text: str | bytes) -> None:
    """Replace a file in one move, so that a kill leaves the old or the new one."""
    if processes.is_first():
        storage.again(lambda: storage.replace(path, text), _may_write_later)


def _may_write_later(e: BaseException) -> bool:
    return storage.is_transient(e) and not isinstance(e, PermissionError)


def differences(old: RunConfig, new: RunConfig) -> list[tuple[str, object, object]]:
    """Return (dotted key, old value, new value) of every setting that differs."""
    olds, news = flatten(old.to_dict()), flatten(new.to_dict())
    return [(key, olds[key], news[key]) for key in olds if olds[key] != news[key]]


def describe(value) -> str:
    """Return a setting on a few words: sources as on the command line."""
    if isinstance(value, tuple) and value and isinstance(value[0], dict):
        weights = lambda source: "/".join(f"{step}:{weight:g}" for step, weight in source["weight"])
        keys = lambda source: ",".join(source[key] for key in ("text_key", "messages_key", "split"))
        value = " ".join(f"{source['spec']}@{weights(source)}({keys(source)})" for source in value)
    return shown(value)


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
    line = to_json(row | {"crc": _checksum(row)}).encode()
    storage.again(lambda: storage.append_line(os.path.join(folder, name), line), _may_write_later)


def _checksum(row: dict) -> str:
    return f"{zlib.crc32(to_json(row).encode()):08x}"


def log_event(folder: str, event: str, step: int, everyone: bool = False, **facts) -> None:
    append(folder, "events.jsonl", {"event": event, "step": step, "time": round(time.time(), 3), **facts}, everyone)


class _Line(NamedTuple):
    number: int  # from 1
    raw: bytes
    row: dict | None  # None where it is damaged
    has_end: bool  # False while it is being written, or where a kill cut it short


def read_rows(folder: str, name: str) -> list[dict]:
    """Return the objects of a .jsonl; damaged lines are told once and left out, as is an unfinished last one."""
    lines = _read_lines(folder, name)
    _tell(os.path.join(folder, name), *(line.number for line in lines if line.row is None and line.has_end))
    return [line.row for line in lines if line.row is not None]


def _read_lines(folder: str, name: str) -> list[_Line]:
    try:
        raw = storage.read(os.path.join(folder, name))
    except FileNotFoundError:
        return []
    numbered, count = enumerate(raw.split(b"\n"), 1), raw.count(b"\n")
    return [_Line(number, line, _read_row(name, line), number <= count) for number, line in numbered if line.strip()]


def _read_row(name: str, line: bytes) -> dict | None:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # of brackets, thousands deep
        return None
    if not isinstance(row, dict):
        return None
    if "crc" not in row:  # of an older run
        return row if _is_usable(name, row) else None
    return row if row.pop("crc") == _checksum(row) else None


def _is_usable(name: str, row: dict) -> bool:
    kinds = [name, "evaluation" if "split" in row else "training"] if name == "metrics.jsonl" else [name]
    kinds += [str(row.get("event"))] * (name == "events.jsonl")
    needed = " ".join(NEEDED.get(kind, "") for kind in kinds).split()
    is_number = lambda x: type(x) in (int, float) and abs(x) < 2**53
    well_typed = all(isinstance(row[key], str) for key in TEXTS if row.get(key) is not None)
    well_typed &= all(is_number(row[key]) for key in NUMBERS if row.get(key) is not None)
    return name not in NEEDED or (well_typed and all(row.get(key) is not None for key in needed))


@functools.cache
def _tell(path: str, *numbers: int) -> None:
    if numbers:
        shown = ", ".join(map(str, numbers[:5])) + ", ..." * (len(numbers) > 5)
        say(f"warning: {path}: {len(numbers)} damaged lines are passed over (line {shown})")


def rewind_metrics(folder: str, step: int) -> None:
    """Drop the metrics of every step after the first `step` updates, which are about to be repeated.

    Lines that cannot be read are moved to metrics.jsonl.damaged.
    """
    lines, path = _read_lines(folder, "metrics.jsonl"), os.path.join(folder, "metrics.jsonl")
    damaged = [line for line in lines if line.row is None]
    if processes.is_first():
        _tell(path, *(line.number for line in damaged))
        for line in damaged:
            storage.append_line(f"{path}.damaged", line.raw)
    rows = [line.raw for line in lines if line.row is not None and line.row.get("step", 0) <= step]
    if step == 0 and len(rows) + len(damaged) < len(lines):
        say(f"warning: {folder} has no checkpoint after step 0, so training begins again")
    write_text(path, b"".join(raw + b"\n" for raw in rows))


def milestones(folder: str) -> set[tuple[str, str, int]]:
    """Return the evaluations and phase ends that the run has done, in the form of `plan.milestones`."""
    evals = {("eval", row["phase"], row["step"]) for row in read_rows(folder, "metrics.jsonl") if "split" in row}
    kinds, events = {"data": "end", "tasks": "tasks"}, read_rows(folder, "events.jsonl")
    return evals | {(kinds[e["event"]], e["phase"], e["step"]) for e in events if e["event"] in kinds}


def bits_after(folder: str, split: str, step: int) -> float | None:
    """Return the held-out bits per byte of a split at a step; None where the run did not measure them."""
    rows = [row for row in read_rows(folder, "metrics.jsonl") if row.get("split") == split and row["step"] == step]
    return rows[-1]["bits_per_byte"] if rows else None


def checkpoint_steps(folder: str) -> list[int]:
    """Return the steps that have a checkpoint, whole or damaged, newest first; raises OSError for a folder unread."""
    return sorted((int(name) for name, is_checkpoint in _numbered(folder) if is_checkpoint), reverse=True)


def newest_checkpoint(folder: str) -> int | None:
    """Return the step of the newest checkpoint, whole or damaged, without opening it."""
    return next(iter(checkpoint_steps(folder)), None)


def strays(folder: str) -> list[str]:
    """Return the entries with the name of a checkpoint that are none: files, links, and folders of something else."""
    return sorted(name for name, is_checkpoint in _numbered(folder) if not is_checkpoint)


def _numbered(folder: str) -> list[tuple[str, bool]]:
    """Return (name, whether Orbax wrote it) of the entries of `checkpoints` with a number for a name."""
    home = os.path.join(folder, "checkpoints")

    def look() -> list[tuple[str, bool]]:
        entries = list(os.scandir(home))
        return [(e.name, _is_checkpoint(e)) for e in entries if re.fullmatch("0|[1-9][0-9]{0,17}", e.name)]

    try:
        return storage.again(look)
    except FileNotFoundError:
        if os.path.islink(home):  # perhaps its disk is not mounted: the run must not begin again
            raise UsageError(
                f"{home} is a broken link to {os.readlink(home)}; mount that, or remove the link"
            ) from None
        return []


def _is_checkpoint(entry: os.DirEntry) -> bool:
    """Return whether Orbax wrote the folder; it renames a checkpoint to this name when all is written."""
    try:
        for item in ("meta", "state"):
            os.lstat(os.path.join(entry.path, item))  # unlike `exists`, this raises where the disk fails
    except (FileNotFoundError, NotADirectoryError):
        return False
    return entry.is_dir(follow_symlinks=False)


def finished_step(folder: str) -> int | None:
    """Return the step at which training last ended or weights were imported; None where neither has happened."""
    ends = [event["step"] for event in read_rows(folder, "events.jsonl") if event["event"] in ("finish", "import")]
    return ends[-1] if ends else None


def flatten(value, prefix: str = "") -> dict:
    """Return nested groups as one dict with dotted keys."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key in value for k, v in flatten(value[key], f"{prefix}.{key}" if prefix else key).items()}
