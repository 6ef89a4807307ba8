"""The training loop: stages, steps, evaluation, checkpoints, and how a run ends, goes on or recovers."""

import contextlib
import dataclasses
import gc
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from lowrank_jax import plan
from lowrank_jax.cli import ABANDONED, say
from lowrank_jax.config import RunConfig, RunFailure, UsageError
from lowrank_jax.data import stream, tokenizer
from lowrank_jax.data.tokenizer import Tokenizer
from lowrank_jax.machine import faults, processes, sharding
from lowrank_jax.machine.interrupt import Interrupted
from lowrank_jax.machine.processes import Signals
from lowrank_jax.training import memory, optim, phase, run_folder, step, track, trained, warmstart
from lowrank_jax.training import plan as stages
from lowrank_jax.training.checkpoint import Checkpoints, tree_sha256
from lowrank_jax.training.metrics import Meter
from lowrank_jax.training.plan import Stage
from lowrank_jax.training.programs import Programs

# `precision` is what the run has fallen back to: empty is the config's.
START = {"step": 0, "phase": "pretrain", "tokens": 0, "data_sha256": "", "cursor": None, "precision": ""}
# Where fp8 is given up: how far the loss and the gradient of a microbatch may be from bf16's. In 500 healthy steps of
# the quickstart's model they were 0.0006 and 0.094 off at most; weight gradients of zero were off by 0.47 and more.
FP8_LOSS, FP8_GRADIENT = 0.01, 0.25
ALONE_SECONDS = 60  # after which a process that ran out of memory takes it that the others did not


class Run(NamedTuple):
    """What stays the same while a process trains."""

    config: RunConfig
    tokenizer: Tokenizer
    folder: str
    mesh: Mesh
    plan: tuple[Stage, ...]
    programs: Programs
    saved: Checkpoints
    signals: Signals

    @property
    def stopping(self) -> bool:
        return self.signals.agreed > 0


class OutOfMemory(Exception):
    """A step found no memory. What was learnt from it is in the ledger and in the programs; the state is lost."""


def run(config: RunConfig, folder: str, received: Sequence[int] = (), show: Callable[[str], None] = print) -> dict:
    """Trains every phase of `config` in `folder`, or goes on from its newest checkpoint; returns the finish event.

    `show` gets the plan's table once the memory gate has chosen. Once a signal's number is in `received` (see
    `interrupt.signals`), the state is saved and SystemExit(128 + number) raised. Raises UsageError for a config or data
    that cannot work, and RunFailure for a run that must stop (no finite loss, a full disk, no memory).
    """
    faults.check()
    track.check(config.track)
    with contextlib.ExitStack() as stack:
        processes.on_first(lambda: stack.enter_context(run_folder.lock(folder)))
        config, old, read = _prepare(config, folder)
        mesh, signals = sharding.make_mesh(config, jax.devices()), Signals(received)
        reading = _while_compiling(read)
        if old is None:  # it is evaluated before it trains: what fails here fails there again, and is told
            _while_compiling(lambda: phase.compile_measure(config, mesh))
        failed = lambda: processes.count() == 1 and reading.done() and reading.exception()  # else the others wait
        programs, fits = _gate(config, mesh, folder, lambda: signals.agreed > 0 or bool(failed()))
        stack.enter_context(contextlib.closing(programs))
        if run_folder.newest_checkpoint(folder) is None:
            programs.held = step.first_state(config, _first_params(config, mesh, reading.result), 0, mesh), START
        table = plan.table(plan.describe(config, fits, mesh))
        tok = reading.result()
        if len(set(processes.gather(tok.sha256))) > 1:
            raise RunFailure("the processes have different tokenizers: do all see the same files?")
        if processes.is_first():
            show(table)
        if old is None and processes.is_first():
            tok.save(run_folder.tokenizer_folder(folder))  # before config.json: where that is, the tokenizer is too
        saved = stack.enter_context(Checkpoints(folder, config.every.keep))
        stages_here = stages.plan(config, sharding.row_shards(mesh))
        r = Run(config, tok, folder, mesh, stages_here, programs, saved, signals)
        state, at = _restore(r)
        run_folder.write_config(folder, config)  # only now is it certain that it can go on here
        changed = [f"{key}: {was} -> {now}" for key, was, now in run_folder.differences(old or config, config)]
        on = {"devices": jax.device_count(), "processes": processes.count(), "mesh": dict(mesh.shape)}
        run_folder.log_event(folder, "start", at["step"], resumes=old is not None, changed=changed, **on)
        for found in (found for found in fits if found.seconds):
            _log_compile(r, found)
        while True:
            with contextlib.suppress(OutOfMemory):
                finish = _train(r, state, at)
                break
            del state
            gc.collect()  # the failed step's frames hold on to arrays
            state, at = _restore(r)
            _save_quietly(r, state, at)  # from here on fewer rows at a time, also if it is killed
        if processes.is_first():
            from lowrank_jax import report  # with matplotlib, which takes 0.3 s to import: not before the first step

            report.write(folder)
        return finish


def _while_compiling(work: Callable) -> Future:
    """What `work` will return, from a thread of its own."""
    pool = ThreadPoolExecutor(1, ABANDONED)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return future


def _gate(config: RunConfig, mesh: Mesh, folder: str, stop: Callable[[], bool]) -> tuple[Programs, list[memory.Fit]]:
    """The programs, and how every stage that is left fits into memory: as the ledger has it, or found by compiling.

    `stop` cuts it short, after which nothing is trained.
    """
    ledger, whole_plan = run_folder.read_rows(folder, "events.jsonl"), stages.plan(config, sharding.row_shards(mesh))
    limit = min(processes.gather(memory.limit_bytes(config, mesh)))
    programs = Programs(config, mesh, limit, memory.remembered(ledger, mesh), stop)
    left = tuple(s for s in whole_plan if s.end >= (run_folder.newest_checkpoint(folder) or 0))
    try:
        return programs, programs.fit_all(left, memory.known(ledger, config, whole_plan, mesh, limit))
    except Interrupted:
        return programs, []
    except BaseException:
        programs.close()
        raise


def _prepare(config: RunConfig, folder: str) -> tuple[RunConfig, RunConfig | None, Callable[[], Tokenizer]]:
    """The resolved config, the one that the folder's run had, if any, and what takes as long as compiling.

    That looks at the data, and returns the tokenizer (learnt for a new run).
    """
    phases, t = [config.pretrain] + ([config.sft] if config.sft.steps else []), config.tokenizer
    if run_folder.holds_run(folder):
        old, tok = run_folder.read_config(folder), tokenizer.load(run_folder.tokenizer_folder(folder))
        config = config.with_vocab(tok.vocab_size)
        run_folder.check_same_run(folder, old, config)
    else:
        if run_folder.newest_checkpoint(folder) is not None:
            raise UsageError(
                f"{folder} has checkpoints but no config.json to tell what they are of; use another --workdir"
            )
        old, home = None, t.path or (config.init_from and run_folder.tokenizer_folder(config.init_from))
        tok = tokenizer.load(home) if home else None
        config = config.with_vocab(tok.vocab_size if tok else t.vocab_size)
    shapes = step.abstract_state(config).params
    for p in phases:
        optim.rates(p, shapes)

    def read() -> Tokenizer:
        found = tok or tokenizer.train(stream.texts(phases, t.train_bytes), t.vocab_size)
        for p in phases:
            stream.check(p, found, chats=p is config.sft)  # what is skipped is told when it is met in training
        return found

    return config, old, read


def _first_params(config: RunConfig, mesh: Mesh, tok: Callable[[], Tokenizer]) -> dict:
    """The weights that a new run starts with: random ones, or as many as fit from the run `init_from`."""
    params = step.init_params(config, mesh)
    if not config.init_from:
        return params
    source = trained.open_run(config.init_from, mesh)
    taken = warmstart.take(params, source.params, same_tokens=source.tokenizer.sha256 == tok().sha256)
    say(f"first weights from step {source.progress['step']} of {config.init_from}\n{warmstart.describe(taken)}")
    for key in ("heads", "latent_norm"):  # no shape shows these
        there, here = getattr(source.config.model, key), getattr(config.model, key)
        if there != here:
            say(f"  {key} is {there} there and {here} here: the same weights compute something else")
    place = lambda x, at: x if isinstance(x, jax.Array) else sharding.put(x, at)
    return jax.tree.map(place, taken.params, sharding.of_tree(mesh, taken.params))


def _train(r: Run, state: step.TrainState, at: dict) -> dict:
    """Trains to the end from the state and progress that `_restore` gave; returns the facts of the finish event.

    Raises OutOfMemory where it is to go on from `_restore` again.
    """
    with contextlib.closing(Meter(r.config, r.folder, r.plan[-1].end, at["step"])) as meter:
        try:
            state, at = _loop(r, meter, state, at)
        except jax.errors.JaxRuntimeError as e:
            if not memory.is_out_of_memory(e):
                if processes.count() == 1:
                    raise
                raise RunFailure(f"a step failed, as where another process ended: {str(e).splitlines()[0]:.200}") from e
            if not r.programs.running:
                raise RunFailure(f"out of memory before the first step: {str(e).splitlines()[0]:.200}") from None
            _learn(r, meter.step, str(e))
            raise OutOfMemory from None
    r.saved.wait()
    hashes = {"data_sha256": at["data_sha256"], "params_sha256": tree_sha256(state.weights)}
    run_folder.log_event(r.folder, "finish", at["step"], tokens=at["tokens"], **hashes)
    return {"workdir": r.folder, "step": at["step"], "tokens": at["tokens"], **hashes}


def _loop(r: Run, meter: Meter, state: step.TrainState, at: dict) -> tuple[step.TrainState, dict]:
    """Step by step to the end of the plan.

    What is done is told by `at` and the run's files alone, so that it makes no difference which process did it.
    """
    phase_name, running, last_save = None, None, time.monotonic()
    done = {tuple(m) for m in processes.on_first(lambda: sorted(run_folder.milestones(r.folder)))}
    measures = {}
    with contextlib.ExitStack() as feeds:
        while True:
            if r.stopping:  # looked at after everything that takes long
                _save(r, meter, state, at)
                _leave(r, at["step"])
            stage = stages.stage_at(r.plan, at["step"])
            if stage.phase != phase_name and at["step"] < r.plan[-1].end:
                feeds.close()
                state, batches = _enter(r, stage, state, at, meter)  # reads ahead while the old phase is evaluated
                feeds.enter_context(contextlib.closing(batches))
                phase_name = stage.phase
            due = [m for m in stages.milestones(r.plan, r.config.every.eval, at["step"]) if m not in done]
            if due:
                done.add(due[0])
                _reach(r, due[0], state, at, meter, measures)
                continue
            if at["step"] == r.plan[-1].end:
                return state, at
            try:
                if (asked := _as_run(stage, at)) != running:
                    _switch(r, asked, state, at, meter)
                    running = asked
                faults.strike("step", at["step"] + 1)
                batch, cursor = batches.take(lambda: r.stopping)
                if _fp8_is_off(r, state, batch, at, meter):
                    at = at | {"precision": "bf16"}
                    running = _as_run(stage, at)
                    _switch(r, running, state, at, meter)
            except Interrupted:
                continue
            except (UsageError, OSError):  # data that cannot be used or read: what was learnt so far is kept
                with contextlib.suppress(RunFailure):
                    if processes.count() == 1:  # the others know nothing of it, and would not join in
                        _save(r, meter, state, at)
                raise
            at = _after(at, stage, cursor)
            faults.run_out_of_memory(at["step"], state)
            state, metrics = r.programs.running.step(state, batch)
            meter.add(r.programs.running.stage, at, metrics)
            if r.programs.held:  # that was the program's first step
                meter.end_switch(r.programs.running.fit)
                r.programs.settle()
            minutes = (time.monotonic() - last_save) / 60
            timely = r.config.every.save_minutes and minutes >= r.config.every.save_minutes
            timely = r.signals.exchange(bool(timely), metrics["loss"])
            ends_phase = at["step"] == stage.phase_start + stage.phase_steps
            if timely or ends_phase or at["step"] % r.config.every.save == 0:
                at = _save(r, meter, state, at)
                last_save = time.monotonic()


def _after(at: dict, stage: Stage, cursor: dict) -> dict:
    """The progress after one more update."""
    done = {"step": at["step"] + 1, "tokens": at["tokens"] + stage.tokens_per_step, "phase": stage.phase}
    return at | done | {"cursor": cursor}


def _enter(r: Run, stage: Stage, state: step.TrainState, at: dict, meter: Meter):
    """(state, feed of batches) of the phase that trains now; where it starts, the optimizer has no memory."""
    if at["step"] == stage.phase_start:
        if at["step"]:  # the run's first state has none yet
            state, old = step.first_state(r.config, state.weights, at["step"], r.mesh), state
            jax.tree.map(lambda x: x.delete(), old)  # callers still hold it
        run_folder.log_event(r.folder, "phase", at["step"], phase=stage.phase)
        if r.config.init_from and at["step"] == 0:
            _save(r, meter, state, at)  # from here on the run does not need the other one
    return state, phase.feed(r.config, r.mesh, stage, r.tokenizer, r.folder, at, lambda: meter.step)


def _switch(r: Run, asked: Stage, state: step.TrainState, at: dict, meter: Meter) -> None:
    """Makes the stage's program the one that runs; until its first step is done, a copy of the state is held.

    (A program meets its true need of memory in its first step, which has consumed the state when it fails.)
    """
    meter.begin_switch()
    following = next((s for s in r.plan if s.start == asked.end), None)
    if r.programs.run(asked, following and _as_run(following, at)):
        _log_compile(r, r.programs.running.fit)
    r.programs.held = jax.tree.map(sharding.to_host, state), at
    meter.restart_clock()


def _reach(r: Run, milestone: tuple[str, str, int], state: step.TrainState, at: dict, meter: Meter, measures) -> None:
    """An evaluation, or the end of a phase. An evaluation that a signal breaks off is made after the resume."""
    kind, name, at_step = milestone
    meter.flush()
    stage = next(s for s in reversed(r.plan) if s.phase == name and s.start <= at_step)
    if kind == "end":
        phase.show_end(trained.Trained(r.config, r.tokenizer, state.weights, at), r.mesh, stage, r.folder)
    else:
        if name not in measures:
            longest = r.programs.chosen([s for s in r.plan if s.phase == name][-1])
            measures[name] = phase.measure(r.config, r.mesh, longest, r.tokenizer, r.folder)
        if measures[name]:
            with contextlib.suppress(Interrupted):
                meter.log_eval(stage, at_step, measures[name](state.weights, stop=lambda: r.stopping))
    meter.restart_clock()


def _as_run(stage: Stage, at: dict) -> Stage:
    """The stage in the precision that the run has fallen back to, if it has."""
    return dataclasses.replace(stage, precision=at["precision"] or stage.precision)


def _fp8_is_off(r: Run, state: step.TrainState, batch: dict, at: dict, meter: Meter) -> bool:
    """Whether fp8 is no longer to be trusted, by a look at bf16 on the same weights and data now and then."""
    if not r.programs.running.check or at["step"] % r.config.every.fp8_check:
        return False
    apart = {name: float(x) for name, x in r.programs.running.check(state.params, batch).items()}
    if not apart.pop("known"):  # bf16 makes nothing of this batch either
        return False
    if faults.due("fp8", "step", at["step"] + 1):
        apart["loss"] = float("nan")
    ok = apart["loss"] <= FP8_LOSS and apart["gradient"] <= FP8_GRADIENT  # not so for NaN
    facts = {name: f"{value:.4f}" for name, value in apart.items()}
    run_folder.log_event(r.folder, "fp8_check" if ok else "fallback", at["step"], off_by=facts)
    if not ok:
        say(f"step {at['step']}: fp8 is off from bf16 by {facts}: going on in bf16")
    meter.restart_clock()
    return not ok


def _save(r: Run, meter: Meter, state: step.TrainState, at: dict) -> dict:
    """Starts writing a checkpoint; returns the progress as it is in there, of all processes."""
    meter.flush()  # every loss up to here is known
    at = _save_quietly(r, state, at)
    meter.restart_clock()
    return at


def _save_quietly(r: Run, state: step.TrainState, at: dict) -> dict:
    started, at = time.monotonic(), phase.whole(at)
    if r.saved.save(at["step"], state, at):
        blocked = round(time.monotonic() - started, 3)
        run_folder.log_event(r.folder, "save", at["step"], data_sha256=at["data_sha256"], blocked_seconds=blocked)
    return at


def _leave(r: Run, at_step: int) -> None:
    """Ends the process after a signal, once its state is on disk."""
    r.saved.wait()
    number = r.signals.agreed
    run_folder.log_event(r.folder, "preempt", at_step, signal=number)
    say(f"{signal.Signals(number).name}: saved at step {at_step}; run the same command again to go on")
    sys.exit(128 + number)


def _learn(r: Run, at_step: int, error: str) -> None:
    """Puts it into the ledger that a step ran out of memory, and what is done about it from now on.

    Raises RunFailure where nothing can be, or where the other processes do not know of it: they wait in the step.
    """
    stage, learnt = r.programs.running.stage, r.programs.smaller()
    kind = sharding.a_device(r.mesh).device_kind
    facts = {"stage": stage.name, "reason": error.splitlines()[0][:300], "device": kind}
    told = lambda learnt: facts | (learnt._asdict() if learnt else {})
    if not processes.meet(f"out of memory after step {at_step}", ALONE_SECONDS):
        run_folder.log_event(r.folder, "oom", at_step, everyone=True, **told(learnt))
        raise RunFailure(
            f"out of memory at step {at_step + 1}, here alone; run the same command again: it will use less"
        )
    learnt = memory.least(each and memory.Learnt(*each) for each in processes.gather(learnt))
    r.programs.learn(learnt)
    run_folder.log_event(r.folder, "oom", at_step, **told(learnt))
    if learnt is None:
        raise RunFailure(
            f"out of memory at step {at_step + 1}, in {stage.name} with one row of {stage.seq_len} tokens at a time, "
            "rematerialised; make the model or the length smaller"
        )
    remat = ", rematerialised" if learnt.remat else ""
    say(f"out of memory at step {at_step + 1}: going on with {learnt.microbatch_tokens} tokens at a time{remat}")


def _restore(r: Run) -> tuple[step.TrainState, dict]:
    """The newest state there is, held in memory or saved, as (state, progress); the metrics are cut to match."""
    held, r.programs.held = r.programs.held, None
    r.signals.forget()
    if held is None:
        restored = r.saved.restore(step.abstract_state(r.config, r.mesh), delete_broken=True)
    else:
        is_held = lambda x: isinstance(x, sharding.Held)
        put_back = lambda x: sharding.from_host(x) if is_held(x) else x
        restored = jax.tree.map(put_back, held[0], is_leaf=is_held), held[1]
    if restored is None:
        restored = step.first_state(r.config, _first_params(r.config, r.mesh, lambda: r.tokenizer), 0, r.mesh), START
    state, at = restored
    at = {key: at[key] for key in START}
    if at["step"] > r.plan[-1].end or _phase_done(r.plan, at["step"]) != at["phase"]:
        here = _phase_done(r.plan, at["step"]) if at["step"] <= r.plan[-1].end else "already ended"
        raise UsageError(
            f"{r.folder} was saved at step {at['step']} in {at['phase']}, where this config has {here}; "
            "steps that are done cannot be changed"
        )
    next_stage = stages.stage_at(r.plan, at["step"])
    if at["step"] > next_stage.phase_start:
        stream.check_sources(at["cursor"], getattr(r.config, next_stage.phase))
    run_folder.rewind_metrics(r.folder, at["step"])
    if not (held and at["step"] == 0):
        source = "memory" if held else "checkpoint" if at["step"] else "start"
        run_folder.log_event(r.folder, "restore", at["step"], data_sha256=at["data_sha256"], source=source)
    return state, at


def _phase_done(plan: tuple[Stage, ...], done: int) -> str:
    """The phase of the last of `done` updates (of the first one, when there are none)."""
    return stages.stage_at(plan, max(done - 1, 0)).phase


def _log_compile(r: Run, found: memory.Fit) -> None:
    where, seconds = memory.where(r.config, r.mesh, r.programs.limit), round(found.seconds, 3)
    run_folder.log_event(r.folder, "compile", found.stage.start, **memory.facts(found), seconds=seconds, **where)
    if found.note:
        say(f"{found.stage.name}: chunked attention, as {found.note}")
