"""Checkpoints: a saved state is restored bit for bit, and one that is damaged on disk is noticed and passed over."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.training import checkpoint, run_folder, step, trained
from lowrank_jax.training.checkpoint import Checkpoints, tree_sha256
from lowrank_jax.training.plan import Progress

# Orbax leaves coroutines behind where it fails to read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CURSOR = {"sources": ["text:a"], "drawn": [2**40], "offset": 3}


def progress_at(step: int, **changes) -> Progress:
    return dataclasses.replace(Progress(step=step, data_sha256="ab\u6f22", cursor=CURSOR), **changes)


@pytest.fixture(scope="module")
def template(make):
    return step.abstract_state(make.run_config())


@pytest.fixture(scope="module")
def states(make) -> list:
    """Three states that differ in every number, as after three updates."""
    first = step.first_state(make.run_config(), step.init_params(make.run_config()))
    noise = lambda x, n: (x + n * (1 + np.arange(x.size).reshape(x.shape))).astype(x.dtype)
    return [jax.tree.map(lambda x, n=n: jnp.asarray(noise(np.asarray(x), n)), first) for n in range(3)]


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory, states) -> pathlib.Path:
    """A folder with the checkpoints 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    with Checkpoints(str(folder)) as saved:
        for i, state in enumerate(states):
            saved.save(state, progress_at(i + 1))
    return folder


@pytest.fixture
def run(saved_run, tmp_path) -> str:
    """A copy of `saved_run` that a test may damage."""
    return str(shutil.copytree(saved_run, tmp_path / "run"))


def restore(folder: str, template, **options):
    with Checkpoints(folder) as saved:
        return saved.restore(template, **options)


def bits(tree) -> list:
    """Every array's path, type, shape and bytes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), x.dtype, x.shape, np.asarray(x).tobytes()) for path, x in leaves]


def array_data(folder: str, at_step: int) -> pathlib.Path:
    """The file with most of a step's numbers."""
    files = pathlib.Path(folder, "checkpoints", str(at_step), "state", "ocdbt.process_0", "d").iterdir()
    return max(files, key=lambda path: path.stat().st_size)


def flip(path: pathlib.Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)


def failures(folder: str) -> list[int]:
    return [e["step"] for e in run_folder.read_rows(folder, "events.jsonl") if e["event"] == "restore_failed"]


# ------------------------------------------------------------------------------------------------- save and restore


def test_the_newest_checkpoint_comes_back_bit_for_bit_with_its_progress(run, states, template):
    state, progress = restore(run, template)
    assert bits(state) == bits(states[2])
    assert jax.tree.structure(state) == jax.tree.structure(states[2])
    assert progress == progress_at(3)


def test_the_other_optimizer_survives_with_its_named_tuples_too(make, tmp_path):
    config = make.run_config(optim__name="adamw", model__layers=1)
    state = step.first_state(config, step.init_params(config))
    with Checkpoints(str(tmp_path)) as saved:
        saved.save(state, progress_at(5))
    restored, _ = restore(str(tmp_path), step.abstract_state(config))
    assert bits(restored) == bits(state) and jax.tree.structure(restored) == jax.tree.structure(state)


def test_numbers_that_are_not_finite_survive_too(tmp_path):
    state = {"x": jnp.asarray([np.nan, np.inf, -0.0, 1e-45], jnp.float32)}
    with Checkpoints(str(tmp_path)) as saved:
        saved.save(state, progress_at(1))
    assert bits(restore(str(tmp_path), state)[0]) == bits(state)


def test_a_step_that_consumes_the_state_while_it_is_written_changes_nothing(tmp_path):
    consume = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0)
    state = {"x": jnp.arange(3_000_000, dtype=jnp.float32)}
    expected = bits(state)
    with Checkpoints(str(tmp_path)) as saved:
        saved.save(state, progress_at(1))
        jax.block_until_ready(consume(state))
        saved.wait()
    assert bits(restore(str(tmp_path), {"x": jnp.zeros(3_000_000)})[0]) == expected


def test_only_the_newest_checkpoints_are_kept(tmp_path, states, template):
    with Checkpoints(str(tmp_path), keep=2) as saved:
        for i in (3, 7, 11, 20):
            saved.save(states[i % 3], progress_at(i))
        saved.wait()
        assert saved.steps() == [20, 11]
    state, progress = restore(str(tmp_path), template)
    assert progress.step == 20 and bits(state) == bits(states[2])


def test_the_last_checkpoint_of_each_phase_is_kept_and_can_be_chosen(tmp_path, states, template):
    """Whatever `keep` says, also after a resume, and the one of a phase is read by the checkpoint's own progress."""
    phases = {3: "pretrain", 5: "pretrain", 7: "sft", 8: "sft", 9: "sft"}
    for steps in ((3, 5, 7), (8, 9)):
        with Checkpoints(str(tmp_path), keep=1, ends={5, 9}) as saved:
            for i in steps:
                saved.save(states[i % 3], progress_at(i, phase=phases[i]))
    with Checkpoints(str(tmp_path), read_only=True) as saved:
        assert saved.phases() == {9: "sft", 5: "pretrain"}
        state, progress = saved.restore(template, lambda step: step == 5)
        assert progress.step == 5 and bits(state) == bits(states[2])
        for at, phase, step in ((None, "pretrain", 5), (5, "", 5), (9, "sft", 9), (None, "", 9)):
            wanted = trained._wanted(saved, "--workdir=x", at, phase)
            assert saved.restore(template, wanted)[1].step == step
        for at, phase, named in ((7, "", "step 7"), (None, "dpo", "phase 'dpo'"), (5, "sft", "step 5 and phase 'sft'")):
            with pytest.raises(
                UsageError, match=f"^--workdir=x has no checkpoint of {named}; it has step 9 .sft., step 5 "
            ):
                trained._wanted(saved, "--workdir=x", at, phase)
    (tmp_path / "checkpoints/5/meta/metadata").write_text("{")
    with Checkpoints(str(tmp_path), read_only=True) as saved:  # damaged, and not deleted or passed over
        assert saved.phases() == {9: "sft", 5: ""}
        with pytest.raises(UsageError, match="can be restored; step 5"):
            saved.restore(template, trained._wanted(saved, "x", 5, ""))
    assert (tmp_path / "checkpoints/5").is_dir()


def test_saving_a_step_twice_keeps_the_first(run, states, template):
    with Checkpoints(run) as saved:
        assert not saved.save(states[0], progress_at(3, tokens=9))
        assert saved.save(states[0], progress_at(4))
        assert not saved.save(states[1], progress_at(4, tokens=9))
        assert saved.steps() == [4, 3, 2, 1]
    state, progress = restore(run, template)
    assert progress == progress_at(4) and bits(state) == bits(states[0])


def test_a_last_write_that_fails_is_raised_unless_something_failed_before(tmp_path, monkeypatch):
    """At the end of the context the disk is full."""

    def leave(failure: Exception | None) -> None:
        with Checkpoints(str(tmp_path)) as saved:
            close = saved._manager.close
            monkeypatch.setattr(saved._manager, "close", fail)
            close()
            if failure:
                raise failure

    def fail():
        raise OSError("No space left on device")

    with pytest.raises(RunFailure, match="could not be written.*No space left"):
        leave(None)
    first = ValueError("the loss is not finite")
    with pytest.raises(ValueError) as e:
        leave(first)
    assert e.value is first


@pytest.mark.parametrize("read_only", [False, True])
def test_a_run_without_checkpoints_restores_none(tmp_path, template, read_only):
    with Checkpoints(str(tmp_path), read_only=read_only) as saved:
        assert saved.steps() == [] and saved.restore(template) is None
    assert os.path.isdir(tmp_path / "checkpoints") is not read_only


def test_a_reader_changes_nothing(run, states, template):
    flip(array_data(run, 3))
    before = {path: path.stat().st_mtime_ns for path in pathlib.Path(run).rglob("*")}
    with Checkpoints(run, read_only=True) as saved:
        state, progress = saved.restore(template)
    assert progress.step == 2 and bits(state) == bits(states[1])
    assert before == {path: path.stat().st_mtime_ns for path in pathlib.Path(run).rglob("*")}


# -------------------------------------------------------------------------------------------------- broken on disk

BREAK = {
    "flipped byte": flip,
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": os.remove,
}


@pytest.mark.parametrize("harm", BREAK)
def test_a_broken_newest_checkpoint_falls_back_to_the_one_before(run, states, template, harm):
    BREAK[harm](array_data(run, 3))
    with Checkpoints(run) as saved:
        state, progress = saved.restore(template)
        assert progress.step == 2 and bits(state) == bits(states[1])
        assert failures(run) == [3] and saved.steps() == [2, 1]
        saved.save(states[0], progress_at(3))
    state, progress = restore(run, template)
    assert progress.step == 3 and bits(state) == bits(states[0])


@pytest.mark.parametrize("name", ["meta/metadata", "state/_METADATA", "state/manifest.ocdbt"])
@pytest.mark.parametrize("harm", ["cut in half", "empty", "missing"])
def test_a_broken_description_falls_back_too(run, template, name, harm):
    BREAK[harm](pathlib.Path(run, "checkpoints", "3", name))
    assert restore(run, template)[1].step == 2
    assert failures(run) == [3]


def test_several_broken_checkpoints_are_passed_over(run, states, template):
    flip(array_data(run, 3))
    os.truncate(array_data(run, 2), 10)
    state, progress = restore(run, template)
    assert progress.step == 1 and bits(state) == bits(states[0])
    assert failures(run) == [3, 2]
    assert all(e["reason"] and "\n" not in e["reason"] for e in run_folder.read_rows(run, "events.jsonl"))


def test_checkpoints_of_which_none_can_be_restored_are_kept_and_named(run, make):
    other = step.abstract_state(make.run_config(model__d=32))
    for _ in range(2):
        with pytest.raises(UsageError, match=f"no checkpoint of {run} can be restored; step 3: "):
            restore(run, other)
    with Checkpoints(run) as saved:
        assert saved.steps() == [3, 2, 1]


def test_progress_that_was_changed_on_disk_is_noticed(run, template):
    path = pathlib.Path(run, "checkpoints", "3", "meta", "metadata")
    changed, count = re.subn(r'("offset": ?)3', r"\g<1>4", path.read_text(encoding="utf-8"))
    assert count == 1
    path.write_text(changed, encoding="utf-8")
    assert restore(run, template)[1].step == 2
    assert failures(run) == [3]


NO_MEMORY = {
    "the device has none": jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"),
    "the reader has none": ValueError("RESOURCE_EXHAUSTED: Error reading state/ocdbt.process_0/d/1"),
    "the host has none": MemoryError(),
    "orbax tells where the host had none": Exception("Encountered error while reading array index: ()"),
    "what came of it hides where the host had none": Exception("the array was not read"),
}
NO_MEMORY["orbax tells where the host had none"].__cause__ = MemoryError()
NO_MEMORY["what came of it hides where the host had none"].__context__ = MemoryError()


@pytest.mark.parametrize("reason", NO_MEMORY)
@pytest.mark.parametrize("place", ["reading", "checksum"])
def test_a_lack_of_memory_is_no_damage(run, states, template, monkeypatch, reason, place):
    """The error is raised unchanged, nothing is deleted, no older step is used, and a later restore succeeds."""

    def fail(*args, **options):
        raise NO_MEMORY[reason]

    with Checkpoints(run) as saved, monkeypatch.context() as patch:
        patch.setattr(*((saved._manager, "restore") if place == "reading" else (checkpoint, "_checksum")), fail)
        with pytest.raises(type(NO_MEMORY[reason])) as e:
            saved.restore(template)
        assert e.value is NO_MEMORY[reason] and saved.steps() == [3, 2, 1] and failures(run) == []
    state, progress = restore(run, template)
    assert progress.step == 3 and bits(state) == bits(states[2])


def test_a_write_that_was_killed_is_not_a_checkpoint(run, states, template):
    whole = pathlib.Path(run, "checkpoints", "3")
    whole.rename(whole.with_name("3.orbax-checkpoint-tmp"))
    assert restore(run, template)[1].step == 2
    assert failures(run) == []


# ------------------------------------------------------------------------------------------------------------ hash


def mixed(h: np.ndarray) -> np.ndarray:
    """The last part of MurmurHash3, in Python's integers."""

    def one(h: int) -> int:
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    return np.array([one(int(x)) for x in h], np.uint64)


def test_the_checksum_is_that_of_checkpoints_that_were_written_before():
    """It covers every value with its position, every array with its name, and the progress."""
    draw = np.random.default_rng(0)
    state = {
        "a": jnp.asarray(draw.standard_normal((2, 3, 4)), jnp.float32),
        "b": {"half": jnp.asarray(draw.standard_normal(5), jnp.bfloat16), "count": jnp.asarray(7, jnp.int32)},
        "c": jnp.asarray([3, -1], jnp.int8),
    }
    kinds = {"['a']": np.uint32, "['b']['count']": np.uint32, "['b']['half']": np.uint16, "['c']": np.uint8}
    named = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        values = np.asarray(x).reshape(-1).view(kinds[name]).astype(np.uint64)
        places = np.arange(x.size, dtype=np.uint64)
        first = mixed(values ^ mixed(places + 1))
        named[name] = [int(first.sum()) % 2**32, int(mixed((first + places) % 2**32).sum()) % 2**32]
    for progress in ({"step": 3, "cursor": {"drawn": [2**40]}}, {"step": 4}):
        text = json.dumps([named, progress], sort_keys=True)
        assert checkpoint._checksum(state, progress) == hashlib.sha256(text.encode()).hexdigest()


def test_the_hash_sees_every_number(states):
    hashes = {tree_sha256(state) for state in states}
    leaves, structure = jax.tree.flatten(states[0])
    for i, leaf in enumerate(leaves):
        changed = np.asarray(leaf).copy()
        changed.reshape(-1)[-1] += 1
        hashes.add(tree_sha256(jax.tree.unflatten(structure, [*leaves[:i], changed, *leaves[i + 1 :]])))
    assert len(hashes) == len(states) + len(leaves)


def test_the_hash_depends_on_values_and_the_order_of_paths_alone(states):
    x, y = np.arange(3.0), np.ones((2, 2), np.float32)
    assert tree_sha256({"a": x, "b": {"c": y}}) == tree_sha256({"b": {"c": jnp.asarray(y)}, "a": x})
    assert tree_sha256({"a": x, "b": y}) == tree_sha256({"c": x, "d": y})
    assert tree_sha256({"a": x, "b": y}) != tree_sha256({"a": y, "b": x})
    assert tree_sha256(jax.tree.map(np.asarray, states[1])) == tree_sha256(states[1])
