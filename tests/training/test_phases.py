"""A run's state when it is saved, restored, used, and enters the next phase, compared with states built by hand."""

import contextlib
import dataclasses
import math
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from lowrank_jax import evaluate
from lowrank_jax.config import RunConfig, UsageError
from lowrank_jax.data import stream
from lowrank_jax.export import __main__ as export
from lowrank_jax.export import hf, verify
from lowrank_jax.machine import sharding
from lowrank_jax.machine.agreement import Signals
from lowrank_jax.training import loop, run_folder, start, step, trained
from lowrank_jax.training.checkpoint import Checkpoints, tree_sha256
from lowrank_jax.training.metrics import Meter
from lowrank_jax.training.plan import Plan, Progress, stage_at, stages_of, unchanged
from lowrank_jax.training.start import Run

SWITCH, END = 3, 5  # the steps at which pretraining and SFT end
AT_SWITCH = Progress(step=SWITCH, tokens=96, data_sha256="ab", cursor={})


def random_state(config: RunConfig, at: int, seed: int = 0) -> step.TrainState:
    """Return a state whose weights, average, optimizer and guard differ in every number."""
    rng = np.random.default_rng(seed)
    draw = lambda x: sharding.put(rng.integers(1, 100, x.shape).astype(x.dtype), x.sharding)
    state = jax.tree.map(draw, step.abstract_state(config, sharding.one_device()))
    return state._replace(step=sharding.put(np.int32(at), state.step.sharding))


def bits(tree) -> list:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), x.dtype, x.shape, np.asarray(x).tobytes()) for path, x in leaves]


@pytest.fixture(scope="module")
def config_of(make, tok):
    """A function: the config of a run of 3 steps of text and 2 of chat, with averaged weights and some changes."""

    def config(**changes) -> RunConfig:
        sizes = {"tokens_per_step": 32, "block": 16, "readers": 1}
        settings = {f"{phase}__{key}": value for phase in ("pretrain", "sft") for key, value in sizes.items()}
        settings |= {"pretrain__steps": SWITCH, "sft__steps": END - SWITCH, "optim__ema": 0.9}
        settings |= {"model__vocab": tok.vocab_size, "every__log": 1, "track": ""}
        return make.run_config(**settings | changes)

    return config


@pytest.fixture(scope="module")
def saved_run(config_of, data, tok, tmp_path_factory):
    """(folder, state): a run saved at step 3. Its average has a zero table, so that all tokens are equally likely."""
    config = config_of(pretrain__sources=f"text:{data}/a.txt", pretrain__eval_fraction=0.5)
    folder, state = str(tmp_path_factory.mktemp("saved")), random_state(config, SWITCH)
    table = state.average["embed"]["table"]
    state.average["embed"]["table"] = sharding.put(np.zeros(table.shape, table.dtype), table.sharding)
    run_folder.write_config(folder, config)
    tok.save(run_folder.tokenizer_folder(folder))
    with Checkpoints(folder) as saved:
        saved.save(state, AT_SWITCH)
    return folder, state


@pytest.fixture
def begin(config_of, tok, tmp_path):
    """A function: (a run in an empty folder, its meter)."""
    with contextlib.ExitStack() as stack:

        def run_and_meter(config: RunConfig | None = None, folder: str = str(tmp_path), **parts) -> tuple[Run, Meter]:
            config = config or config_of()
            run_folder.write_config(folder, config)
            saved, plan = stack.enter_context(Checkpoints(folder)), Plan(stages_of(config), sharding.one_device())
            r = dataclasses.replace(Run(config, tok, folder, plan, None, saved, Signals([]), start.Recovery()), **parts)
            return r, stack.enter_context(contextlib.closing(Meter(config, folder, END, SWITCH)))

        yield run_and_meter


def events(folder: str, kind: str) -> list[dict]:
    return [event for event in run_folder.read_rows(folder, "events.jsonl") if event["event"] == kind]


# ------------------------------------------------------------------------------------------------- where a phase begins


@pytest.mark.parametrize("precision, scale", [("fp32", 1), ("fp16", 2**15)])
@pytest.mark.parametrize("ema", [0.9, 0.0])
def test_sft_begins_with_the_model_and_no_memory_of_pretraining(begin, config_of, monkeypatch, ema, precision, scale):
    monkeypatch.setattr(loop.phase, "feed", lambda *args: args)
    config = config_of(optim__ema=ema, precision=precision)
    r, meter = begin(config)
    old, sft = random_state(config, SWITCH), r.plan.stages[-1]
    model = bits(old.average if ema else old.params)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), old)

    new, fed = loop._enter_phase(r, sft, old, AT_SWITCH, meter)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == shapes and new.step == SWITCH
    assert bits(new.params) == model
    assert bits(new.average) == (model if ema else [])
    memory = [
        x for path, x in jax.tree.leaves_with_path(new.opt_state) if "ns_coeffs" not in jax.tree_util.keystr(path)
    ]
    assert len(memory) > len(jax.tree.leaves(new.params)) and not any(np.any(x) for x in memory)
    assert not any(np.any(x) for x in new.guard._replace(scale=np.zeros(1))) and new.guard.scale == scale
    assert all(x.is_deleted() for x in jax.tree.leaves(old))
    assert [(e["step"], e["phase"]) for e in events(r.folder, "phase")] == [(SWITCH, "sft")]
    assert fed[1] is sft and fed[2] == AT_SWITCH


@pytest.mark.parametrize("at_step, begins", [(0, True), (1, False), (SWITCH - 1, False), (SWITCH + 1, False)])
def test_the_first_phase_and_a_resumed_one_keep_their_state(begin, config_of, monkeypatch, at_step, begins):
    monkeypatch.setattr(loop.phase, "feed", lambda *args: args)
    r, meter = begin()
    state = random_state(r.config, at_step)
    new, _ = loop._enter_phase(
        r, stage_at(r.plan.stages, at_step), state, dataclasses.replace(AT_SWITCH, step=at_step), meter
    )
    assert new is state and not any(x.is_deleted() for x in jax.tree.leaves(state))
    assert len(events(r.folder, "phase")) == begins


# ------------------------------------------------------------------------------------------------- what the model is


def test_an_opened_run_is_its_average(saved_run):
    folder, state = saved_run
    run = trained.open_run(folder)
    assert bits(run.params) == bits(state.average) != bits(state.params) and run.progress == AT_SWITCH


def test_a_run_is_evaluated_and_exported_as_its_average(saved_run, monkeypatch, tmp_path):
    folder, state = saved_run
    result = evaluate.command([f"--workdir={folder}", "--tokens=64"])["results"][0]
    np.testing.assert_allclose(result["loss"], math.log(state.params["embed"]["table"].shape[0]), rtol=1e-5)

    def refuse(*args, **options):
        raise verify.NotInstalled("nothing")

    monkeypatch.setattr(hf, "check", refuse)
    export.command([f"--workdir={folder}", "--format=hf", f"--out={tmp_path}/out", "--unfinished"])
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert not weights["model.embed_tokens.weight"].any()
    np.testing.assert_array_equal(weights["model.norm.weight"], state.average["norm"]["gain"])


def test_another_run_begins_with_the_average(saved_run, config_of, monkeypatch, tok):
    folder, state = saved_run
    zeros = lambda config, mesh: jax.tree.map(lambda x: 0 * x, state.params)
    monkeypatch.setattr(step, "init_params", zeros)
    first = start.first_params(config_of(init_from=folder, optim__ema=0.0), sharding.one_device(), lambda: tok)
    assert bits(first) == bits(state.average)


def test_in_training_the_average_is_evaluated_sampled_and_named_at_the_end(begin, monkeypatch):
    r, meter = begin()
    state, used = random_state(r.config, SWITCH), []
    measure = lambda params, stop: used.append(params) or {"loss": 2.5, "bits_per_byte": 1.25, "tokens": 64}
    monkeypatch.setattr(loop.phase, "end", lambda r, stage, params, progress: used.append(params))
    loop._reach(r, ("eval", "pretrain", SWITCH), state, AT_SWITCH, meter, lambda name: measure)
    loop._reach(r, ("end", "pretrain", SWITCH), state, AT_SWITCH, meter, None)
    assert len(used) == 2 and all(params is state.average for params in used)
    (row,) = run_folder.read_rows(r.folder, "metrics.jsonl")
    assert (row["step"], row["split"], row["eval_loss"], row["bits_per_byte"]) == (SWITCH, "pretrain", 2.5, 1.25)

    monkeypatch.setattr(loop, "_loop", lambda r, meter, state, progress: (state, progress))
    finish = loop._train(r, state, AT_SWITCH)
    assert finish["params_sha256"] == tree_sha256(state.average) != tree_sha256(state.params)
    assert events(r.folder, "finish")[0]["params_sha256"] == finish["params_sha256"]


# ------------------------------------------------------------------------------------------------- saved and restored


def test_progress_counts_a_step_with_its_tokens_and_its_own_phase(config_of):
    *_, first, last = stages_of(config_of(pretrain__tokens_per_step=64))
    once = dataclasses.replace(Progress(), precision="bf16").after(first, {"row": 1})
    twice = once.after(last, {"row": 2})
    assert dataclasses.asdict(once) == {
        "step": 1, "phase": "pretrain", "tokens": 64, "data_sha256": "", "cursor": {"row": 1}, "precision": "bf16"
    }  # fmt: skip
    assert twice == dataclasses.replace(once, step=2, phase="sft", tokens=64 + 32, cursor={"row": 2})


@pytest.mark.parametrize("in_memory", [None, 2])
def test_a_run_goes_on_from_memory_or_else_from_its_newest_checkpoint(saved_run, begin, in_memory):
    folder, in_checkpoint = saved_run
    r, _ = begin(run_folder.read_config(folder), folder)
    expected, expected_progress = in_checkpoint, AT_SWITCH
    if in_memory:
        cursor = {"sources": [source.spec for source in r.config.pretrain.sources], "readers": 1}
        expected_progress = dataclasses.replace(AT_SWITCH, step=in_memory, precision="bf16", cursor=cursor)
        expected = random_state(r.config, in_memory, seed=1)
        r.recovery.hold(expected, expected_progress)
    for at_step in range(1, END + 1):
        run_folder.append(folder, "metrics.jsonl", {"step": at_step})
    state, progress = start.restore(r)
    assert bits(state) == bits(expected) and progress == expected_progress and r.recovery.start is None
    assert [x.sharding for x in jax.tree.leaves(state)] == [x.sharding for x in jax.tree.leaves(expected)]
    steps = [row["step"] for row in run_folder.read_rows(folder, "metrics.jsonl")]
    assert steps and max(steps) == progress.step
    *_, event = events(folder, "restore")
    assert (event["step"], event["source"]) == (progress.step, "memory" if in_memory else "checkpoint")


def test_a_new_run_begins_with_its_first_weights(begin, monkeypatch):
    r, _ = begin()
    params = random_state(r.config, 0).params
    first = bits(params)
    monkeypatch.setattr(start, "first_params", lambda *_: params)
    state, progress = start.restore(r)
    assert bits(state.params) == bits(state.average) == first and state.step == 0 and progress == Progress()
    assert [(e["step"], e["source"]) for e in events(r.folder, "restore")] == [(0, "start")]


@pytest.mark.parametrize("changes", [{"pretrain__steps": 2}, {"pretrain__steps": 1, "sft__steps": 1}])
def test_a_plan_that_takes_back_steps_is_refused(saved_run, begin, config_of, changes):
    folder, _ = saved_run
    r, _ = begin(config_of(**changes), folder)
    with pytest.raises(UsageError, match="saved at step 3 in pretrain, .* steps that are done cannot be changed"):
        start.restore(r)


def test_a_save_has_the_state_the_progress_and_every_row_before_it(begin, tmp_path):
    r, meter = begin()
    state, progress = random_state(r.config, 1), dataclasses.replace(AT_SWITCH, step=1, cursor=None)
    usual = {"loss": 3.0, "lr": 0.1, "grad_norm": 2.0, "ok": True, "scale": 1.0, "refused": 0, "in_a_row": 0}
    meter.add(unchanged(r.plan.stages[0]), progress, jax.tree.map(np.asarray, usual))
    assert loop._save(r, meter, state, progress) == progress
    assert [row["step"] for row in run_folder.read_rows(r.folder, "metrics.jsonl")] == [1]
    r.checkpoints.wait()
    restored, saved_progress = r.checkpoints.restore(step.abstract_state(r.config, r.plan.mesh))
    assert bits(restored) == bits(state) and saved_progress == progress
    (event,) = events(r.folder, "save")
    assert (event["step"], event["data_sha256"]) == (1, progress.data_sha256)


def test_libraries_that_disturb_imports_of_threads_are_imported_before_any_compiles(make, monkeypatch, tmp_path):
    names = []
    monkeypatch.setattr(stream, "importlib", types.SimpleNamespace(import_module=names.append))
    for sources, expected in (("text:a.txt", ["grain"]), ("text:a.txt,tfds:lm1b", ["grain", "tensorflow_datasets"])):
        names.clear()
        start.prepare(make.run_config(pretrain__sources=sources), str(tmp_path))
        assert names == expected
