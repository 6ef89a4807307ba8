"""Training as several processes on one machine, as several hosts would run it."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
GRACE_SECONDS = 10  # for all processes to end by themselves after the first failure


def train_in_processes(main_args: list[str], processes: int, devices: int) -> int:
    """Run `lowrank_jax.main` with the same arguments in several processes; return the first failure's exit status.

    Process I has GPU I, or `devices` devices of the CPU. Signals are passed on to all (SIGHUP, from a terminal that
    closes, as SIGTERM). Ten seconds after a failure or a second SIGINT, the processes that still run are killed: they
    would wait for the others forever.
    """
    received: list[int] = []
    note = lambda number, _: received.append(signal.SIGTERM if number == signal.SIGHUP else number)
    under_nohup = signal.getsignal(signal.SIGHUP) != signal.SIG_DFL
    for number in (signal.SIGTERM, signal.SIGINT, *([] if under_nohup else [signal.SIGHUP])):
        signal.signal(number, note)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    command = [sys.executable, "-m", "lowrank_jax.main", *main_args]
    command += [f"--coordinator={address}", f"--processes={processes}"]
    running: list[subprocess.Popen] = []
    try:
        for i in range(processes):
            # A process group each: a terminal sends Ctrl-C to its whole group, and a second SIGINT would quit unsaved.
            process = subprocess.Popen([*command, f"--process={i}"], env=_environment(i, devices), process_group=0)
            running.append(process)
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
    status, deadline, interrupted = 0, float("inf"), False
    while True:
        statuses = [process.poll() for process in running]
        if any(statuses) and not status:
            status = next(filter(None, statuses))
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if None not in statuses:
            return status
        if time.monotonic() > deadline:
            deadline = float("inf")
            print(f"exit statuses so far: {statuses}; killing the rest", file=sys.stderr)
            for process in running:
                process.kill()
        while received:
            number = received.pop(0)
            for process in running:
                process.send_signal(number)
            if number == signal.SIGINT and interrupted:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            interrupted = interrupted or number == signal.SIGINT
        time.sleep(0.1)
