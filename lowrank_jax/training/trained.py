"""A run's newest model: config, tokenizer and parameters."""

import dataclasses
from typing import NamedTuple

from jax.sharding import Mesh

from lowrank_jax.config import RunConfig, UsageError
from lowrank_jax.data.tokenizer import Tokenizer
from lowrank_jax.training import identity, step
from lowrank_jax.training.checkpoint import Checkpoints
from lowrank_jax.training.plan import Progress


class Trained(NamedTuple):
    config: RunConfig
    tokenizer: Tokenizer
    params: dict
    progress: Progress


def open_run(folder: str, mesh: Mesh | None = None, flag: str = "--workdir") -> Trained:
    """Return the newest whole checkpoint of a run, on one device or `mesh`; raises UsageError where there is none."""
    config, tok = identity.open_config(folder, flag)
    with Checkpoints(folder, read_only=True) as saved:
        restored = saved.restore(step.abstract_state(config, mesh))
    if restored is None:
        raise UsageError(f"{flag}={folder} has no checkpoint yet; let lowrank_jax.main run until its first save")
    state, progress = restored
    # The attention kernel of its training may not run on this device, or not at other lengths.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="auto"))
    return Trained(config, tok, state.weights, progress)
