"""What a phase of a run is trained on and measured with: its feed of batches, its held-out text, its sample."""

import functools
import itertools
import sys
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from lowrank_jax import evaluate, generate
from lowrank_jax.cli import say
from lowrank_jax.config import RunConfig
from lowrank_jax.data import packing, stream
from lowrank_jax.data.tokenizer import Tokenizer
from lowrank_jax.machine import faults, processes, sharding
from lowrank_jax.training import plan as stages
from lowrank_jax.training import run_folder
from lowrank_jax.training.plan import Stage
from lowrank_jax.training.trained import Trained

SAMPLE_TOKENS = 120
SHOWN_TOKENS = 300  # of the first row of SFT
NOTES = 5  # skips and retries that are told on the terminal; the ledger has them all


def measure(config: RunConfig, mesh: Mesh, last: Stage, tok: Tokenizer, folder: str) -> Callable | None:
    """`(params, stop) -> result` of `evaluate.evaluate` on a phase's held-out text, or None where there is none.

    Every evaluation reads the same text at the phase's longest length, so that its numbers can be compared. As many
    rows go through the device at a time as in `last`, the phase's last stage.
    """
    phase, note = getattr(config, last.phase), note_to(folder, lambda: 0)
    longest = stages.lengths(phase)[-1]
    held_out = evaluate.held_out(phase, tok, config.seed, last.phase == "sft", longest, note)
    if not held_out:
        say(f"the held-out part of {last.phase} has no row of {longest} tokens: no evaluation")
        return None
    parts = evaluate.split(held_out, last.microbatch * last.seq_len // longest, sharding.row_shards(mesh))
    return functools.partial(evaluate.evaluate, config, batches=parts, byte_lengths=tok.byte_lengths())


def compile_measure(config: RunConfig, mesh: Mesh) -> None:
    """Compiles what `measure` of the first phase runs, if everything fits as planned; JAX then finds it."""
    plan = stages.plan(config, sharding.row_shards(mesh))
    last = [s for s in plan if s.phase == plan[0].phase][-1]
    if getattr(config, last.phase).eval_fraction:
        evaluate.compile_for(config, mesh, last.microbatch, last.seq_len)


def feed(
    config: RunConfig, mesh: Mesh, stage: Stage, tok: Tokenizer, folder: str, at: dict, step_now: Callable[[], int]
) -> stream.Feed:
    """(batch on the devices, cursor) of every step that the stage's phase has left, prepared ahead in the background.

    Of many processes each reads what its devices need, and its cursors are those of that part: see `whole`.
    """
    plan, name, chats = stages.plan(config), stage.phase, stage.phase == "sft"
    phase, starts, end = getattr(config, name), at["step"] == stage.phase_start, stage.phase_start + stage.phase_steps

    def shape_at(at_step: int) -> tuple[int, int, int]:
        now = stages.stage_at(plan, at_step)
        return now.batch, now.seq_len, at_step - now.phase_start

    def place(at_step: int, batch: stream.Batch) -> dict:
        if chats and at_step == stage.phase_start:
            marks = ("\x1b[32m", "\x1b[0m") if sys.stderr.isatty() else ("[[", "]]")
            shown = packing.show(batch, tok, marks, SHOWN_TOKENS)
            say(f"how {name} begins, with marks around what is trained:\n{shown}")
        if faults.due("nan", "step", at_step + 1):
            batch["weights"] = batch["weights"] * np.float32("nan")
        rows = stages.stage_at(plan, at_step).batch
        return {key: sharding.put_rows(mesh, x, rows) for key, x in batch.items()}

    share, cursor = sharding.my_share(mesh), None if starts else at["cursor"]
    note = note_to(folder, step_now)
    documents = stream.open_phase(phase, tok, config.seed, chats, cursor, share, note, at["data_sha256"])
    return stream.Feed(documents, range(at["step"], end), shape_at, place)


def whole(at: dict) -> dict:
    """The progress with the cursor of all processes and the hash of all their data: each waits for the others."""
    cursor = stream.merge(processes.gather(at["cursor"])) if at["cursor"] else None
    return at | {"cursor": cursor, "data_sha256": stream.data_sha256(cursor) if cursor else at["data_sha256"]}


def note_to(folder: str, step_now: Callable[[], int]) -> Callable:
    """What the data path tells: every skip and retry in the ledger, the first few on the terminal."""
    told = itertools.count()

    def note(event: str, **facts) -> None:
        run_folder.log_event(folder, event, step_now(), **facts)
        if (count := next(told)) < NOTES:
            more = " (events.jsonl has all that follow)" if count == NOTES - 1 else ""
            say(f"{event}: {', '.join(str(fact) for fact in facts.values())}{more}", everyone=True)

    return note


def show_end(trained: Trained, mesh: Mesh, stage: Stage, folder: str) -> None:
    """At the end of a phase: what it has read, and what the model makes of its sample prompt."""
    at, prompt = trained.progress, getattr(trained.config, stage.phase).sample
    if prompt:
        model = generate.Model(trained)
        ids = model.prompt(prompt, is_chat=stage.phase == "sft")
        with jax.set_mesh(mesh):
            (new,) = model.generate([ids], SAMPLE_TOKENS, temperature=0.7, top_p=0.95)
        text = trained.tokenizer.decode(new)
        run_folder.log_event(folder, "sample", at["step"], phase=stage.phase, prompt=prompt, text=text)
        shown = f"step {at['step']}: a sample after {stage.phase}\n  {prompt.strip()} | {text.strip()}"
        say(shown.replace("\n", "\n  "))
    run_folder.log_event(folder, "data", at["step"], phase=stage.phase, sources=stream.summary(at["cursor"]))
