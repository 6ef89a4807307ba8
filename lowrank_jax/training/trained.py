"""A run's newest model: config, tokenizer and parameters, and the Model that Python works with."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from lowrank_jax.config import RunConfig, UsageError, shown
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

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases of the config up to that of these weights."""
        names = tuple(self.config.phases)
        return names[: names.index(self.progress.phase) + 1] if self.progress.phase in names else names


def open_run(
    folder: str, mesh: Mesh | None = None, flag: str = "--workdir", at: int | None = None, phase: str = ""
) -> Trained:
    """Return the newest whole checkpoint of a run, or of its `phase`, or that of step `at`, on one device or `mesh`.

    Raises UsageError where there is none, in a line that lists those that exist.
    """
    with mirror.opened(folder, flag) as home:
        config, tok = identity.open_config(home, flag)
        with Checkpoints(home, read_only=True) as saved:
            wanted = _wanted(saved, f"{flag}={folder}", at, phase)
            restored = saved.restore(step.abstract_state(config, mesh), wanted)
    if restored is None:
        raise UsageError(f"{flag}={folder} has no checkpoint yet; let lowrank_jax.main run until its first save")
    state, progress = restored
    # The attention kernel of its training may not run on this device, or not at other lengths.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="auto"))
    return Trained(config, tok, state.weights, progress)


def _wanted(saved: Checkpoints, where: str, at: int | None, phase: str) -> Callable[[int], bool]:
    """Return which steps are of a phase (if any is named) or `at`; raises UsageError where no checkpoint is."""
    phases = saved.phases() if phase or at is not None else {}
    chosen = {step for step, name in phases.items() if at in (None, step) and phase in ("", name)}
    if phases and not chosen:
        named = [f"step {shown(at)}"] * (at is not None) + [f"phase {shown(phase)}"] * bool(phase)
        listed = ", ".join(f"step {step} ({name or 'unreadable'})" for step, name in phases.items())
        raise UsageError(f"{where} has no checkpoint of {' and '.join(named)}; it has {listed}")
    return lambda step: not phases or step in chosen


class Model(session.Model):
    """The model of the run in `.folder` at `.step`, with what session.Model has and `evaluate`."""

    def __init__(self, run: Trained, folder: str, weights: str = "auto"):
        super().__init__(run.config, run.tokenizer, run.params, weights)
        self.folder, self.step = folder, run.progress.step

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, step {self.step} of {self.folder})"

    def evaluate(self, lengths: int | Sequence[int] = (), data="", tokens: int = 0, weights: str = "") -> dict | list:
        """Return {length, scored, loss, perplexity, bits_per_byte, tokens}, or for several lengths a list of them.

        The figures are those of `python -m lowrank_jax.evaluate`: by default of the held-out part of the first phase,
        at its longest length, and as "chats" those of SFT's. `data` is other sources; chats are scored as SFT scores
        them, on the assistant's tokens alone. With `weights`, "with" says what such weights change.
        """
        are_many = isinstance(lengths, list | tuple)
        results = list(evaluation.of_run(self, lengths if are_many else [lengths], data, tokens, weights))
        return results if are_many and lengths else results[0]
