"""A run's newest model: config, tokenizer and parameters, and the Model that Python works with."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from lowrank_jax.config import RunConfig, UsageError
from lowrank_jax.data.tokenizer import Tokenizer
from lowrank_jax.inference import session
from lowrank_jax.training import evaluation, identity, mirror, step
from lowrank_jax.training.checkpoint import Checkpoints
from lowrank_jax.training.plan import Progress


class Trained(NamedTuple):
    config: RunConfig
    tokenizer: Tokenizer
    params: dict
    progress: Progress


def open_run(folder: str, mesh: Mesh | None = None, flag: str = "--workdir") -> Trained:
    """Return the newest whole checkpoint of a run, on one device or `mesh`; raises UsageError where there is none."""
    with mirror.opened(folder, flag) as home:
        config, tok = identity.open_config(home, flag)
        with Checkpoints(home, read_only=True) as saved:
            restored = saved.restore(step.abstract_state(config, mesh))
    if restored is None:
        raise UsageError(f"{flag}={folder} has no checkpoint yet; let lowrank_jax.main run until its first save")
    state, progress = restored
    # The attention kernel of its training may not run on this device, or not at other lengths.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="auto"))
    return Trained(config, tok, state.weights, progress)


class Model(session.Model):
    """The model of the run in `.folder` at `.step`, with what session.Model has and `evaluate`."""

    def __init__(self, run: Trained, folder: str, weights: str = "auto"):
        super().__init__(run.config, run.tokenizer, run.params, weights)
        self.folder, self.step = folder, run.progress.step

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, step {self.step} of {self.folder})"

    def evaluate(self, lengths: int | Sequence[int] = (), data="", tokens: int = 0, weights: str = "") -> dict | list:
        """Return {length, loss, perplexity, bits_per_byte, tokens}, or for several lengths a list of them.

        The figures are those of `python -m lowrank_jax.evaluate`: by default of the held-out part of the first phase,
        at its longest length. `data` is other sources; with `weights`, "with" says what such weights change.
        """
        are_many = isinstance(lengths, list | tuple)
        results = list(evaluation.of_run(self, lengths if are_many else [lengths], data, tokens, weights))
        return results if are_many and lengths else results[0]
