"""Evaluation is compiled before it is needed, and JAX finds that."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import monitoring

from configs import default
from lowrank_jax import evaluate, sharding, step
from lowrank_jax.config import RunConfig

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled():
    """The events of compilers that have run since the test began."""
    events = []
    note = lambda name, seconds, **_: events.append(name) if name == COMPILED else None
    monitoring.register_event_duration_secs_listener(note)
    yield events
    monitoring.unregister_event_duration_listener(note)


def test_what_was_compiled_for_a_shape_is_what_evaluates_it(compiled):
    values = default.get_config()
    values.model.update(d=32, layers=2, heads=2, rank=4, scan=False)
    config = RunConfig.from_dict(values.to_dict()).with_vocab(48)
    config = dataclasses.replace(config, precision="fp32")
    mesh = sharding.one_device()
    params = step.init_params(config, mesh)

    def nats(rows: int, length: int) -> float:
        tokens = np.arange(rows * length).reshape(rows, length).astype(np.int32) % 48
        batch = {"tokens": tokens, "targets": tokens, "segments": np.ones_like(tokens)}
        batch["weights"] = np.ones(tokens.shape, np.float32)
        return evaluate.evaluate(config, params, [batch], np.ones(48))["loss"]

    nats(2, 24)  # what else it needs is there now
    jax.block_until_ready(params)
    evaluate.compile_for(config, mesh, 4, 24)
    compiled.clear()
    assert np.isfinite(nats(4, 24))
    assert not compiled
    nats(3, 24)
    assert compiled
