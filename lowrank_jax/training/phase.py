"""The parts of a phase: its feed of batches, its held-out measurement, and the sample at its end."""

import functools
import itertools
import math
from collections.abc import Callable

import jax
import numpy as np

from lowrank_jax.config import RunConfig
from lowrank_jax.data import packing, stream
from lowrank_jax.inference import session
from lowrank_jax.machine import faults, sharding
from lowrank_jax.machine.console import say
from lowrank_jax.machine.interrupt import Interrupted
from lowrank_jax.training import evaluation, run_folder, tasks
from lowrank_jax.training.plan import Plan, Progress, Stage, last_stage, stage_at
from lowrank_jax.training.start import Run

SAMPLE_TOKENS = 120
SAMPLES = 3  # texts that the report shows, with other seeds
SHOWN_TOKENS = 300  # of the first row of SFT
NOTES = 5  # skips and retries shown on the terminal; the ledger has them all


def measure(r: Run, name: str) -> Callable | None:
    """Return `(params, stop) -> result` of `evaluation.evaluate` on a phase's held-out text; None where there is none.

    Every evaluation reads the same text at the phase's longest length, so that its numbers can be compared.
    """
    longest = r.programs.fitted(last_stage(r.plan.stages, name))
    p, note = getattr(r.config, name), note_to(r.folder, lambda: 0)
    length, documents = p.lengths[-1], stream.open_held_out(p, r.tokenizer, r.config.seed, name == "sft", note)
    held_out = evaluation.batches_of(documents, length, p.eval_tokens)
    if not held_out:
        say(f"the held-out part of {name} has no row of {length} tokens: no evaluation")
        return None
    parts = evaluation.split(held_out, longest.microbatch * longest.stage.seq_len // length, r.plan.row_shards)
    return functools.partial(evaluation.evaluate, r.config, batches=parts, byte_lengths=r.tokenizer.byte_lengths())


def compile_measure(config: RunConfig, plan: Plan) -> None:
    """Compile the evaluation of the first phase for its planned microbatch; JAX's cache has it when it is needed."""
    last = last_stage(plan.stages, plan.stages[0].phase)
    if getattr(config, last.phase).eval_fraction:
        evaluation.compile_for(config, plan.mesh, last.microbatch, last.seq_len)


def feed(r: Run, stage: Stage, progress: Progress, step_now: Callable[[], int]) -> stream.Feed:
    """Return (batch on the devices, cursor) of every remaining step of the stage's phase, read in the background.

    In a multi-process run each process reads only its part of the rows, and its cursors are those of that part.
    """
    name, is_chat, end = stage.phase, stage.phase == "sft", stage.phase_start + stage.phase_steps
    p, cursor = getattr(r.config, name), None if progress.step == stage.phase_start else progress.cursor

    def shape_at(step: int) -> tuple[int, int, int]:
        stage_now = stage_at(r.plan.stages, step)
        return stage_now.batch, stage_now.seq_len, step - stage_now.phase_start

    def place(step: int, batch: stream.Batch) -> dict:
        if is_chat and step == stage.phase_start:
            row = packing.show(batch, r.tokenizer, ("[[", "]]"), SHOWN_TOKENS)
            say(f"first row of {name}, with marks around the trained tokens:\n{row}")
        if faults.due("nan", "step", step + 1):
            batch["weights"] = batch["weights"] * np.float32("nan")
        rows, *_ = shape_at(step)
        return {key: sharding.put_rows(r.plan.mesh, x, rows) for key, x in batch.items()}

    share, note = sharding.my_share(r.plan.mesh), note_to(r.folder, step_now)
    start = (cursor, progress.data_sha256)
    documents = stream.open_phase(p, r.tokenizer, r.config.seed, is_chat, start, share, note)
    return stream.Feed(documents, range(progress.step, end), shape_at, place)


def note_to(folder: str, step_now: Callable[[], int]) -> Callable:
    """Return `note(event, **facts)`, which logs every skip and retry of the data and shows the first few.

    A record that the ledger names already was skipped before a resume, which reads it again.
    """
    numbers, known = itertools.count(1), functools.cache(lambda: _skipped(folder))

    def note(event: str, **facts) -> None:
        if event == "skip":
            record = tuple(facts.values())
            if record in known():
                return
            known().add(record)
        run_folder.log_event(folder, event, step_now(), everyone=True, **facts)  # each process reads its own records
        if (number := 0 if event == "unused" else next(numbers)) <= NOTES:  # each key is unused once
            more = " (events.jsonl has all that follow)" if number == NOTES else ""
            say(f"{event}: {', '.join(str(fact) for fact in facts.values())}{more}", everyone=True)

    return note


def _skipped(folder: str) -> set[tuple]:
    events = run_folder.read_rows(folder, "events.jsonl")
    keys = ("source", "where", "reason")
    return {tuple(e[key] for key in keys) for e in events if e["event"] == "skip" and all(key in e for key in keys)}


def run_tasks(r: Run, params: dict) -> dict[str, dict] | str:
    """Return the results of the config's tasks, or why they fail, which is no reason to stop training."""
    try:
        with jax.set_mesh(r.plan.mesh):
            model = session.Model(r.config, r.tokenizer, params)
            return tasks.run(model, r.config.tasks, r.config.task_limit, lambda: r.stopping)
    except (Interrupted, jax.errors.JaxRuntimeError):  # a signal; no memory
        raise
    except Exception as e:  # a task is a program
        return " ".join(f"{type(e).__name__}: {e}".split())[:300]


def end(r: Run, stage: Stage, params: dict, progress: Progress) -> None:
    """End a phase: show a sample of the model's text, and log what the phase was trained on."""
    log = functools.partial(run_folder.log_event, r.folder, step=progress.step, phase=stage.phase)
    if prompt := getattr(r.config, stage.phase).sample:
        model = session.Model(r.config, r.tokenizer, params)
        ids = model.prompt(prompt, is_chat=stage.phase == "sft")
        with jax.set_mesh(r.plan.mesh):
            new, difference = model.checked_sample(ids, SAMPLE_TOKENS, temperature=0.7, top_p=0.95)
            others = [
                r.tokenizer.decode(model.generate(ids, SAMPLE_TOKENS, seed, temperature=0.7, top_p=0.95))
                for seed in range(1, SAMPLES)
            ]
        if not difference <= session.DECODE_TOLERANCE:  # also where it is NaN, which JSON does not have
            log("decode_differs", difference=difference if math.isfinite(difference) else None)
            say(
                f"warning: decoding with the cache differs from the forward pass by {difference:.2g} nats per token; "
                "generated text is not the model's. Does inference/decoder.py know every option of config.model?"
            )
        text = r.tokenizer.decode(new)
        log("sample", prompt=prompt, text=text, more=others)
        shown = f"step {progress.step}: a sample after {stage.phase}\n  {prompt.strip()} | {text.strip()}"
        say(shown.replace("\n", "\n  "))
    read = stream.summary(progress.cursor)
    log("data", sources=read)
    say("\n  ".join([f"{stage.phase} is trained on", *map(stream.describe, read)]))
