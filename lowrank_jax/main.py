"""Train a model from raw text to chat: every phase of a config, or what remains of the run in --workdir.

python -m lowrank_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

import contextlib
import os
import signal

from lowrank_jax.machine import startup

if __name__ == "__main__":
    startup.prepare()
import jax  # noqa: E402

from lowrank_jax import cli  # noqa: E402, which import JAX
from lowrank_jax.config import RunConfig, RunFailure, UsageError, shown  # noqa: E402
from lowrank_jax.machine import console, interrupt, processes  # noqa: E402, which import JAX
from lowrank_jax.training import loop, run_folder  # noqa: E402, which import JAX


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_path("--workdir", required=True, help="the run's folder; a run in it is resumed")
    many = parser.add_argument_group("many processes", "the same command on each host, in a folder that all see")
    many.add_argument("--coordinator", default="", metavar="HOST:PORT", help="the first process's host and a free port")
    many.add_argument("--processes", type=int, default=0, metavar="N", help="number of processes")
    many.add_argument("--process", type=int, default=-1, metavar="I", help="number of this process, from 0")
    many.add_argument("--cluster", action="store_true", help="detect TPU pods, SLURM, Open MPI and GKE")
    many.add_argument("--wait", type=float, default=300, metavar="SECONDS", help="for all processes to join (300)")
    with interrupt.signals() as received:
        args, config = parser.parse_with_config(argv)
        facts, numbers = run_folder.flatten({"config": config.to_dict()}), (args.processes, args.process)
        processes.start(args.coordinator, *numbers, args.cluster, facts, args.wait, received)
        finish = loop.run(config, args.workdir, received)
    if processes.is_first():
        tokens, page = f"{finish['tokens']:,} tokens", f"report: {args.workdir}/report.html"
        console.show(f"done: step {finish['step']}, {tokens}; {page}", needed=False)
    return finish


def train(config, folder: str, changes: dict) -> dict:
    """Train as `command` does, in a process that stays as it was; return the finish event (see lowrank_jax.train).

    A signal saves the state, and then the caller's own handler gets it: Python's raises KeyboardInterrupt.
    """
    config = _read(config, changes)
    if jax.process_count() > 1:
        raise UsageError("lowrank_jax.train is for one process; start several with python -m lowrank_jax.main")
    try:
        with _compilation_cache(), interrupt.signals(may_quit=False) as received:
            finish = loop.run(config, folder, received)
    except SystemExit:
        if not received:
            raise
    if received:
        signal.raise_signal(received[0])
        if received[0] == signal.SIGINT:
            raise KeyboardInterrupt
        raise RunFailure(f"{signal.Signals(received[0]).name}: {folder} is saved; train it again to go on")
    return finish


def _read(config, changes: dict) -> RunConfig:
    """Return the checked config of lowrank_jax.train's arguments; raises UsageError."""
    if not isinstance(changes, dict) or not all(isinstance(key, str) for key in changes):
        raise UsageError(f'changes={shown(changes)} must be a dict of dotted keys, such as {{"pretrain.steps": 200}}')
    if isinstance(config, str | os.PathLike):
        return cli.read_config([f"--config={os.fspath(config)}"], changes)
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(values, dict):
        raise UsageError(f"config={shown(config)} must be a RunConfig, a ConfigDict, a dict or a file's name")
    return RunConfig.from_dict(cli.changed(values, changes))


@contextlib.contextmanager
def _compilation_cache():
    """Use the commands' cache of compiled programs unless the caller has chosen one; restore JAX's settings."""
    from jax.experimental.compilation_cache import compilation_cache

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    is_free = before[names[0]] is None
    if is_free:
        cli.use_compilation_cache()
        compilation_cache.reset_cache()  # JAX reads the folder once
    try:
        yield
    finally:
        if is_free:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()


if __name__ == "__main__":
    startup.spare_imports()
    cli.main(command)
