"""Progress of a run as it trains: rows of metrics.jsonl, a progress bar or plain lines, a line for each milestone."""

import math
import os
import sys
import time

import jax
from tqdm import tqdm

from lowrank_jax.config import RunConfig, RunFailure
from lowrank_jax.machine import devices, processes
from lowrank_jax.machine.console import say, show
from lowrank_jax.training import outlook, run_folder, tasks, track
from lowrank_jax.training.memory import Fit
from lowrank_jax.training.plan import FittedStage, Progress, Stage, stages_of

TRACE_AFTER = 10  # steps of a process: later ones take their usual time
LINE_SECONDS = 30  # least time between two plain lines: a log file of a day has at most 2,880
MOST_IN_A_ROW = 20  # refused updates: a run does not recover from more by itself


class Meter:
    """Read metrics one step late, so that the device never waits for the host; write them and show progress."""

    def __init__(self, config: RunConfig, folder: str, total: int, done: int, passes: dict | None = None):
        self.config, self.folder, self._passes = config, folder, passes or {}
        self._stages, self._platform = stages_of(config), jax.devices()[0].platform
        is_terminal, is_first = sys.stdout.isatty(), processes.is_first()
        hides = not (is_terminal and is_first)
        self.bar = tqdm(total=total, initial=done, unit="step", disable=hides, file=sys.stdout)
        self._next_line = -math.inf if is_first and not is_terminal else math.inf
        self._timed: list | None = [0.0, 0.0, 0]  # seconds, FLOPs and number of the first steps, until they are enough
        names = config.track if processes.is_first() else ()
        self.trackers = track.open_trackers(names, folder, config.to_dict(), done)
        self.step, self._dispatched = done, 0
        self._pending, self._step_seconds, self._switching = None, None, None
        chip = devices.chip(jax.devices()[0])
        self._peak = chip and chip.peak_flops * jax.device_count()
        self.restart_clock()

    def close(self) -> None:
        if TRACE_AFTER <= self._dispatched < TRACE_AFTER + self.config.profile:
            jax.profiler.stop_trace()
        self.bar.close()
        for tracker in self.trackers:
            tracker.close()

    def restart_clock(self) -> None:
        """Leave out of tokens/s the time since the last row, which was not all training."""
        self._clock = self._step_began = time.monotonic()
        self._tokens, self._flops = 0, 0.0

    def add(self, fitted: FittedStage, progress: Progress, metrics: dict) -> None:
        """Take the metrics of the step just dispatched, and read those of the step before."""
        self.flush()
        self.step, self._pending = progress.step, (fitted, progress, metrics)
        self._dispatched += 1
        if self.config.profile and self._dispatched == TRACE_AFTER:
            jax.profiler.start_trace(os.path.join(self.folder, "profile"))
        if self.config.profile and self._dispatched == TRACE_AFTER + self.config.profile:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            say(f"step {self.step}: traced {self.config.profile} steps into {self.folder}/profile")

    def flush(self) -> None:
        """Wait for the pending step and read its metrics; raises RunFailure after too many refused updates."""
        if self._pending is None:
            return
        (fitted, progress, metrics), self._pending = self._pending, None
        stage, self.step = fitted.stage, progress.step - 1  # a step that failed on the device raises only in float()
        values = {name: float(x) for name, x in metrics.items()}
        self.step = progress.step
        if not values["ok"]:
            self._log_refused(fitted, progress, values)
        flops = outlook.step_flops(self.config, stage)
        self._tokens += stage.tokens_per_step
        self._flops += flops
        self._time_step(flops)
        seconds = max(time.monotonic() - self._clock, 1e-9)
        speed = self._tokens / seconds
        self._step_seconds = stage.tokens_per_step / speed
        self.bar.update(1)
        self.bar.set_postfix_str(f"{stage.name} loss {values['loss']:.3f} {speed:,.0f} tokens/s", refresh=False)
        if progress.step % self.config.every.log == 0 or progress.step == stage.phase_start + stage.phase_steps:
            mfu = self._flops / seconds / self._peak if self._peak else None
            facts = {"seq_len": stage.seq_len, "batch": stage.batch, "tokens": progress.tokens}
            facts |= {name: _finite(values[name]) for name in ("loss", "lr", "grad_norm")}
            facts |= {"tokens_per_s": round(speed, 1), "mfu": mfu, "skipped": int(values["refused"])}
            facts |= {"loss_scale": values["scale"]} if fitted.precision == "fp16" else {}
            self._write(stage, progress.step, facts)
            if time.monotonic() >= self._next_line:
                self._next_line = time.monotonic() + LINE_SECONDS
                left = outlook.seconds_left(self.config, self._stages, self.step, seconds / self._flops)
                where = f"step {self.step:,}/{self.bar.total:,} {stage.name}"
                show(line(where, values["loss"], speed, sum(left.values())), needed=False)
            self.restart_clock()

    def _time_step(self, flops: float) -> None:
        """Time the first steps, except a process's very first, and say what the run will take."""
        now = time.monotonic()
        seconds, self._step_began = now - self._step_began, now
        if self._timed is None or self._dispatched < 2:
            return
        self._timed = [total + value for total, value in zip(self._timed, (seconds, flops, 1))]
        total_seconds, total_flops, count = self._timed
        if count < outlook.MEASURED_STEPS and total_seconds < outlook.MEASURED_SECONDS:
            return
        self._timed, stages = None, self._stages
        if left := outlook.seconds_left(self.config, stages, self.step, total_seconds / total_flops):
            say(f"step {self.step}: {outlook.summary(left, self._passes)}")
            if warning := outlook.time_warning(self.config, stages, left, self._platform):
                say(f"warning: {warning}")

    def _log_refused(self, fitted: FittedStage, progress: Progress, values: dict) -> None:
        facts = {name: _finite(values[name]) for name in ("loss", "grad_norm")}
        facts["reason"] = "not finite" if None in facts.values() else "spike"
        facts["in_a_row"] = int(values["in_a_row"])
        run_folder.log_event(self.folder, "skip", progress.step, **facts)
        say(f"step {progress.step}: skipped an update (loss {values['loss']:.3f}, gradient {values['grad_norm']:.3g})")
        # If fp8 is the cause, the next comparison with bf16 notices it.
        most = MOST_IN_A_ROW + (self.config.every.fp8_check if fitted.precision == "fp8" else 0)
        if values["in_a_row"] >= most:
            raise RunFailure(
                f"{most} updates in a row were refused, up to step {progress.step} (loss {values['loss']}, gradient "
                f"norm {values['grad_norm']}), and the weights did not change; lower the learning rate, or raise "
                "config.optim.skip_sigma, and run again"
            )

    def begin_switch(self) -> None:
        """Start the clock of a switch: the last step of one program is done."""
        self.flush()
        self._switching = time.monotonic(), self._step_seconds

    def end_switch(self, fit: Fit) -> None:
        """Log the switch; its stall is the time of the new program's first step beyond that of an ordinary step."""
        self.flush()
        began, ordinary = self._switching
        seconds = time.monotonic() - began
        stall = max(seconds - ordinary, 0.0) if ordinary else seconds
        s, settings, switch_step = fit.stage, fit.fitted.settings, self.step - 1
        facts = {"stage": s.name, "seq_len": s.seq_len} | settings | {"compile_seconds": round(fit.seconds, 3)}
        facts |= {"stall_seconds": round(stall, 3), "stall_steps": round(stall / ordinary, 2) if ordinary else None}
        run_folder.log_event(self.folder, "stage", switch_step, **facts)
        rows = settings["microbatch"]
        say(f"step {switch_step}: {s.name}, {s.batch} x {s.seq_len} tokens per step, {rows} rows at once")

    def log_eval(self, stage: Stage, at_step: int, result: dict) -> None:
        """Log held-out text of the stage's phase; after a later phase, say what that has cost it."""
        facts = {"split": stage.phase, "eval_loss": result["loss"], "bits_per_byte": result["bits_per_byte"]}
        self._write(stage, at_step, facts | {"eval_tokens": result["tokens"]})
        ended, now, cost = stage.phase_start + stage.phase_steps, result["bits_per_byte"], ""
        if at_step > ended and (before := run_folder.bits_after(self.folder, stage.phase, ended)) is not None:
            cost = f", {now - before:+.3f} by sft ({before:.3f} before it)"
        say(f"step {at_step}: held-out {stage.phase} {now:.3f} bits per byte{cost}")

    def log_tasks(self, stage: Stage, at_step: int, results: dict[str, dict] | str) -> None:
        """Log what tasks have come to, or why they failed."""
        failed = isinstance(results, str)
        facts = {"failed": results} if failed else {"results": results}
        run_folder.log_event(self.folder, "tasks", at_step, phase=stage.phase, **facts)
        say(f"step {at_step}: {f'warning: the tasks failed ({results})' if failed else tasks.describe(results)}")
        flat = {} if failed else run_folder.flatten({"tasks": results})
        for tracker in self.trackers:
            tracker.log(at_step, {key.replace(".", "/"): x for key, x in flat.items()})

    def _write(self, stage: Stage, step: int, facts: dict) -> None:
        row = {"step": step, "phase": stage.phase, "stage": stage.name} | facts
        run_folder.append(self.folder, "metrics.jsonl", row)
        for tracker in self.trackers:
            tracker.log(step, track.values(row))


def line(where: str, loss: float, speed: float, seconds_left: float) -> str:
    """Return a line of progress for a log file: where the run is, loss, tokens per second, and the time to its end."""
    return f"{where} loss {loss:.3f} {speed:,.0f} tokens/s ETA {outlook.duration(seconds_left)}"


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None  # JSON has no NaN
