"""Checkpoints: model, optimizer, data cursor and progress in one atomic Orbax step, written in the background.

Orbax notices a missing or truncated file but not a flipped byte (measured: it silently restores wrong values). So every
checkpoint has a checksum of its contents, and a restore that does not match falls back to the checkpoint before.
A checkpoint is never deleted but by the rule of `every.keep`, which leaves each phase's last one. A damaged one is
renamed, and one that the file system cannot read now ends the run. Nothing in a checkpoint depends on the mesh: it is
restored onto the layout of `template`.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator

import absl.logging
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.machine import agreement, faults, sharding, storage
from lowrank_jax.machine.console import say
from lowrank_jax.training import run_folder
from lowrank_jax.training.plan import Progress

# Orbax logs every folder that it opens, and through asyncio each failed part of a write; we report those in one line.
absl.logging.set_verbosity(absl.logging.FATAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def _without_echoes(report: Callable) -> Callable:
    """Return a `sys.unraisablehook` that drops what the other reads of a restore report after the first has failed."""

    def hook(args) -> None:
        is_late = isinstance(args.exc_value, RuntimeError) and str(args.exc_value) == "Event loop is closed"
        if not (is_late or getattr(args.object, "__name__", "") == "_read_array_index_and_device_put"):
            report(args)

    return hook


sys.unraisablehook = _without_echoes(sys.unraisablehook)

GONE = {errno.ENOENT, errno.EISDIR, errno.ENOTDIR}  # a file is missing: that is damage, and not a failure to read
# What TensorStore calls an error of the file system; its other words (DATA_LOSS, NOT_FOUND, ...) tell of damage.
UNREAD = "ABORTED CANCELLED DEADLINE_EXCEEDED INTERNAL PERMISSION_DENIED RESOURCE_EXHAUSTED UNAVAILABLE UNKNOWN".split()
CONTENTS = (ValueError, LookupError, TypeError, AttributeError, EOFError)  # of a parser that reads what nobody wrote
LISTINGS, LISTING_PAUSE = 30, 0.2  # of a reader beside a training that deletes what is being read, and seconds between


def tree_sha256(tree) -> str:
    """Return the SHA-256 of the bytes of all arrays, in the order of their paths."""
    digest, leaves = hashlib.sha256(), jax.tree_util.tree_leaves_with_path(tree)
    for _, leaf in sorted((jax.tree_util.keystr(path), leaf) for path, leaf in leaves):
        digest.update(sharding.fetch(leaf).tobytes())
    return digest.hexdigest()


def _checksum(state, progress: dict) -> str:
    """Return a checksum of all values; it is computed on the devices, and the same for every layout of the arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(_sums(state))
    named = {jax.tree_util.keystr(path): sharding.fetch(x).tolist() for path, x in leaves}
    return hashlib.sha256(json.dumps([named, progress], sort_keys=True).encode()).hexdigest()


@jax.jit
def _sums(state):
    """Return two 32-bit sums, which do not depend on their order, over each array's values hashed with their positions.

    The hash is the last part of MurmurHash3 (Appleby, 2011): a change of one value always changes the sums, and any
    other change is missed once in 2^64 times.
    """

    def mix(h):
        h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
        h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
        return h ^ (h >> 16)

    def sums(x):
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
        place, stride = jnp.zeros(x.shape, jnp.uint32), 1
        for axis in reversed(range(x.ndim)):  # `reshape` would move the parts of a sharded array
            place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
            stride *= x.shape[axis]
        first = mix(bits ^ mix(place + 1))
        return jnp.stack([first.sum(dtype=jnp.uint32), mix(first + place).sum(dtype=jnp.uint32)])

    return jax.tree.map(sums, state)


def _lacks_memory(e: BaseException | None) -> bool:
    """Return whether memory, and not another resource such as open files, ran out."""
    of_files = any(os.strerror(n) in str(e) for n in (errno.EMFILE, errno.ENFILE))
    lacks = isinstance(e, MemoryError) or ("RESOURCE_EXHAUSTED" in str(e) and not of_files)
    return lacks or (e is not None and _lacks_memory(e.__cause__ or e.__context__))


def _cause(e: BaseException) -> BaseException:
    return e if e.__cause__ is None else _cause(e.__cause__)


def _reason(e: BaseException) -> str:
    """Return the cause of an error in one line, without the description of the array that TensorStore adds."""
    text = re.sub(r" \[(tensorstore_spec|os_error_code|source locations).*", "", " ".join(str(_cause(e)).split()))
    text = text or type(_cause(e)).__name__
    return text if len(text) <= 500 else f"{text[:250]} ... {text[-250:]}"  # the end names the system's error


def _verdict(e: BaseException) -> str:
    """Return what a failed restore says of its checkpoint: "damaged", "unread" where that may pass, or "unknown".

    TensorStore only quotes errors of the operating system.
    """
    cause, text = _cause(e), str(_cause(e))
    numbers = {n for n in errno.errorcode if getattr(cause, "errno", None) == n or f": {os.strerror(n)}" in text}
    if numbers - GONE or text.partition(":")[0] in UNREAD:
        return "unread"
    if isinstance(cause, OSError) and not numbers and not isinstance(cause, FileNotFoundError):
        return "unread"
    return "damaged" if isinstance(cause, (OSError, *CONTENTS)) else "unknown"


class _Names(ocp.path.step.NameFormat):
    """Lets Orbax see, count and delete nothing but checkpoints, whatever else is in their folder."""

    def build_name(self, step: int) -> str:
        return str(step)

    def find_all(self, base_path) -> Iterator[ocp.path.step.Metadata]:
        return (self.find_step(base_path, step) for step in run_folder.checkpoint_steps(os.path.dirname(base_path)))

    def find_step(self, base_path, step: int) -> ocp.path.step.Metadata:
        return ocp.path.step.Metadata(step=step, path=base_path / str(step))


class Checkpoints:
    """The checkpoints of a run's folder; a context manager that waits for the last write."""

    def __init__(self, folder: str, keep: int | None = None, read_only: bool = False, ends: Collection[int] = ()):
        """`keep` is the number of newest ones that stay (None: all); those of the steps `ends` stay besides."""
        path = os.path.abspath(os.path.join(folder, "checkpoints"))
        self.folder, self._path, self._read_only, self._saves, self._manager = folder, path, read_only, 0, None
        kept = policies.AnyPreservationPolicy([policies.LatestN(keep), policies.CustomSteps(sorted(ends))])
        options = {"preservation_policy": kept, "read_only": read_only, "create": not read_only}
        options["step_name_format"] = _Names()
        if not read_only or run_folder.checkpoint_steps(folder) or run_folder.strays(folder):
            # Lightweight: a reader does not look at a checkpoint that is being deleted.
            options = ocp.CheckpointManagerOptions(**options, lightweight_initialize=True)
            self._manager = ocp.CheckpointManager(path, options=options)
        if strays := not read_only and run_folder.strays(folder):
            say(f"warning: {folder}/checkpoints has entries that are no checkpoints: {', '.join(strays[:5])}")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, failure, *_) -> None:
        if self._manager:  # of two failures the first is reported
            with contextlib.suppress(RunFailure) if failure else contextlib.nullcontext(), self._writing():
                self._manager.close()

    @contextlib.contextmanager
    def _writing(self):
        """Turn whatever Orbax raises for a failed write, such as a full disk, into one line."""
        try:
            yield
        except Exception as e:
            raise RunFailure(f"a checkpoint could not be written to {self.folder}: {_reason(e)}") from None

    def wait(self) -> None:
        """Wait until everything saved is on disk; raises RunFailure for a write that failed."""
        with self._writing():
            self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, newest first."""
        return sorted(self._manager.all_steps(), reverse=True) if self._manager else []

    def save(self, state, progress: Progress) -> str:
        """Start writing a checkpoint; return its checksum, or "" where the step has one.

        Raises RunFailure for a failed write.
        """
        if progress.step in self.steps():
            return ""
        if name := agreement.on_first(lambda: self._set_aside(progress.step, "stray")):
            say(f"warning: {self.folder}/checkpoints/{progress.step} was no checkpoint; it is {name} from now on")
        meta = dataclasses.asdict(progress)
        meta["checksum"] = _checksum(state, meta)
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        with self._writing():
            self._manager.check_for_errors()
            self._manager.save(progress.step, args=items, force=True)
        self._saves += 1
        faults.strike("save", self._saves)
        return meta["checksum"]

    def phases(self) -> dict[int, str]:
        """Return the phase of each checkpoint by step, newest first; "" where its contents cannot be read."""
        return {step: self._phase(step) for step in self.steps()}

    def _phase(self, step: int) -> str:
        with contextlib.suppress(Exception):  # whatever Orbax raises for it: a restore of that checkpoint says it
            return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta["phase"]
        return ""

    def restore(self, template, wanted: Callable[[int], bool] = lambda step: True) -> tuple[object, Progress] | None:
        """Return (state like `template`, progress) of the newest whole checkpoint; None where there is no checkpoint.

        Only those of `wanted` steps count. Damaged ones are passed over and, unless we only read, renamed and logged,
        so that training may write their steps again. Where all are damaged nothing is renamed, as the cause may be
        elsewhere, and UsageError is raised. A checkpoint that cannot be read raises RunFailure after several attempts:
        an older one is not used.
        """
        if not self._manager:
            return None
        if not self._read_only:
            self.wait()
        for _ in range(LISTINGS):
            damaged, steps = {}, run_folder.checkpoint_steps(self.folder)
            for step in filter(wanted, steps):
                try:
                    restored = self._read(step, template)
                except _Damaged as e:
                    damaged[step] = str(e)
                    if self._is_changing(steps):
                        break
                else:
                    for failed, reason in damaged.items():
                        self._condemn(failed, reason, step)
                    return restored
            if not self._is_changing(steps):
                break
            time.sleep(LISTING_PAUSE)
        for step, reason in damaged.items():
            raise UsageError(f"no checkpoint of {self.folder} can be restored; step {step}: {reason}")
        return None

    def _is_changing(self, steps: list[int]) -> bool:
        """Return whether a training has saved and deleted checkpoints since we, who only read, listed these."""
        is_half_deleted = not steps and run_folder.strays(self.folder)
        return self._read_only and bool(is_half_deleted or run_folder.checkpoint_steps(self.folder) != steps)

    def _read(self, step: int, template) -> tuple[object, Progress]:
        """Return a checkpoint's (state, progress); raises _Damaged where two attempts find damage, else RunFailure."""
        items = {"state": ocp.args.StandardRestore(template), "meta": ocp.args.JsonRestore()}
        verdicts = []

        def read() -> tuple[object, Progress]:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
            meta = dict(restored.meta)
            if (checksum := meta.pop("checksum")) != _checksum(restored.state, meta):
                raise ValueError("its contents do not match their checksum")
            if meta["step"] != step:
                raise ValueError(f"it is the checkpoint of step {meta['step']}")
            self._tell_foreign(step, checksum)
            return restored.state, Progress(**{f.name: meta[f.name] for f in dataclasses.fields(Progress)})

        def may_pass(e: BaseException) -> bool:
            verdicts.append("no memory" if _lacks_memory(e) else _verdict(e))
            return verdicts[-1] == "unread" or verdicts == ["damaged"]

        def note(e: BaseException, pause: float) -> None:
            if verdicts[-1] == "unread":
                self._note(step, "retry", f"cannot be read now ({_reason(e)}); trying again in {pause} s", _reason(e))

        try:
            return storage.again(read, may_pass, note)
        except Exception as e:  # Orbax has no narrower class for a truncated array
            if verdicts[-1] == "no memory":  # the checkpoint is not at fault
                raise
            if verdicts[-1] == "damaged":
                raise _Damaged(_reason(e)) from None
            stays = "it stays as it is; run the same command again later, or rename it to use the one before"
            where, count = os.path.join(self._path, str(step)), len(verdicts)
            raise RunFailure(f"{where} cannot be read: {_reason(e)} ({count} attempts); {stays}") from None

    def _tell_foreign(self, step: int, checksum: str) -> None:
        """Tell where the run saved another checkpoint at this step: whoever put this one in its place may want it."""
        with contextlib.suppress(OSError):
            rows = run_folder.read_rows(self.folder, "events.jsonl")
            logged = [row.get("checksum", checksum) for row in rows if row["event"] == "save" and row["step"] == step]
            if logged and logged[-1] != checksum:
                say(f"warning: the checkpoint of step {step} is not the one that {self.folder} saved; whose is it?")

    def _condemn(self, step: int, reason: str, used: int) -> None:
        """Tell that a checkpoint is damaged and, unless we only read, rename it."""
        name = "" if self._read_only else agreement.on_first(lambda: self._set_aside(step, "damaged"))
        renamed = f"; it is {name} from now on" * bool(name)
        self._note(step, "restore_failed", f"is damaged ({reason}); using step {used}{renamed}", reason)
        if name:
            self._manager.reload()

    def _set_aside(self, step: int, why: str) -> str:
        """Rename what has the name of a step's checkpoint; return its new name, or "" where there is nothing."""
        path = os.path.join(self._path, str(step))
        taken = lambda number: os.path.lexists(f"{path}.{why}{number or ''}")
        number = next(n for n in (0, *range(2, 10**6)) if not taken(n))
        if os.path.lexists(path):
            os.rename(path, f"{path}.{why}{number or ''}")
            return f"{step}.{why}{number or ''}"
        return ""

    def _note(self, step: int, event: str, message: str, reason: str) -> None:
        say(f"warning: the checkpoint of step {step} {message}")
        if not self._read_only:
            run_folder.log_event(self.folder, event, step, reason=reason)


class _Damaged(Exception):
    """The contents of a checkpoint are not those that were written."""
