"""The training loop: stages, steps, evaluation, checkpoints, and how a run ends or goes on."""

import contextlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np

from lowrank_jax import evaluate, faults, generate, report, stages, step, workdir
from lowrank_jax.checkpoint import Checkpoints, tree_sha256
from lowrank_jax.config import RunConfig, UsageError
from lowrank_jax.data import packing, stream, tokenizer
from lowrank_jax.data.tokenizer import Tokenizer
from lowrank_jax.meter import Meter
from lowrank_jax.stages import Stage
from lowrank_jax.trained import Trained

SAMPLE_TOKENS = 120
SHOWN_TOKENS = 300  # of the first row of SFT
NOTES = 5  # skips and retries that are told on the terminal; the ledger has them all
START = {"step": 0, "phase": "pretrain", "tokens": 0, "data_sha256": "", "cursor": None}


def run(config: RunConfig, folder: str, received: Sequence[int] = ()) -> dict:
    """Trains every phase of `config` in `folder`, or goes on from its newest checkpoint; returns the finish event.

    Once a signal's number is in `received` (see `signals`), the state is saved and SystemExit(128 + number) raised.
    Raises UsageError for a config or data that cannot work, and RunFailure for a run that must stop (a loss that is not
    finite, a disk that is full).
    """
    faults.check()
    with workdir.lock(folder):
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
        if os.path.isdir(os.path.join(folder, "checkpoints")):
            raise UsageError(
                f"{folder} has checkpoints but no config.json to tell what they are of; use another --workdir"
            )
        old, t = None, config.tokenizer
        tok = tokenizer.load(t.path) if t.path else tokenizer.train(stream.texts(phases, t.train_bytes), t.vocab_size)
        config = config.with_vocab(tok.vocab_size)
    for p in phases:  # what is skipped is told when it is met in training
        stream.check(p, tok, chats=p is config.sft)
    if old is None:
        tok.save(home)  # before config.json: a folder with a config always has its tokenizer
    return config, tok, old


def _train(config: RunConfig, tok: Tokenizer, folder: str, saved: Checkpoints, received, state, at) -> dict:
    """The loop itself, from the state and progress that `_restore` gave; returns the facts of the finish event."""
    plan, phase, stage, last_save = stages.plan(config), None, None, time.monotonic()
    meter = Meter(config, folder, total=plan[-1].end, done=at["step"])

    def save() -> None:
        meter.flush()  # every loss up to here is known to be finite
        if saved.save(at["step"], state, at):
            workdir.log_event(folder, "save", at["step"], data_sha256=at["data_sha256"])

    with contextlib.closing(meter), contextlib.ExitStack() as feeds:
        while at["step"] < plan[-1].end:
            now = stages.stage_at(plan, at["step"])
            if received:  # looked at after everything that takes long
                save()
                _leave(folder, saved, meter, at["step"], received[0])
            if now.phase != phase:
                state, batches, evaluate_now = _enter_phase(config, now, tok, folder, meter, state, at)
                feeds.enter_context(contextlib.closing(batches))
                phase = now.phase
                continue
            if now != stage:
                stage, compiled = now, _compile(config, now, state, at["step"], folder, meter)
                continue

            faults.strike("step", at["step"] + 1)
            try:
                batch, cursor = next(batches)
            except (UsageError, OSError):  # data that cannot be used or read: what was learnt so far is kept
                save()
                raise
            at = {
                "step": at["step"] + 1,
                "phase": stage.phase,
                "tokens": at["tokens"] + stage.tokens_per_step,
                "data_sha256": stream.data_sha256(cursor),
                "cursor": cursor,
            }
            state, metrics = compiled(state, batch)
            meter.add(stage, at, metrics)

            ends_phase = at["step"] == stage.phase_start + stage.phase_steps
            if ends_phase or at["step"] % config.every.eval == 0:
                evaluate_now(stage, state.params, at["step"])
            minutes = (time.monotonic() - last_save) / 60
            timely = config.every.save_minutes and minutes >= config.every.save_minutes
            if ends_phase:
                workdir.log_event(folder, "data", at["step"], sources=stream.summary(cursor))
                _show_sample(Trained(config, tok, state.params, at), folder, meter)
            if ends_phase or timely or at["step"] % config.every.save == 0:
                save()
                meter.restart_clock()
                last_save = time.monotonic()

    saved.wait()
    hashes = {"data_sha256": at["data_sha256"], "params_sha256": tree_sha256(state.params)}
    workdir.log_event(folder, "finish", at["step"], tokens=at["tokens"], **hashes)
    return {"workdir": folder, "step": at["step"], "tokens": at["tokens"], **hashes}


def _enter_phase(config: RunConfig, stage: Stage, tok: Tokenizer, folder: str, meter: Meter, state, at: dict):
    """What a phase trains and is measured with: (state, the feed of batches, evaluation).

    Where the phase starts, the optimizer begins without memory of the one before, and the model is evaluated first.
    Every evaluation reads the same held-out text at the phase's longest length, so that its numbers can be compared.
    """
    phase, chats = getattr(config, stage.phase), stage.phase == "sft"
    starts, longest = at["step"] == stage.phase_start, stages.lengths(phase)[-1]
    told = itertools.count()

    def note(event: str, **facts) -> None:
        workdir.log_event(folder, event, meter.step, **facts)
        if (count := next(told)) < NOTES:
            more = " (events.jsonl has all that follow)" if count == NOTES - 1 else ""
            meter.say(f"{event}: {', '.join(str(fact) for fact in facts.values())}{more}")

    held_out, byte_lengths = evaluate.held_out(phase, tok, config.seed, chats, longest, note), tok.byte_lengths()

    def evaluate_now(stage: Stage, params: dict, at_step: int) -> None:
        if held_out:
            meter.flush()
            meter.log_eval(stage, at_step, evaluate.evaluate(config, params, held_out, byte_lengths))

    if not held_out:
        meter.say(f"the held-out part of {stage.phase} has no row of {longest} tokens: no evaluation")
    if starts:
        state = state._replace(opt_state=step.fresh_optimizer(config, state.params))
        workdir.log_event(folder, "phase", at["step"], phase=stage.phase)
        evaluate_now(stage, state.params, at["step"])
    return state, _feed(config, stage, tok, meter, at, None if starts else at["cursor"], note), evaluate_now


def _feed(config: RunConfig, stage: Stage, tok: Tokenizer, meter: Meter, at: dict, cursor: dict | None, note):
    """(batch on the device, cursor) of every step that the phase has left, prepared ahead in the background."""
    plan, phase, chats = stages.plan(config), getattr(config, stage.phase), stage.phase == "sft"

    def shape_at(at_step: int) -> tuple[int, int, int]:
        now = stages.stage_at(plan, at_step)
        return now.batch, now.seq_len, at_step - now.phase_start

    def place(at_step: int, batch: stream.Batch) -> dict:
        if chats and at_step == stage.phase_start:
            marks = ("\x1b[32m", "\x1b[0m") if sys.stderr.isatty() else ("[[", "]]")
            shown = packing.show(batch, tok, marks, SHOWN_TOKENS)
            meter.say(f"how {stage.phase} begins, with marks around what is trained:\n{shown}")
        if faults.due("nan", "step", at_step + 1):
            batch["weights"] = batch["weights"] * np.float32("nan")
        return step.to_device(batch, stages.stage_at(plan, at_step))

    share = (jax.process_index(), jax.process_count())
    documents = stream.open_phase(phase, tok, config.seed, chats, cursor, share, note, at["data_sha256"])
    return stream.feed(documents, range(at["step"], stage.phase_start + stage.phase_steps), shape_at, place)


def _show_sample(trained: Trained, folder: str, meter: Meter) -> None:
    """What the model makes of the phase's sample prompt, for the terminal and the report."""
    at, prompt = trained.progress, getattr(trained.config, trained.progress["phase"]).sample
    if not prompt:
        return
    model = generate.Model(trained)
    ids = model.prompt(prompt, is_chat=at["phase"] == "sft")
    (new,) = model.generate([ids], SAMPLE_TOKENS, temperature=0.7, top_p=0.95)
    text = trained.tokenizer.decode(new)
    workdir.log_event(folder, "sample", at["step"], phase=at["phase"], prompt=prompt, text=text)
    meter.say(
        f"step {at['step']}: a sample after {at['phase']}\n  {prompt.strip()} | {text.strip()}".replace("\n", "\n  ")
    )


def _leave(folder: str, saved: Checkpoints, meter: Meter, at_step: int, number: int) -> None:
    """Ends the process after a signal, once its state is on disk."""
    saved.wait()
    workdir.log_event(folder, "preempt", at_step, signal=number)
    meter.say(f"{signal.Signals(number).name}: saved at step {at_step}; run the same command again to go on")
    sys.exit(128 + number)


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
        stream.check_sources(at["cursor"], getattr(config, next_stage.phase))
    workdir.rewind_metrics(folder, at["step"], next_stage.phase if at["step"] == next_stage.phase_start else None)
    if restored:
        workdir.log_event(folder, "restore", at["step"], data_sha256=at["data_sha256"])
    return state, at


def _phase_done(plan: tuple[Stage, ...], done: int) -> str:
    """The phase of the last of `done` updates (of the first one, when there are none)."""
    return stages.stage_at(plan, max(done - 1, 0)).phase


def _compile(config: RunConfig, stage: Stage, state, at_step: int, folder: str, meter: Meter):
    meter.flush()
    compiled, seconds = step.compile_step(config, stage, state)
    stall = {"stall_seconds": round(seconds, 3), "stall_steps": meter.in_steps(seconds)}
    workdir.log_event(folder, "stage", at_step, stage=stage.name, compile_seconds=round(seconds, 3), **stall)
    meter.say(
        f"step {at_step}: {stage.name}, {stage.batch} x {stage.seq_len} tokens a step (compiled in {seconds:.1f} s)"
    )
    meter.restart_clock()
    return compiled


@contextlib.contextmanager
def signals():
    """Collects SIGTERM and SIGINT, to be acted on between two steps; a second SIGINT ends the process at once.

    Entered first of all: the KeyboardInterrupt that Python raises by itself is lost when it strikes in a callback of
    the garbage collector, of which JAX has one.
    """
    received: list[int] = []

    def note(number, _):
        name = signal.Signals(number).name
        if signal.SIGINT in received and number == signal.SIGINT:
            os._exit(128 + number)
        if number not in received:
            again = "; once more to quit at once" if number == signal.SIGINT else ""
            os.write(2, f"{name}: stopping after this step, with the state saved{again}\n".encode())
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
