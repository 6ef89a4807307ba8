"""Trains a model from raw text to chat: every phase of a config, or on from where the run in --workdir stopped.

python -m lowrank_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

import functools

from lowrank_jax.machine import startup

if __name__ == "__main__":
    startup.prepare()
from lowrank_jax import cli  # noqa: E402, which import JAX
from lowrank_jax.machine import interrupt, processes  # noqa: E402, which import JAX
from lowrank_jax.training import loop  # noqa: E402, which import JAX


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--workdir", required=True, help="the run's folder; if it holds a run, that run goes on")
    many = parser.add_argument_group(
        "many processes", "the same command on each host, in a folder that all of them see"
    )
    many.add_argument("--coordinator", default="", metavar="HOST:PORT", help="the first process's host and a free port")
    many.add_argument("--processes", type=int, default=0, metavar="N", help="how many there are")
    many.add_argument("--process", type=int, default=-1, metavar="I", help="which one this is, from 0")
    many.add_argument(
        "--cluster", action="store_true", help="as the environment says (TPU pods; SLURM, Open MPI and GKE are noticed)"
    )
    with interrupt.signals() as received:
        args, config = parser.parse_with_config(argv)
        processes.start(args.coordinator, args.processes, args.process, args.cluster)
        finish = loop.run(config, args.workdir, received, show=functools.partial(print, flush=True))
    if processes.is_first():
        print(
            f"done: step {finish['step']}, {finish['tokens']:,} tokens; report: {args.workdir}/report.html", flush=True
        )
    return finish


if __name__ == "__main__":
    startup.spare_imports()
    cli.main(command)
