"""What a run tells as it goes: rows of metrics.jsonl, a progress bar on a terminal, a line for each milestone."""

import contextlib
import math
import sys
import time

from tqdm import tqdm

from lowrank_jax import costs, precision, workdir
from lowrank_jax.config import RunConfig, RunFailure
from lowrank_jax.stages import Stage


class Meter:
    """Reads metrics one step late, so that the device never waits for the host; writes them and shows progress."""

    def __init__(self, config: RunConfig, folder: str, total: int, done: int):
        self.config, self.folder = config, folder
        self.bar = tqdm(total=total, initial=done, unit="step", disable=not sys.stdout.isatty(), file=sys.stdout)
        self.step = done
        self._pending, self._step_seconds, self._peak = None, None, precision.peak_flops()
        self.restart_clock()

    def close(self) -> None:
        self.bar.close()

    def say(self, line: str) -> None:
        """A line for the person who watches; stdout stays for the progress bar and --json."""
        with contextlib.suppress(OSError):  # nobody reads any more: no reason to stop training
            tqdm.write(line, file=sys.stderr)

    def restart_clock(self) -> None:
        """Leaves whatever was not training out of tokens/s."""
        self._clock, self._tokens, self._flops = time.monotonic(), 0, 0.0

    def in_steps(self, seconds: float) -> float | None:
        """How many steps could have been taken in this time; None before the first."""
        return round(seconds / self._step_seconds, 2) if self._step_seconds else None

    def add(self, stage: Stage, at: dict, metrics: dict) -> None:
        """Takes the metrics of the step just dispatched, and reads those of the one before."""
        self.flush()
        self.step, self._pending = at["step"], (stage, at, metrics)

    def flush(self) -> None:
        """Reads the pending step's metrics, which waits for it; raises RunFailure if its loss is not finite."""
        if self._pending is None:
            return
        stage, at, metrics = self._pending
        self._pending = None
        loss, lr, grad_norm = (float(metrics[key]) for key in ("loss", "lr", "grad_norm"))
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            workdir.log_event(self.folder, "nan", at["step"], loss=str(loss), grad_norm=str(grad_norm))
            raise RunFailure(
                f"the loss is {loss} and the gradient norm {grad_norm} at step {at['step']}; "
                "the newest checkpoint is from before it: lower the learning rate and run again"
            )
        self._tokens += stage.tokens_per_step
        self._flops += costs.train_flops_per_token(self.config.model, stage.seq_len) * stage.tokens_per_step
        seconds = max(time.monotonic() - self._clock, 1e-9)
        speed = self._tokens / seconds
        self._step_seconds = stage.tokens_per_step / speed
        self.bar.update(1)
        self.bar.set_postfix_str(f"{stage.name} loss {loss:.3f} {speed:,.0f} tokens/s", refresh=False)
        if at["step"] % self.config.every.log == 0 or at["step"] == stage.phase_start + stage.phase_steps:
            row = {"step": at["step"], "phase": stage.phase, "stage": stage.name, "seq_len": stage.seq_len}
            row |= {"batch": stage.batch, "tokens": at["tokens"], "loss": loss, "lr": lr, "grad_norm": grad_norm}
            row |= {"tokens_per_s": round(speed, 1), "mfu": self._flops / seconds / self._peak if self._peak else None}
            workdir.append(self.folder, "metrics.jsonl", row)
            self.restart_clock()

    def log_eval(self, stage: Stage, at_step: int, result: dict) -> None:
        row = {"step": at_step, "phase": stage.phase, "stage": stage.name, "split": stage.phase}
        row |= {"eval_loss": result["loss"], "bits_per_byte": result["bits_per_byte"], "eval_tokens": result["tokens"]}
        workdir.append(self.folder, "metrics.jsonl", row)
        self.say(f"step {at_step}: held-out {stage.phase} {result['bits_per_byte']:.3f} bits per byte")
        self.restart_clock()
