"""The progress of a run, which a checkpoint keeps with the state."""

from dataclasses import dataclass, replace

from lowrank_jax.training.plan import Stage


@dataclass(frozen=True)
class Progress:
    """Updates and tokens done, the phase of the last update, and the position in the data, as JSON values.

    `cursor` is that of data/stream.py, None before a phase's first batch. `data_sha256` is chained over every global
    batch. `precision` is what the run has fallen back to, or empty for the config's.
    """

    step: int = 0
    phase: str = "pretrain"
    tokens: int = 0
    data_sha256: str = ""
    cursor: dict | None = None
    precision: str = ""

    def after(self, stage: Stage, cursor: dict) -> "Progress":
        """Return the progress after one more update of `stage`, whose batch ended at `cursor`."""
        tokens = self.tokens + stage.tokens_per_step
        return replace(self, step=self.step + 1, phase=stage.phase, tokens=tokens, cursor=cursor)
