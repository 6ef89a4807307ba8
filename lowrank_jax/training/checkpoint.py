"""Checkpoints: model, optimizer, data cursor and progress in one atomic Orbax step, written in the background.

Orbax notices a missing or truncated file but not a flipped byte (measured: it silently restores wrong values). So every
checkpoint has a checksum of its contents, and a restore that does not match falls back to the checkpoint before.
Nothing in a checkpoint depends on the mesh: it is restored onto the layout of `template`.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os

import absl.logging
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.machine import faults, sharding
from lowrank_jax.machine.console import say
from lowrank_jax.training import run_folder
from lowrank_jax.training.plan import Progress

# Orbax logs every folder that it opens, and through asyncio each failed part of a write; we report those in one line.
absl.logging.set_verbosity(absl.logging.FATAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


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
    lacks = isinstance(e, MemoryError) or "RESOURCE_EXHAUSTED" in str(e)
    return lacks or (e is not None and _lacks_memory(e.__cause__ or e.__context__))


class Checkpoints:
    """The checkpoints of a run's folder; a context manager that waits for the last write."""

    def __init__(self, folder: str, keep: int | None = None, read_only: bool = False):
        path = os.path.abspath(os.path.join(folder, "checkpoints"))
        self.folder, self._saves = folder, 0
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, read_only=read_only, create=not read_only)
        self._manager = ocp.CheckpointManager(path, options=options) if not read_only or os.path.isdir(path) else None

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
            reason = " ".join(str(e).split())[:300]
            raise RunFailure(f"a checkpoint could not be written to {self.folder}: {reason}") from None

    def wait(self) -> None:
        """Wait until everything saved is on disk; raises RunFailure for a write that failed."""
        with self._writing():
            self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, newest first."""
        return sorted(self._manager.all_steps(), reverse=True) if self._manager else []

    def save(self, state, progress: Progress) -> bool:
        """Start writing a checkpoint; return False where the step has one. Raises RunFailure for a failed write."""
        if progress.step in self.steps():
            return False
        meta = dataclasses.asdict(progress)
        meta["checksum"] = _checksum(state, meta)
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        with self._writing():
            self._manager.check_for_errors()
            self._manager.save(progress.step, args=items, force=True)
        self._saves += 1
        faults.strike("save", self._saves)
        return True

    def restore(self, template, delete_broken: bool = False) -> tuple[object, Progress] | None:
        """Return (state like `template`, progress) of the newest whole checkpoint; None where there is no checkpoint.

        With `delete_broken`, damaged ones are logged and deleted, so that training may write their steps again. Where
        all are damaged nothing is deleted, as the cause may be elsewhere, and UsageError is raised.
        """
        broken, items = [], {"state": ocp.args.StandardRestore(template), "meta": ocp.args.JsonRestore()}
        for step in self.steps():
            try:
                restored = self._manager.restore(step, args=ocp.args.Composite(**items))
                meta = dict(restored.meta)
                if meta.pop("checksum") != _checksum(restored.state, meta):
                    raise ValueError("its contents do not match their checksum")
            except Exception as e:  # Orbax has no narrower class for a truncated array
                if _lacks_memory(e):  # the checkpoint is not at fault
                    raise
                broken.append((step, " ".join(str(e).split())[:200]))
                continue
            for failed, reason in broken:
                say(f"warning: the checkpoint of step {failed} is damaged ({reason}); using step {step}")
                if delete_broken:
                    run_folder.log_event(self.folder, "restore_failed", failed, reason=reason)
                    self._manager.delete(failed)
            return restored.state, Progress(**{f.name: meta[f.name] for f in dataclasses.fields(Progress)})
        if broken:
            raise UsageError(f"no checkpoint of {self.folder} can be restored; step {broken[0][0]}: {broken[0][1]}")
        return None
