"""Train a model from raw text to chat: every phase of a config, or what remains of the run in --workdir.

python -m lowrank_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

from lowrank_jax.machine import startup

if __name__ == "__main__":
    startup.prepare()
from lowrank_jax import cli  # noqa: E402, which import JAX
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


if __name__ == "__main__":
    startup.spare_imports()
    cli.main(command)
