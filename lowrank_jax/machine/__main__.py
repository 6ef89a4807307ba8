"""Train with several processes on one machine: for GPUs that need a process each, or to try a cluster on a CPU.

    python -m lowrank_jax launch_local --processes=2 --devices=2 -- \\
        --config=configs/quickstart.py --workdir=runs/quickstart

Each process runs lowrank_jax.main with the arguments after `--`. Process I has GPU I, or with --devices=N, N devices of
the CPU. Signals are passed on (SIGHUP, from a terminal that closes, as SIGTERM). Ten seconds after a process has failed
or a second Ctrl-C, the processes that still run are killed. The exit status is that of the first process that failed.
"""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

from lowrank_jax import cli
from lowrank_jax.config import UsageError
from lowrank_jax.machine import console

ROOT = pathlib.Path(__file__).parents[2]
GRACE_SECONDS = 10  # for all processes to end by themselves after the first failure


def command(argv: list[str]) -> None:
    parser = cli.Parser(__doc__)
    parser.usage = "python -m lowrank_jax launch_local [--processes=N] [--devices=N] -- --config=FILE --workdir=FOLDER"
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="number of processes (2)")
    parser.add_argument("--devices", type=int, default=0, metavar="N", help="CPU devices per process; 0: a GPU each")
    parser.add_argument("--wait", type=float, metavar="SECONDS", help="for all processes to join (300)")
    parser.add_argument("args", nargs="+", metavar="--config=FILE ...", help="arguments of lowrank_jax.main")
    args = parser.parse_args(argv)
    if args.processes < 1 or args.devices < 0:
        raise UsageError("--processes must be at least 1, and --devices at least 0 (see --help)")
    wait = [] if args.wait is None else [f"--wait={args.wait:g}"]
    raise SystemExit(train_in_processes([*args.args, *wait], args.processes, args.devices))


def train_in_processes(main_args: list[str], processes: int, devices: int) -> int:
    """Run `lowrank_jax.main` in several processes, with `devices` devices of the CPU each, or a GPU each for 0."""
    received: list[int] = []
    note = lambda number, _: received.append(signal.SIGTERM if number == signal.SIGHUP else number)
    under_nohup = signal.getsignal(signal.SIGHUP) != signal.SIG_DFL
    for number in (signal.SIGTERM, signal.SIGINT, *([] if under_nohup else [signal.SIGHUP])):
        signal.signal(number, note)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        coordinator = f"--coordinator=127.0.0.1:{s.getsockname()[1]}"
    line = [sys.executable, "-m", "lowrank_jax.main", *main_args, coordinator, f"--processes={processes}"]
    running: list[subprocess.Popen] = []
    try:
        for i in range(processes):
            # A process group each: a terminal sends Ctrl-C to its whole group, and a second SIGINT would quit unsaved.
            running.append(subprocess.Popen([*line, f"--process={i}"], env=_environment(i, devices), process_group=0))
        status = _wait(running, received)
    finally:
        for process in running:
            process.kill()
    return 128 - status if status < 0 else status


def _environment(process: int, devices: int) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    if not devices:  # without a number, each process would take all GPUs
        return os.environ | {"PYTHONPATH": path, "JAX_LOCAL_DEVICE_IDS": str(process)}
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}


def _wait(running: list[subprocess.Popen], received: list[int]) -> int:
    """Pass on signals until all processes have ended; return the first exit status that is not 0, or 0."""
    status, interrupts, deadline = 0, 0, float("inf")
    while None in (statuses := [process.poll() for process in running]):
        status = status or next(filter(None, statuses), 0)
        while received:
            number = received.pop(0)
            interrupts += number == signal.SIGINT
            for process in running:
                process.send_signal(number)
        if status or interrupts > 1:
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            deadline = float("inf")
            console.say(f"exit statuses so far: {statuses}; killing the rest")
            for process in running:
                process.kill()
        time.sleep(0.1)
    return status or next(filter(None, statuses), 0)


if __name__ == "__main__":
    cli.main(command)
