"""Runs a training as several processes on one machine, as so many hosts would run it: for GPUs that are to have a
process each, and to try a cluster's behaviour on a CPU.

    python scripts/launch_local.py --processes=2 --devices=2 -- \\
        --config=configs/quickstart.py --workdir=runs/quickstart

What stands after `--` goes to each lowrank_jax.main. With --devices=N, each process has N devices that are made of the
CPU. Signals are passed on. Where one process fails, the others, which wait for it, are stopped; the exit status is that
of the first process that failed.
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
GRACE = 10  # seconds for the others to end by themselves after one has failed


def environment(devices: int) -> dict[str, str]:
    if not devices:
        return dict(os.environ)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(processes: int, devices: int, args: list[str]) -> list[subprocess.Popen]:
    together = [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={processes}"]
    command = [sys.executable, "-m", "lowrank_jax.main", *args, *together]
    env = environment(devices)
    return [subprocess.Popen([*command, f"--process={i}"], cwd=ROOT, env=env) for i in range(processes)]


def wait(running: list[subprocess.Popen]) -> int:
    """The first exit status that is not 0, if there is one; nothing is left running."""
    status, deadline = 0, None
    while True:
        ended = [process.poll() for process in running]
        if any(ended) and not status:
            status, deadline = next(filter(None, ended)), time.monotonic() + GRACE
        if None not in ended:
            return status
        if deadline and time.monotonic() > deadline:
            for process in running:
                process.kill()
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=0, help="CPU devices of each process; 0: whatever JAX finds")
    parser.add_argument(
        "args", nargs="+", metavar="-- --config=... --workdir=...", help="arguments of lowrank_jax.main"
    )
    args = parser.parse_args()
    if args.processes < 1 or args.devices < 0:
        parser.error("--processes must be at least 1, and --devices not negative")
    running: list[subprocess.Popen] = []

    def pass_on(number, _):
        for process in running:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    running += launch(args.processes, args.devices, args.args)
    status = wait(running)
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(main())
