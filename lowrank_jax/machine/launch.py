"""Runs a training as several processes on one machine, as so many hosts would run it: for GPUs that are to have a
process each, and to try a cluster's behaviour on a CPU.

    python scripts/launch_local.py --processes=2 --devices=2 -- \\
        --config=configs/quickstart.py --workdir=runs/quickstart

What stands after `--` goes to each lowrank_jax.main. Process I has GPU I, or, with --devices=N, N devices that are made
of the CPU. Signals are passed on (a terminal that closes is a SIGTERM). Where one process fails, or after a second
Ctrl-C, those that have not ended ten seconds later are killed: they wait for it. The exit status is that of the first
process that failed.
"""

import argparse
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
GRACE = 10  # seconds for all to end by themselves after one has failed


def environment(process: int, devices: int) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT.resolve()), os.environ.get("PYTHONPATH"))))
    if not devices:  # without a number of its own, each process would take all GPUs
        return os.environ | {"PYTHONPATH": path, "JAX_LOCAL_DEVICE_IDS": str(process)}
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait(running: list[subprocess.Popen], received: list[int]) -> int:
    """The first exit status that is not 0, if any, once all have ended; signals in `received` are passed on to them."""
    status, deadline, interrupted = 0, float("inf"), False
    while True:
        ended = [process.poll() for process in running]
        if any(ended) and not status:
            status = next(filter(None, ended))
            deadline = min(deadline, time.monotonic() + GRACE)
        if None not in ended:
            return status
        if time.monotonic() > deadline:
            deadline = float("inf")
            print(f"exit statuses so far: {ended}; killing the rest", file=sys.stderr)
            for process in running:
                process.kill()
        while received:
            number = received.pop(0)
            for process in running:
                process.send_signal(number)
            if number == signal.SIGINT and interrupted:
                deadline = min(deadline, time.monotonic() + GRACE)
            interrupted = interrupted or number == signal.SIGINT
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(
        usage="launch_local.py [--processes=N] [--devices=N] -- --config=FILE --workdir=FOLDER ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="how many (2)")
    parser.add_argument("--devices", type=int, default=0, metavar="N", help="CPU devices of each; 0 (default): a GPU")
    parser.add_argument("args", nargs="+", metavar="--config=FILE ...", help="arguments of lowrank_jax.main")
    args = parser.parse_args()
    if args.processes < 1 or args.devices < 0:
        parser.error("--processes must be at least 1, and --devices not negative")
    received: list[int] = []
    note = lambda number, _: received.append(signal.SIGTERM if number == signal.SIGHUP else number)
    signals = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not under nohup
        signals.append(signal.SIGHUP)
    for number in signals:
        signal.signal(number, note)
    together = [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={args.processes}"]
    command = [sys.executable, "-m", "lowrank_jax.main", *args.args, *together]
    running: list[subprocess.Popen] = []
    try:
        for i in range(args.processes):
            # In a group of its own: a terminal sends Ctrl-C to all of a group, and two of them quit without saving.
            env = environment(i, args.devices)
            running.append(subprocess.Popen([*command, f"--process={i}"], env=env, process_group=0))
        status = wait(running, received)
    finally:
        for process in running:
            process.kill()
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(main())
