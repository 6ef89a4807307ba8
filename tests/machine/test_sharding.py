"""A mesh of devices trains as one device does: the layout of every array, and results on 2 to 8 devices."""

import json
import math
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import runs
from conftest import run_config
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

from lowrank_jax.config import UsageError
from lowrank_jax.machine import sharding
from lowrank_jax.machine.sharding import TENSOR
from lowrank_jax.training import step
from lowrank_jax.training.plan import stages_of

ROOT = pathlib.Path(__file__).parents[2]
ODD = {"model__d": 30, "model__heads": 6, "model__rank": 20, "model__vocab": 257, "model__rank_split": "1,1,1,1"}
MODELS = [
    {},
    {"optim__name": "adamw", "optim__ema": 0.9},
    {"model__mlp_rank": 4, "model__embed_rank": 8, "model__shared_kv": True},
    {"model__tied": False, "model__embed_rank": 8, "optim__ema": 0.9},
    {"model__rank": 0},
    ODD,
]


def abstract_mesh(data=2, fsdp=2, tensor=2):
    return AbstractMesh((data, fsdp, tensor), sharding.AXES)


def layouts(config, mesh) -> dict:
    shapes = jax.eval_shape(lambda: step._start(config, step._init(config), 0))
    laid = sharding.of_tree(mesh, shapes)
    leaves = zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(laid))
    return {sharding.path_name(path): (x.shape, at) for (path, x), at in leaves}


@pytest.mark.parametrize("changes", MODELS)
def test_every_array_of_a_state_has_a_layout_that_divides_it(changes):
    for shape, at in layouts(run_config(**changes), abstract_mesh()).values():
        at.shard_shape(shape)  # raises where it does not


@pytest.mark.parametrize("changes", MODELS)
def test_moments_and_averages_have_their_parameters_layout(changes):
    laid = layouts(run_config(**changes), abstract_mesh())
    params = {name.removeprefix("params/"): at for name, at in laid.items() if name.startswith("params/")}
    followers = [(name, at, p) for name, at in laid.items() for p in params if name.endswith(f"/{p}")]
    assert len(followers) > len(params)
    for name, (shape, at), p in followers:
        assert (shape, at) == params[p], name


@pytest.mark.parametrize("shared_kv", [False, True])
def test_the_rank_of_the_blocks_factors_is_never_split_and_the_other_dimension_is(shared_kv):
    sizes = {"model__d": 64, "model__heads": 4, "model__rank": 8, "model__mlp_rank": 16}
    laid = layouts(run_config(**sizes, model__shared_kv=shared_kv), abstract_mesh(1, 4, 2))
    factors = {name: x for name, x in laid.items() if re.match("params/blocks/.*/(down|up)$", name)}
    assert len(factors) == (7 if shared_kv else 8) + 6
    for name, (shape, at) in factors.items():  # [layer, in, rank] and [layer, rank, out]
        part, rank = at.shard_shape(shape), 2 if name.endswith("/down") else 1
        assert part[rank] == shape[rank] and math.prod(part) < math.prod(shape), name


def test_a_path_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="no rule in sharding.RULES for blocks/attention/q/bias"):
        sharding.of_tree(abstract_mesh(), {"blocks": {"attention": {"q": {"bias": np.zeros(3)}}}})


def test_without_a_mesh_nothing_is_constrained():
    x = np.zeros((4, 6))
    assert sharding.constrain(x, sharding.ROWS, TENSOR) is x
    assert tuple(sharding.spec(x.shape, sharding.ROWS, TENSOR)) == (None, None)


COUNTS = [1, 2, 3, 4, 7, 8, 12, 24]


@settings(max_examples=500)
@given(
    devices=st.sampled_from(COUNTS),
    rows=st.sampled_from(COUNTS),
    sft_rows=st.sampled_from([0, *COUNTS]),
    heads=st.sampled_from([1, 6, 8, 12]),
    wanted=st.tuples(*[st.sampled_from([0, 0, 1, 2, 3, 4])] * 3),
)
def test_a_mesh_is_chosen_wherever_one_satisfies_the_config_and_splits_all_rows_evenly(
    devices, rows, sft_rows, heads, wanted
):
    sizes = {"model__d": 768, "model__heads": heads, "sft__steps": int(sft_rows > 0)}
    sizes |= {"pretrain__block": 8, "pretrain__tokens_per_step": 16 * rows, "pretrain__auto_grow": True}
    sizes |= {"pretrain__grow_plan": "8,16", "pretrain__grow_every_steps": 2, "pretrain__steps": 4}
    sizes |= {"sft__block": 8, "sft__tokens_per_step": 8 * max(sft_rows, 1)}
    config = run_config(**sizes, **{f"mesh__{axis}": size for axis, size in zip(sharding.AXES, wanted)})
    batches = [stage.batch for stage in stages_of(config)]
    assert batches == [2 * rows, rows, *([sft_rows] if sft_rows else [])]

    def is_good(data, fsdp, tensor):
        as_wanted = all(number in (0, size) for number, size in zip(wanted, (data, fsdp, tensor)))
        even = all(batch % (data * fsdp) == 0 for batch in batches) and (wanted[2] or heads % tensor == 0)
        return data * fsdp * tensor == devices and as_wanted and even

    try:
        assert is_good(*sharding.shape(config, stages_of(config), devices))
    except UsageError as e:
        assert "\n" not in str(e) and "config.mesh" in str(e)
        divisors = [n for n in range(1, devices + 1) if devices % n == 0]
        assert not any(is_good(d, f, devices // (d * f)) for d in divisors for f in divisors if devices % (d * f) == 0)


@pytest.mark.parametrize(
    "devices,changes,expected",
    [
        (1, {}, (1, 1, 1)),
        (8, {}, (1, 8, 1)),
        (16, {}, (2, 8, 1)),  # 1024 / 128
        (8, {"pretrain__tokens_per_step": 4 * 64}, (1, 4, 2)),
        (8, {"mesh__data": 2}, (2, 4, 1)),
        (8, {"mesh__tensor": 4}, (1, 2, 4)),
        (8, {"model__d": 64}, (8, 1, 1)),
    ],
)
def test_axes_of_0_are_chosen(devices, changes, expected):
    sizes = {"model__d": 1024, "model__heads": 8, "pretrain__block": 64, "pretrain__tokens_per_step": 64 * 64}
    config = run_config(**sizes | changes)
    assert sharding.shape(config, stages_of(config), devices) == expected


@pytest.mark.parametrize(
    "devices,changes,names",
    [
        (7, {}, ["7 devices", "8 rows", "pretrain-64", "tokens_per_step"]),
        (8, {"mesh__data": 3}, ["data=3", "there are 8"]),
        (8, {"mesh__data": 16}, ["data=16", "there are 8"]),
        (16, {"mesh__fsdp": 16}, ["8 rows", "fsdp=16"]),
    ],
)
def test_a_mesh_that_does_not_divide_the_rows_or_devices_is_an_error_in_one_line(devices, changes, names):
    config = run_config(model__heads=8, pretrain__block=64, pretrain__tokens_per_step=8 * 64, **changes)
    with pytest.raises(UsageError) as e:
        sharding.shape(config, stages_of(config), devices)
    assert all(name in str(e.value) for name in names), e.value


@pytest.mark.parametrize("devices", [7, 11, 14])
@pytest.mark.parametrize("growth", ["64", "64,96", "64,80,96"])
def test_the_advised_tokens_per_step_and_axes_of_0_are_accepted(devices, growth):
    unit = math.lcm(*map(int, growth.split(",")))
    grow = {"pretrain__auto_grow": True, "pretrain__grow_plan": growth, "pretrain__block": 64}
    config = lambda **changes: run_config(model__heads=1, **grow | {"pretrain__tokens_per_step": 2 * unit} | changes)
    with pytest.raises(UsageError) as e:
        sharding.shape(config(), stages_of(config()), devices)
    key, multiple = re.search(r"make config\.(\S+) a multiple of (\d+)", str(e.value)).groups()
    changes = {key.replace(".", "__"): 3 * int(multiple)}
    assert math.prod(sharding.shape(config(**changes), stages_of(config(**changes)), devices)) == devices
    with pytest.raises(UsageError, match="; 0 takes what is left"):
        mesh = {"mesh__data": devices - 1}
        sharding.shape(config(**changes | mesh), stages_of(config(**changes | mesh)), devices)


def device(process: int):
    return types.SimpleNamespace(process_index=process)


@pytest.mark.parametrize(
    "processes,shape,shares",
    [
        ([0, 0, 1, 1], (4, 1, 1), [(0, 2), (1, 2)]),
        ([0, 0, 1, 1], (1, 2, 2), [(0, 2), (1, 2)]),
        ([0, 1, 0, 1], (2, 1, 2), [(0, 1), (0, 1)]),  # a tensor group over both: the same rows
        ([1, 1, 0, 0], (1, 4, 1), [(1, 2), (0, 2)]),
        ([0, 1, 2, 3], (2, 1, 2), [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_each_process_reads_the_rows_that_its_devices_need(processes, shape, shares, monkeypatch):
    devices = np.array([device(process) for process in processes]).reshape(shape)
    mesh = types.SimpleNamespace(devices=devices, shape=dict(zip(sharding.AXES, shape)))
    for process, share in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert sharding.my_share(mesh) == share


def test_processes_that_need_overlapping_parts_of_the_rows_are_refused():
    devices = np.array([device(p) for p in (0, 1, 1, 1)]).reshape(2, 1, 2)
    with pytest.raises(UsageError, match="across processes"):
        sharding.my_share(types.SimpleNamespace(devices=devices, shape={"data": 2, "fsdp": 1, "tensor": 2}))


def test_microbatches_never_grow_past_what_a_device_may_hold():
    config = run_config(pretrain__block=64, pretrain__tokens_per_step=64 * 64, pretrain__microbatch_tokens=128)
    for shards in (1, 2, 8, 64):
        stage = stages_of(config, shards)[0]
        assert stage.microbatch % shards == 0 and 64 % stage.microbatch == 0
        assert stage.microbatch // shards == min(2, 64 // shards)


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """The results of tests/eight.py. Without XLA's fusion emitters its programs compile in a third of the time."""
    env = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{ROOT}:{ROOT}/tests/model",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {runs.ENVIRONMENT['XLA_FLAGS']}",
    }
    command = [sys.executable, ROOT / "tests" / "eight.py", tmp_path_factory.mktemp("eight") / "run"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Involuntary full rematerialization" not in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_mesh_trains_as_one_device(eight):
    trained = [row for row in eight if "mesh" in row]
    assert len(trained) == 13 and {math.prod(row["mesh"]) for row in trained} == {2, 3, 4, 5, 6, 7, 8}
    for row in trained:
        assert row["start"] == 0 and row["loss"] <= 1e-5, row
        assert row["params"] <= 1e-4 and row["average"] <= 1e-4, row
        assert row["learnt"] >= 40 * row["params"], row  # or else these bounds would hold without a mesh's gradients


def test_the_weights_are_gathered_and_for_attention_less_than_in_the_dense_twin(eight):
    ours, dense = (row for row in eight if "gathered" in row)
    for row in (ours, dense):  # in fp32, the blocks' forward and backward for each microbatch, the embedding's once
        times, weights = 2 * row["microbatches"], row["weights"]
        assert 0 < row["gathered"] <= 4 * (times * (weights["attention"] + weights["mlp"]) + weights["embedding"]), row
        assert row["is_native"]  # what the meshes of 2, 4, 5 and 8 attend with
    assert ours["weights"]["mlp"] == dense["weights"]["mlp"] and ours["gathered"] < dense["gathered"]


def test_a_checkpoint_goes_on_any_mesh_bit_for_bit(eight):
    rows = [row for row in eight if "restored" in row]
    assert [row["restored"] for row in rows] == ["8 on 4", "8 on 1", "8 on 7", "1 on 8"]
    assert all(row["apart"] == 0 and row["same"] for row in rows)


def test_microbatches_are_of_each_devices_own_rows(eight):
    (row,) = (row for row in eight if "moved" in row)
    assert row["whole"] and row["moved"] == {}


def test_the_heads_loss_in_parts_is_that_of_all_logits_and_each_part_of_a_devices_own_rows(eight):
    rows = [row for row in eight if "head" in row]
    # [rows of a device, tokens of each, vocabulary], with at most 6 tokens (24 where a device has 8 rows)
    assert [row["parts"] for row in rows] == [[[2, 3, 10]], [[8, 3, 10]], [[3, 2, 10]], [[8, 3, 10]]]
    assert all(max(row["errors"]) < 1e-5 for row in rows), rows
