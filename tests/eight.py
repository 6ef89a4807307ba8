"""Eight CPU devices in one process, for test_sharding.py: train on meshes of 2 to 8 of them, and print JSON lines."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
import test_loss
from conftest import run_config
from jax.sharding import AxisType

from lowrank_jax.machine import hlo, sharding
from lowrank_jax.model import costs
from lowrank_jax.training import step
from lowrank_jax.training.checkpoint import Checkpoints, _checksum
from lowrank_jax.training.plan import Progress, make, stages_of, unchanged

STEPS = 3
COMMON = dict(model__layers=2, pretrain__steps=STEPS, pretrain__lr=1e-2, precision="fp32")
# 2, 4 and 8 divide the first model's widths, 5 its vocabulary alone, and 2, 3, 6 and 7 the second one's widths.
# Heads of width 16 use the native attention, heads of width 7 the chunked one.
EVEN = COMMON | dict(model__d=64, model__heads=4, model__rank=4, model__vocab=280, optim__ema=0.9)
EVEN |= dict(pretrain__block=16, pretrain__tokens_per_step=40 * 16, pretrain__microbatch_tokens=2 * 16)
ODD = COMMON | dict(model__d=42, model__heads=6, model__rank=20, model__rank_split="1,1,1,1", model__vocab=257)
ODD |= dict(pretrain__block=8, pretrain__tokens_per_step=84 * 8, pretrain__microbatch_tokens=2 * 8)
# AdamW divides gradients near 0 by themselves, so rounding changes a parameter by about the learning rate.
ADAMW = EVEN | {"optim__name": "adamw", "pretrain__lr": 1e-3}
CASES = [
    (EVEN, [(1, 2, 1), (2, 2, 1), (1, 2, 2), (1, 5, 1), (1, 1, 5), (2, 2, 2), (1, 8, 1), (2, 1, 4)]),
    (ODD, [(1, 1, 3), (2, 1, 3), (1, 3, 2), (1, 7, 1)]),
    (ADAMW, [(2, 2, 2)]),
]
DRAWN = [(1, 1, 1), (1, 1, 5), (2, 2, 2), (1, 3, 2)]  # the others start from the weights of one device


def config_of(sizes: dict, mesh: tuple[int, int, int]):
    return run_config(**sizes, **{f"mesh__{axis}": size for axis, size in zip(sharding.AXES, mesh)})


def mesh_of(config):
    return make(config, jax.devices()[: config.mesh.data * config.mesh.fsdp * config.mesh.tensor]).mesh


def batch(i: int, stage, vocab: int) -> dict:
    draw, shape = np.random.default_rng(i), (stage.batch, stage.seq_len)
    ids = draw.integers(0, vocab, (stage.batch, stage.seq_len + 1)).astype(np.int32)
    segments = np.sort(draw.integers(1, 4, shape), axis=1).astype(np.int32)
    weights = (draw.random(shape) < 0.8).astype(np.float32)
    return {"tokens": ids[:, :-1], "targets": ids[:, 1:], "segments": segments, "weights": weights}


def train(config, first):
    """Train on the config's mesh; return (losses, last state, stage, program)."""
    mesh = mesh_of(config)
    stage = stages_of(config, sharding.row_shards(mesh))[0]
    state, losses = step.first_state(config, first, 0, mesh), []
    compiled = step.lower(config, unchanged(stage), mesh).compile()
    for i in range(STEPS):
        rows = batch(i, stage, config.model.vocab).items()
        state, metrics = compiled(state, {k: sharding.put(x, sharding.of_rows(mesh, stage.batch)) for k, x in rows})
        losses.append(float(metrics["loss"]))
    for x, abstract in zip(jax.tree.leaves(state), jax.tree.leaves(step.abstract_state(config, mesh))):
        assert x.sharding == abstract.sharding  # no layout has drifted
    return np.array(losses), state, stage, compiled


def distance(a, b) -> float:
    both = zip(jax.tree.leaves(a), jax.tree.leaves(b))
    return float(max(np.abs(sharding.fetch(x) - sharding.fetch(y)).max() for x, y in both))


def report(**facts) -> None:
    print(json.dumps(facts), flush=True)


def train_everywhere() -> dict:
    """Trains every case on one device and on its meshes; returns the states that are saved, by mesh."""
    ends = {}
    for sizes, meshes in CASES:
        begun, expected, alone, *_ = train_case(sizes, (1, 1, 1))
        ends.setdefault((1, 1, 1), alone)
        for mesh in meshes:
            start, losses, state, stage, compiled = train_case(sizes, mesh, begun)
            off = {
                "params": distance(state.params, alone.params),
                "average": distance(state.weights, alone.weights),
            }
            off |= {"loss": float(np.abs(losses / expected - 1).max()), "start": distance(start, begun)}
            report(mesh=mesh, learnt=distance(alone.params, begun), **off)
            if mesh == (1, 8, 1):
                ends[mesh] = state
                report_gathered(config_of(sizes, mesh), stage, compiled)
    return ends


def train_case(sizes: dict, mesh: tuple[int, int, int], begun=None) -> tuple:
    """Return the first weights on the host, and the results of `train`."""
    config = config_of(sizes, mesh)
    if mesh in DRAWN:
        first = step.init_params(config, mesh_of(config))
    else:
        first = jax.tree.map(sharding.put, begun, sharding.of_tree(mesh_of(config), begun))
    return jax.tree.map(sharding.fetch, first), *train(config, first)


def report_gathered(config, stage, program) -> None:
    """Report the bytes that the low-rank model's program gathers, and those of its dense twin's."""
    twin = config_of(EVEN | {"model__rank": 0}, (1, 8, 1))
    dense = step.lower(twin, unchanged(stage), mesh_of(twin)).compile()
    for c, compiled in ((config, program), (twin, dense)):
        text = compiled.as_text()
        facts = {"gathered": hlo.collective_bytes(text)["all-gather"], "is_native": "lowrank_attend" in text}
        report(**facts, microbatches=stage.batch // stage.microbatch, weights=costs.parameters(c.model))


def restore_elsewhere(folder: str, ends: dict) -> None:
    progress = Progress(STEPS)
    for mesh, counts in (((1, 8, 1), (4, 1, 7)), ((1, 1, 1), (8,))):
        state, origin = ends[mesh], f"{folder}-{mesh[1]}"
        with Checkpoints(origin) as saved:
            saved.save(state, progress)
        for devices in counts:
            elsewhere = config_of(EVEN | {"pretrain__tokens_per_step": devices * 16}, (1, devices, 1))
            with Checkpoints(origin, read_only=True) as saved:
                restored, _ = saved.restore(step.abstract_state(elsewhere, mesh_of(elsewhere)))
            assert len(jax.tree.leaves(restored.params)[0].sharding.device_set) == devices
            same = len({_checksum(each, dataclasses.asdict(progress)) for each in (restored, state)}) == 1
            report(restored=f"{mesh[1]} on {devices}", apart=distance(restored, state), same=same)


def cut_rows() -> None:
    x = np.arange(16 * 64).reshape(16, 64)
    mesh = mesh_of(config_of(EVEN, (1, 8, 1)))
    with jax.set_mesh(mesh):
        placed = sharding.put(x, sharding.of_rows(mesh, 16))
        cut = jax.jit(lambda x: sharding.microbatches(x, 8))
        moved = hlo.collective_bytes(cut.lower(placed).compile().as_text())
        report(whole=sorted(np.asarray(cut(placed)).ravel().tolist()) == x.ravel().tolist(), moved=moved)


def sum_the_heads_parts() -> None:
    """Give a device at most 6 or 24 tokens at once. Fsdp does not divide a width of 5; data divides 6 rows."""
    for sizes, rows, width in (((2, 2, 2), 8, 6), ((2, 4, 1), 64, 5), ((2, 2, 2), 6, 6), ((1, 8, 1), 64, 8)):
        mesh = jax.make_mesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
        table, *of_tokens = arrays = test_loss.draw(rows, 12, width, 10)
        with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
            parts = test_loss.Parts(6 if rows < 64 else 24, patch)
            placed = [sharding.put(x, sharding.of_rows(mesh, rows)) for x in of_tokens]
            placed = [sharding.put(table, sharding.whole(mesh)), *placed]
            results = jax.jit(test_loss.by_parts, static_argnums=(4, 5))(*placed, 0.2, 0.03)
        report(head=sizes, parts=sorted(set(parts)), errors=test_loss.errors(arrays, results, 0.2, 0.03))


if __name__ == "__main__":
    restore_elsewhere(sys.argv[1], train_everywhere())
    cut_rows()
    sum_the_heads_parts()
