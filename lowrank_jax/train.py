"""The training loop: stages, steps, evaluation, checkpoints, and how a run ends or goes on."""

import contextlib
import math
import shutil
import signal
import sys
import time

import numpy as np
from tqdm import tqdm

from lowrank_jax import costs, evaluate, faults, precision, report, stages, step, workdir
from lowrank_jax.checkpoint import Checkpoints, tree_sha256
from lowrank_jax.cli import RunFailure
from lowrank_jax.config import RunConfig, UsageError
from lowrank_jax.data import stream, tokenizer
from lowrank_jax.data.tokenizer import Tokenizer
from lowrank_jax.stages import Stage

START = {"step": 0, "phase": "pretrain", "tokens": 0, "data_sha256": "", "cursor": None}


def run(config: RunConfig, folder: str) -> dict:
    """Trains every phase of `config` in `folder`, or goes on from its newest checkpoint; returns the finish event.

    Raises UsageError for a config or data that cannot work, RunFailure for a run that must stop (a loss that is not
    finite), and SystemExit(128 + signal), with its state saved, after SIGTERM or SIGINT.
    """
    faults.check()
    with _signals() as received, workdir.lock(folder):
        config, tok, old = _prepare(config, folder)
        with Checkpoints(folder, config.every.keep) as saved:
            state, at = _restore(config, folder, saved)
            workdir.write_config(folder, config)  # only now is it certain that it can go on here
            changed = [f"{key}: {was} -> {now}" for key, was, now in workdir.differences(old or config, config)]
            workdir.log_event(folder, "start", at["step"], resumes=old is not None, changed=changed)
            finish = _train(config, tok, folder, saved, received, state, at)
        report.write(folder)
        return finish


def _prepare(config: RunConfig, folder: str) -> tuple[RunConfig, Tokenizer, RunConfig | None]:
    """The resolved config, the tokenizer (learnt for a new run) and the config that the folder's run had, if any."""
    phases = [config.pretrain] + ([config.sft] if config.sft.steps else [])
    home = workdir.tokenizer_folder(folder)
    if workdir.holds_run(folder):
        old, tok = workdir.read_config(folder), tokenizer.load(home)
        config = config.with_vocab(tok.vocab_size)
        workdir.check_same_run(folder, old, config)
    else:
        old, t = None, config.tokenizer
        tok = tokenizer.load(t.path) if t.path else tokenizer.train(stream.texts(phases, t.train_bytes), t.vocab_size)
        config = config.with_vocab(tok.vocab_size)
    for p in phases:
        stream.check(p, tok, chats=p is config.sft)
    if old is None:
        shutil.rmtree(home, ignore_errors=True)
        tok.save(home)  # before config.json: a folder with a config always has its tokenizer
    return config, tok, old


def _train(config: RunConfig, tok: Tokenizer, folder: str, saved: Checkpoints, received: list[int], state, at) -> dict:
    """The loop itself, from the state and progress that `_restore` gave; returns the facts of the finish event."""
    plan = stages.plan(config)
    meter = _Meter(config, folder, total=plan[-1].end, done=at["step"])
    stage = documents = compiled = held_out = None
    last_save = time.monotonic()

    def save() -> None:
        meter.flush()  # every loss up to here is known to be finite
        saved.save(at["step"], state, at)
        workdir.log_event(folder, "save", at["step"], data_sha256=at["data_sha256"])

    with contextlib.closing(meter.bar):
        while at["step"] < plan[-1].end:
            now = stages.stage_at(plan, at["step"])
            phase, chats = getattr(config, now.phase), now.phase == "sft"
            if stage is None or now.phase != stage.phase:
                if at["step"] == now.phase_start:  # a new phase: new data, and an optimizer without memory of the old
                    at |= {"cursor": None}
                    state = state._replace(opt_state=step.fresh_optimizer(config, state.params))
                    workdir.log_event(folder, "phase", at["step"], phase=now.phase)
                documents = stream.open_phase(phase, tok, config.seed, chats, held_out=False, cursor=at["cursor"])
                longest = stages.lengths(phase)[-1]  # one length for all of a phase: its numbers can be compared
                held_out = evaluate.held_out(phase, tok, config.seed, chats, longest)
                if not held_out:
                    meter.say(f"the held-out part of {now.phase} has no row of {longest} tokens: no evaluation")
                elif at["step"] == now.phase_start:
                    meter.log_eval(
                        now, at["step"], evaluate.evaluate(config, state.params, held_out, tok.byte_lengths())
                    )
            if now != stage:
                stage, compiled = now, _compile(config, now, state, at["step"], folder, meter)
            if received:
                save()
                workdir.log_event(folder, "preempt", at["step"], signal=received[0])
                meter.say(
                    f"{signal.Signals(received[0]).name}: saved at step {at['step']}; run the command again to go on"
                )
                saved.wait()
                sys.exit(128 + received[0])

            faults.strike("step", at["step"] + 1)
            batch = documents.next(stage.batch, stage.seq_len)
            at = {
                "step": at["step"] + 1,
                "phase": stage.phase,
                "tokens": at["tokens"] + stage.tokens_per_step,
                "data_sha256": stream.chain_sha256(at["data_sha256"], batch),
                "cursor": documents.cursor(),
            }
            if faults.due("nan", "step", at["step"]):
                batch["weights"] = batch["weights"] * np.float32("nan")
            state, metrics = compiled(state, step.to_device(batch, stage))
            meter.add(stage, at, metrics)

            ends_phase = at["step"] == stage.phase_start + stage.phase_steps
            if held_out and (ends_phase or at["step"] % config.every.eval == 0):
                meter.flush()
                meter.log_eval(stage, at["step"], evaluate.evaluate(config, state.params, held_out, tok.byte_lengths()))
            minutes = (time.monotonic() - last_save) / 60
            timely = config.every.save_minutes and minutes >= config.every.save_minutes
            if ends_phase or timely or at["step"] % config.every.save == 0:
                save()
                meter.restart_clock()
                last_save = time.monotonic()

    saved.wait()
    hashes = {"data_sha256": at["data_sha256"], "params_sha256": tree_sha256(state.params)}
    workdir.log_event(folder, "finish", at["step"], tokens=at["tokens"], **hashes)
    return {"workdir": folder, "step": at["step"], "tokens": at["tokens"], **hashes}


def _restore(config: RunConfig, folder: str, saved: Checkpoints) -> tuple[step.TrainState, dict]:
    """The newest checkpoint as (state, progress), or a new state; the folder's metrics are cut to match."""
    plan = stages.plan(config)
    restored = saved.restore(step.abstract_state(config), delete_broken=True)
    state, meta = restored or (step.init_state(config), START)
    at = {key: meta[key] for key in START}
    if at["step"] > plan[-1].end or _phase_done(plan, at["step"]) != at["phase"]:
        here = _phase_done(plan, at["step"]) if at["step"] <= plan[-1].end else "already ended"
        raise UsageError(
            f"{folder} was saved at step {at['step']} in {at['phase']}, where this config has {here}; "
            "steps that are done cannot be changed"
        )
    next_stage = stages.stage_at(plan, at["step"])
    if at["step"] > next_stage.phase_start:
        stream.check_cursor(at["cursor"], [s.spec for s in getattr(config, next_stage.phase).sources])
    workdir.rewind_metrics(folder, at["step"], next_stage.phase if at["step"] == next_stage.phase_start else None)
    if restored:
        workdir.log_event(folder, "restore", at["step"], data_sha256=at["data_sha256"])
    return state, at


def _phase_done(plan: tuple[Stage, ...], done: int) -> str:
    """The phase of the last of `done` updates (of the first one, when there are none)."""
    return stages.stage_at(plan, max(done - 1, 0)).phase


def _compile(config: RunConfig, stage: Stage, state, at_step: int, folder: str, meter: "_Meter"):
    meter.flush()
    compiled, seconds = step.compile_step(config, stage, state)
    stall = {"stall_seconds": round(seconds, 3), "stall_steps": meter.in_steps(seconds)}
    workdir.log_event(folder, "stage", at_step, stage=stage.name, compile_seconds=round(seconds, 3), **stall)
    meter.say(
        f"step {at_step}: {stage.name}, {stage.batch} x {stage.seq_len} tokens a step (compiled in {seconds:.1f} s)"
    )
    meter.restart_clock()
    return compiled


class _Meter:
    """Reads metrics one step late, so that the device never waits for the host; writes them and shows progress."""

    def __init__(self, config: RunConfig, folder: str, total: int, done: int):
        self.config, self.folder = config, folder
        self.bar = tqdm(total=total, initial=done, unit="step", disable=not sys.stdout.isatty(), file=sys.stdout)
        self._pending, self._step_seconds, self._peak = None, None, precision.peak_flops()
        self.restart_clock()

    def say(self, line: str) -> None:
        """A line for the person who watches; stdout stays for the progress bar and --json."""
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
        self._pending = (stage, at, metrics)

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


@contextlib.contextmanager
def _signals():
    """Collects SIGTERM and SIGINT, to be acted on between two steps; a second one ends the process at once."""
    received: list[int] = []

    def note(number, _):
        received.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
