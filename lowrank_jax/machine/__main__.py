"""Train with several processes on one machine: for GPUs that need a process each, or to try a cluster on a CPU.

    python -m lowrank_jax launch_local --processes=2 --devices=2 -- \\
        --config=configs/quickstart.py --workdir=runs/quickstart

Each process runs lowrank_jax.main with the arguments after `--`. Process I has GPU I, or with --devices=N, N devices of
the CPU. Signals are passed on. When one process fails, or after a second Ctrl-C, processes that still run ten seconds
later are killed. The exit status is that of the first process that failed.
"""

from lowrank_jax import cli
from lowrank_jax.config import UsageError
from lowrank_jax.machine import launch


def command(argv: list[str]) -> None:
    parser = cli.Parser(__doc__)
    parser.usage = "python -m lowrank_jax launch_local [--processes=N] [--devices=N] -- --config=FILE --workdir=FOLDER"
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="number of processes (2)")
    parser.add_argument("--devices", type=int, default=0, metavar="N", help="CPU devices per process; 0: a GPU each")
    parser.add_argument("args", nargs="+", metavar="--config=FILE ...", help="arguments of lowrank_jax.main")
    args = parser.parse_args(argv)
    if args.processes < 1 or args.devices < 0:
        raise UsageError("--processes must be at least 1, and --devices at least 0 (see --help)")
    raise SystemExit(launch.train_in_processes(args.args, args.processes, args.devices))


if __name__ == "__main__":
    cli.main(command)
