"""The start or resume of a run: its parts, the resolved config, the first weights, and the newest state."""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
from jax.sharding import Mesh

from lowrank_jax.config import RunConfig, UsageError
from lowrank_jax.data import stream, tokenizer
from lowrank_jax.data.tokenizer import Tokenizer
from lowrank_jax.machine import processes, sharding
from lowrank_jax.machine.agreement import Signals
from lowrank_jax.machine.console import say
from lowrank_jax.training import identity, optim, run_folder, step, tasks, track, trained, warmstart
from lowrank_jax.training.checkpoint import Checkpoints
from lowrank_jax.training.plan import Plan, Progress, stage_at
from lowrank_jax.training.programs import Programs


class Recovery:
    """The (state, progress) to go back to until a program's first step is done; None after it.

    Only that step shows a program's true need of memory, and a failed step has consumed the state. A later failure goes
    back to the newest checkpoint.
    """

    start: tuple | None = None

    def hold(self, state: step.TrainState, progress: Progress) -> None:
        """Copy the state to host memory."""
        self.start = jax.tree.map(sharding.to_host, state), progress

    def take(self) -> tuple[step.TrainState, Progress] | None:
        """Return (state on the devices, progress), and forget both."""
        start, self.start = self.start, None
        to_device = lambda x: x() if callable(x) else x  # a first state never left the devices
        return start and jax.tree.map(to_device, start)


@dataclass(frozen=True)
class Run:
    """The parts of a run, which stay the same while a process trains."""

    config: RunConfig
    tokenizer: Tokenizer
    folder: str
    plan: Plan
    programs: Programs
    checkpoints: Checkpoints
    signals: Signals
    recovery: Recovery
    passes: dict = field(default_factory=dict)  # over the data, see `outlook.passes`

    @property
    def stopping(self) -> bool:
        return self.signals.agreed > 0


def prepare(config: RunConfig, folder: str) -> tuple[RunConfig, RunConfig | None, Callable[[], tuple]]:
    """Return (config with the vocabulary, the config of the folder's run or None, a function that reads the data).

    The function checks the data and returns (tokenizer, which a new run trains first; what all processes must share of
    the data; a new run's `stream.Checked` by phase and source). It takes about as long as compiling.
    Raises UsageError where the folder holds a different run.
    """
    track.check(config.track)
    if config.every.tasks:
        tasks.check(config.tasks, f"config.every.tasks={config.every.tasks}: config.tasks")
    if run_folder.holds_run(folder):
        config, old, tok = identity.resume(config, folder)
    else:
        if run_folder.newest_checkpoint(folder) is not None:
            raise UsageError(f"{folder} has checkpoints but no config.json that describes them; use another --workdir")
        old, (config, tok) = None, identity.with_tokenizer(config)
        sizes = {"the pieces to learn from the sources": config.tokenizer.vocab_size}
        processes.agree("data", sizes, "give all processes the same files")
    phases, t = config.phases.values(), config.tokenizer
    if tok:
        processes.agree("tokenizer", {"the tokenizer's hash": tok.sha256}, "give all processes the same files")
    for p in phases:
        optim.rates(p, step.abstract_state(config).params)  # raises for a `freeze` that matches nothing

    stream.import_libraries(phases)

    def read_data() -> tuple[Tokenizer, dict, dict]:
        run_tokenizer = tok or tokenizer.train(stream.texts(phases, t.train_bytes), t.vocab_size)
        # Training reports skipped records.
        checked = {name: stream.check(p, run_tokenizer, chats=name == "sft") for name, p in config.phases.items()}
        facts = {}
        if config.every.tasks:
            tasks.load(config.tasks)  # before step 1, in the background: what cannot be had must not end the run later
        for sources in checked.values():
            facts |= {f"the data of {spec}, by its hash": source.fingerprint for spec, source in sources.items()}
        return run_tokenizer, facts | {"the tokenizer's hash": run_tokenizer.sha256}, {} if old else checked

    return config, old, read_data


def first_params(config: RunConfig, mesh: Mesh, get_tokenizer: Callable[[], Tokenizer]) -> dict:
    """Return a new run's first weights: random ones, or as many as fit from the run `init_from`."""
    params = step.init_params(config, mesh)
    if not config.init_from:
        return params
    source = trained.open_run(config.init_from, mesh, "config.init_from")
    same_tokens = source.tokenizer.sha256 == get_tokenizer().sha256
    taken = warmstart.take(params, source.params, same_tokens=same_tokens)
    say(f"first weights from step {source.progress.step} of {config.init_from}\n{warmstart.describe(taken)}")
    for key in ("heads", "latent_norm"):  # these change no shape
        old, new = getattr(source.config.model, key), getattr(config.model, key)
        if old != new:
            say(f"  warning: {key} was {old} and is now {new}; the same weights compute something else")
    place = lambda x, layout: x if isinstance(x, jax.Array) else sharding.put(x, layout)
    return jax.tree.map(place, taken.params, sharding.of_tree(mesh, taken.params))


def restore(r: Run) -> tuple[step.TrainState, Progress]:
    """Return the newest state and its progress, and drop the metrics of later steps and the signals sent after them.

    The state is that of `r.recovery`, or else the newest checkpoint, or else a new run's first state. Raises UsageError
    where the config contradicts steps that are done.
    """
    r.signals.forget()
    mesh, from_memory = r.plan.mesh, r.recovery.take()
    if from_memory:
        state, progress = from_memory
    elif restored := r.checkpoints.restore(step.abstract_state(r.config, mesh)):
        state, progress = restored
    else:
        params = first_params(r.config, mesh, lambda: r.tokenizer)
        state, progress = step.first_state(r.config, params, 0, mesh), Progress()
    _check_done(r, progress)
    run_folder.rewind_metrics(r.folder, progress.step)
    if not (from_memory and progress.step == 0):
        source = "memory" if from_memory else "checkpoint" if progress.step else "start"
        run_folder.log_event(r.folder, "restore", progress.step, data_sha256=progress.data_sha256, source=source)
    return state, progress


def _check_done(r: Run, progress: Progress) -> None:
    """Raise UsageError where the plan has another phase for the steps that are done, or other sources."""
    done, stages = progress.step, r.plan.stages
    if not done:
        return
    phase = stage_at(stages, done - 1).phase if done <= r.plan.end else "already ended"
    if phase != progress.phase:
        saved = f"{r.folder} was saved at step {done} in {progress.phase}, where this config has {phase}"
        raise UsageError(f"{saved}; steps that are done cannot be changed")
    next_stage = stage_at(stages, done)
    if done > next_stage.phase_start:
        phase = next_stage.phase
        stream.check_sources(progress.cursor, getattr(r.config, phase), r.tokenizer, chats=phase == "sft")
