"""The training loop: stages, steps, evaluations and checkpoints, and how a run ends, stops or recovers."""

import contextlib
import dataclasses
import functools
import gc
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax

from lowrank_jax.config import RunConfig, RunFailure, UsageError
from lowrank_jax.data import stream, tokenizer
from lowrank_jax.machine import agreement, faults, processes
from lowrank_jax.machine.agreement import Signals
from lowrank_jax.machine.console import ABANDONED, say, show
from lowrank_jax.machine.interrupt import Interrupted
from lowrank_jax.training import forecast, identity, memory, mirror, outlook, phase, recovery, run_folder, start, step
from lowrank_jax.training.checkpoint import Checkpoints, tree_sha256
from lowrank_jax.training.metrics import Meter
from lowrank_jax.training.plan import Progress, Stage, make, milestones, stage_at
from lowrank_jax.training.programs import Programs
from lowrank_jax.training.start import Run
from lowrank_jax.training.step import TrainState


def run(config: RunConfig, folder: str, received: Sequence[int] = ()) -> dict:
    """Train every phase of `config` in `folder`, from its newest checkpoint on; return the finish event.

    Raises UsageError for a config or data that cannot work, RunFailure for a run that must stop (no finite loss, a full
    disk, no memory), and SystemExit(128 + number) after saving for a signal in `received` (see `interrupt.signals`).
    """
    faults.check()
    with contextlib.ExitStack() as stack:
        url, folder = folder, mirror.place(folder)
        agreement.on_first(lambda: stack.enter_context(run_folder.lock(folder)))
        agreement.on_first(lambda: stack.enter_context(mirror.trained(url)))
        agreement.share_folder(folder, mirror.SHARE if folder != url else "use one that all hosts share")
        on_disk = {"the run's config.json": run_folder.holds_run(folder)}
        on_disk["the run's newest checkpoint"] = run_folder.newest_checkpoint(folder)
        processes.agree("folder", on_disk, f"start again when all hosts see the same files in {folder}")
        config, old, read_data = start.prepare(config, folder)
        plan, background = make(config, jax.devices()), ThreadPoolExecutor(2, ABANDONED)
        memory.check_weights(config, plan.mesh)
        reading = background.submit(read_data)
        if old is None:  # a new run evaluates first, and that raises what fails in here
            background.submit(phase.compile_measure, config, plan)
        background.shutdown(wait=False)
        signals, go_back, fits = Signals(received), start.Recovery(), []
        # With several processes, one that stopped alone would leave the others waiting.
        data_failed = lambda: processes.count() == 1 and reading.done() and reading.exception()
        should_stop = lambda: signals.agreed > 0 or bool(data_failed())
        events, newest = run_folder.read_rows(folder, "events.jsonl"), run_folder.newest_checkpoint(folder)
        programs = stack.enter_context(contextlib.closing(Programs(config, plan, events, should_stop)))
        with contextlib.suppress(Interrupted):  # after a signal the loop stops before its first step
            fits = programs.fit_all(newest or 0)
        if newest is None:
            params = start.first_params(config, plan.mesh, lambda: reading.result()[0])
            go_back.start = step.first_state(config, params, 0, plan.mesh), Progress()
        table, (tok, data, checked) = forecast.table(forecast.describe(config, plan, fits)), reading.result()
        processes.agree("data", data, "give all processes the same files")
        if processes.is_first():
            show(table, needed=False)
        passes = outlook.passes(config, plan.stages, checked)
        for warning in outlook.data_warnings(config, plan.stages, passes, outlook.corpus_bytes(checked)):
            say(f"warning: {warning}")
        if old is None and processes.is_first():
            tok.save(run_folder.tokenizer_folder(folder))  # before config.json: a folder with that has a tokenizer too
        checkpoints = stack.enter_context(Checkpoints(folder, config.every.keep, ends=plan.phase_ends))
        r = Run(config, tok, folder, plan, programs, checkpoints, signals, go_back, passes)
        state, progress = start.restore(r)
        # A tokenizer's files may be written in another way by another version of its library: those of a run stay.
        sha256 = tokenizer.folder_sha256(run_folder.tokenizer_folder(folder)) if old else tok.files_sha256
        run_folder.write_config(folder, config, sha256)  # everything that can refuse the config has passed
        facts = identity.announce(config, old, plan.mesh)
        run_folder.log_event(folder, "start", progress.step, resumes=old is not None, **facts)
        for fit in fits:
            if fit.seconds:  # compiled now, not read from events.jsonl
                _log_compile(r, fit)
        finish = _train(r, state, progress)
        if processes.is_first():
            from lowrank_jax.training import report  # matplotlib takes 0.3 s to import: not before the first step

            report.write(folder)
        return finish | {"workdir": url}


def _log_compile(r: Run, fit: memory.Fit) -> None:
    facts = memory.fit_facts(fit) | {"seconds": round(fit.seconds, 3)}
    facts |= memory.fit_conditions(r.config, r.plan.mesh, fit.limit_bytes)
    run_folder.log_event(r.folder, "compile", fit.stage.start, **facts)
    if fit.note:
        say(f"{fit.stage.name}: attention falls back to chunked, because {fit.note}")


def _train(r: Run, state: TrainState, progress: Progress) -> dict:
    """Train to the end and return the finish event; after running out of memory, go on with a smaller microbatch."""
    recovers = False
    while True:
        with contextlib.closing(Meter(r.config, r.folder, r.plan.end, progress.step, r.passes)) as meter:
            if recovers:
                _save(r, meter, state, progress)  # a kill from now on resumes with the smaller microbatch
            try:
                state, progress = _loop(r, meter, state, progress)
                break
            except jax.errors.JaxRuntimeError as e:
                recovery.lower_cap(r, meter.step, e)
        del state
        gc.collect()  # the failed step's frames hold on to arrays
        state, progress = start.restore(r)
        recovers = True
    r.checkpoints.wait()
    hashes = {"data_sha256": progress.data_sha256, "params_sha256": tree_sha256(state.weights)}
    run_folder.log_event(r.folder, "finish", progress.step, tokens=progress.tokens, **hashes)
    return {"workdir": r.folder, "step": progress.step, "tokens": progress.tokens, **hashes}


def _loop(r: Run, meter: Meter, state: TrainState, progress: Progress) -> tuple[TrainState, Progress]:
    """Train step by step to the end of the plan. Everything due follows from the progress and the run's files."""
    phase_name, last_save, evaluator_of = None, time.monotonic(), functools.cache(lambda name: phase.measure(r, name))
    done = {tuple(m) for m in agreement.on_first(lambda: sorted(run_folder.milestones(r.folder)))}
    with contextlib.ExitStack() as feeds:
        while True:
            if r.stopping:  # every branch that takes long comes back to this line
                _save(r, meter, state, progress)
                r.checkpoints.wait()
                run_folder.log_event(r.folder, "preempt", progress.step, signal=r.signals.agreed)
                name = signal.Signals(r.signals.agreed).name
                say(f"{name}: saved at step {progress.step}; run the same command again to go on")
                sys.exit(128 + r.signals.agreed)
            stage = stage_at(r.plan.stages, progress.step)
            if stage.phase != phase_name and progress.step < r.plan.end:
                feeds.close()
                # Before the evaluation, which reads no batches.
                state, batches = _enter_phase(r, stage, state, progress, meter)
                feeds.enter_context(contextlib.closing(batches))
                phase_name = stage.phase
            if due := [m for m in _milestones(r, progress.step) if m not in done]:
                done.add(due[0])
                _reach(r, due[0], state, progress, meter, evaluator_of)
                continue
            if progress.step == r.plan.end:
                return state, progress
            try:
                _switch_program(r, stage, state, progress, meter)
                faults.strike("step", progress.step + 1)
                batch, cursor = batches.take(lambda: r.stopping)
                if recovery.must_leave_fp8(r, meter, state.params, batch, progress.step):
                    progress = dataclasses.replace(progress, precision="bf16")
                    _switch_program(r, stage, state, progress, meter)
            except Interrupted:
                continue
            except (UsageError, OSError):  # the data cannot be used or read: save the state
                with contextlib.suppress(RunFailure):
                    if processes.count() == 1:  # other processes do not know of the failure, and would not join in
                        _save(r, meter, state, progress)
                raise
            progress = progress.after(stage, cursor)
            faults.run_out_of_memory(progress.step, state)
            state, metrics = r.programs.running.program(state, batch)  # `step.train_step`, compiled
            meter.add(r.programs.running.fitted, progress, metrics)
            if r.recovery.start:  # that was the program's first step
                meter.end_switch(r.programs.running)
                r.recovery.start = None
                r.programs.first_step_done()
            if _is_time_to_save(r, stage, progress, last_save, metrics):
                progress = _save(r, meter, state, progress)
                last_save = time.monotonic()


def _milestones(r: Run, done: int) -> list[tuple[str, str, int]]:
    return milestones(r.plan.stages, r.config.every.eval, done, r.config.every.tasks)


def _enter_phase(r: Run, stage: Stage, state: TrainState, progress: Progress, meter: Meter):
    """Return (state, feed of batches) for the stage's phase; a phase starts with a fresh optimizer state."""
    if progress.step == stage.phase_start:
        if progress.step:  # the run's first state is fresh
            state, old = step.first_state(r.config, state.weights, progress.step, r.plan.mesh), state
            jax.tree.map(lambda x: x.delete(), old)  # callers still refer to it
        run_folder.log_event(r.folder, "phase", progress.step, phase=stage.phase)
        if r.config.init_from and progress.step == 0:
            _save(r, meter, state, progress)  # from now on the run does not need `init_from`
    return state, phase.feed(r, stage, progress, lambda: meter.step)


def _reach(r: Run, milestone: tuple[str, str, int], state, progress: Progress, meter: Meter, evaluator_of) -> None:
    """Evaluate, run tasks or end a phase. What a signal interrupts is repeated after the resume."""
    kind, name, at_step = milestone
    meter.flush()
    stage = stage_at([s for s in r.plan.stages if s.phase == name], at_step)
    if kind == "end":
        phase.end(r, stage, state.weights, progress)
    elif kind == "tasks":
        with contextlib.suppress(Interrupted):
            meter.log_tasks(stage, at_step, phase.run_tasks(r, state.weights))
    elif evaluate := evaluator_of(name):
        with contextlib.suppress(Interrupted):
            meter.log_eval(stage, at_step, evaluate(state.weights, stop=lambda: r.stopping))
    meter.restart_clock()


def _switch_program(r: Run, stage: Stage, state: TrainState, progress: Progress, meter: Meter) -> None:
    """Run the stage's program, in the run's precision, from now on; hold the state until its first step is done."""
    stage = dataclasses.replace(stage, precision=progress.precision or stage.precision)
    running = r.programs.running
    if running and running.stage == stage:
        return
    meter.begin_switch()
    if r.programs.switch_to(stage):
        _log_compile(r, r.programs.running)
    r.recovery.hold(state, progress)
    meter.restart_clock()


def _is_time_to_save(r: Run, stage: Stage, progress: Progress, last_save: float, metrics: dict) -> bool:
    """Return True every so many steps or minutes and at the end of a phase; all processes decide alike."""
    every = r.config.every
    is_due = bool(every.save_minutes) and (time.monotonic() - last_save) / 60 >= every.save_minutes
    is_due = r.signals.exchange(is_due, metrics["loss"])
    ends_phase = progress.step == stage.phase_start + stage.phase_steps
    return is_due or ends_phase or progress.step % every.save == 0


def _save(r: Run, meter: Meter, state: TrainState, progress: Progress) -> Progress:
    """Start writing a checkpoint; return the progress that it holds, of all processes."""
    meter.flush()  # a loss that ends the run must end it before its step is saved
    started = time.monotonic()
    if progress.cursor:  # each process knows only its own part of the data
        cursor = stream.merge(agreement.gather(progress.cursor))
        progress = dataclasses.replace(progress, cursor=cursor, data_sha256=stream.data_sha256(cursor))
    run_folder.check_presence(r.folder)
    if checksum := r.checkpoints.save(state, progress):
        facts = {"data_sha256": progress.data_sha256, "checksum": checksum}
        facts["blocked_seconds"] = round(time.monotonic() - started, 3)
        run_folder.log_event(r.folder, "save", progress.step, **facts)
    meter.restart_clock()
    return progress
