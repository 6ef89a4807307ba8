"""Several real processes as one run: the same data and losses as one process, even after a fault in one of them."""

import functools
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from concurrent import futures

import jax
import numpy as np
import pytest
import runs

from lowrank_jax.training import run_folder, trained

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
FSDP = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 1}
TWO_DEVICES = {"XLA_FLAGS": f"{runs.ENVIRONMENT['XLA_FLAGS']} --xla_force_host_platform_device_count=2"}


def together(data, folder, faults: str = "", patches: dict | None = None, second: tuple = (), **changes):
    """Run two processes of two devices each; return (exit statuses, stdout, stderr).

    `second` are arguments that the second process alone has. As with launch_local, a process that still runs ten
    seconds after the other failed is killed.
    """
    args = [*runs.train_args(data, folder, **FSDP | changes), f"--coordinator={free_address()}", "--processes=2"]
    each = lambda i: [*args, f"--process={i}", *(second if i else ())]
    start = lambda i: runs.launch("main", *each(i), faults=faults, patches=patches, env=TWO_DEVICES)
    with futures.ThreadPoolExecutor(2) as pool:
        both = [start(i) for i in range(2)]
        ends = [pool.submit(process.communicate, None, 300) for process in both]
        futures.wait(ends, return_when=futures.FIRST_COMPLETED)
        if any(process.poll() for process in both):
            futures.wait(ends, 10)
            for process in both:
                process.kill()
        outs, errs = zip(*(end.result() for end in ends))
    return [process.returncode for process in both], "".join(outs), "".join(errs)


def launched(data, folder, faults: str = "") -> tuple[int, str]:
    """Run the same with launch_local; return (exit status, stderr)."""
    args = runs.train_args(data, folder, **FSDP)
    command = [sys.executable, "-m", "lowrank_jax.machine", "--processes=2", "--devices=2", "--", *args]
    env = os.environ | runs.ENVIRONMENT | {"LOWRANK_FAULTS": faults}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, errors="replace", timeout=300)
    return done.returncode, done.stderr


def losses(folder) -> dict:
    return {
        (row["step"], row.get("split")): row.get("loss", row.get("eval_loss"))
        for row in runs.rows(folder, "metrics.jsonl")
    }


def assert_same_training(folder, reference) -> None:
    """The same data, and up to rounding the same losses and weights, as the run of one process on one device."""
    finish, expected = (runs.rows(where, "events.jsonl")[-1] for where in (folder, reference))
    assert [finish[key] for key in ("event", "data_sha256", "tokens")] == [
        expected[key] for key in ("event", "data_sha256", "tokens")
    ]
    ours, theirs = losses(folder), losses(reference)
    assert ours.keys() == theirs.keys() and len(runs.rows(folder, "metrics.jsonl")) == len(ours)  # none twice
    np.testing.assert_allclose(list(ours.values()), [theirs[key] for key in ours], rtol=1e-5)
    params, others = (trained.open_run(str(where)).params for where in (folder, reference))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), params, others)


def events(folder, name: str) -> list[dict]:
    return [event for event in runs.rows(folder, "events.jsonl") if event["event"] == name]


def free_address() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """A run in which one process alone ran out of memory, with that process's exit status and stderr."""
    folder = tmp_path_factory.mktemp("processes") / "run"
    statuses, _, err = together(data, folder, "oom@step=5:1", {"lowrank_jax.training.recovery.ALONE_SECONDS": 2})
    return folder, statuses[1], err


@pytest.fixture(scope="module")
def killed(alone, data):
    """The same run, resumed with one process killed: its exit status, and the seconds since its last event."""
    folder, *_ = alone
    status, _ = launched(data, folder, "kill@step=8:1")
    return folder, status, time.time() - runs.rows(folder, "events.jsonl")[-1]["time"]


def test_one_process_out_of_memory_ends_the_run_in_one_line_and_the_next_uses_less(alone, killed):
    folder, status, err = alone
    lines = [line for line in err.splitlines() if line.startswith("process 1: error: ")]
    assert status == 1 and len(lines) == 1 and "Traceback" not in err, err
    assert lines[0].startswith("process 1: error: out of memory at step 5, only in this process"), err
    (oom,) = events(folder, "oom")
    assert (oom["step"], oom["microbatch_tokens"]) == (4, 32)
    again = runs.rows(folder, "events.jsonl").index(events(folder, "start")[1])
    used = [
        (event["seq_len"], event["microbatch"])
        for event in runs.rows(folder, "events.jsonl")[again:]
        if event["event"] == "stage"
    ]
    assert used and all(rows // 4 * length <= max(32, length) for length, rows in used)  # four devices


def test_a_run_with_a_killed_process_ends_and_goes_on_with_one(killed, data, reference):
    folder, status, seconds = killed
    assert status == 137 and seconds < 60
    assert max(event["step"] for event in events(folder, "save")) in (4, 6)  # the one at 6 may not be whole
    status, out, err = runs.train(data, folder)
    assert status == 0, err
    starts = events(folder, "start")
    assert [(start["processes"], start["devices"]) for start in starts] == [(2, 4), (2, 4), (1, 1)]
    assert_same_training(folder, reference)


def test_a_signal_to_one_stops_all_at_one_step_and_an_oom_of_all_is_recovered_from(data, reference, tmp_path):
    folder = tmp_path / "run"
    statuses, _, err = together(data, folder, "oom@step=4,term@step=7:1")
    assert statuses == [143, 143], err
    (oom,), (preempt,) = events(folder, "oom"), events(folder, "preempt")
    assert oom["step"] == 3 and oom["microbatch_tokens"] == 32 and 7 <= preempt["step"] <= 9
    assert preempt["step"] in [event["step"] for event in events(folder, "save")]
    assert err.count("out of memory at step 4: going on") == 1  # the first process alone speaks
    statuses, out, err = together(data, folder)
    assert statuses == [0, 0], err
    assert out.count("done: step") == 1 and len(events(folder, "finish")) == 1
    assert events(folder, "start")[0]["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    for name in ("compile", "save", "phase", "data", "sample"):  # one process writes
        written = [(event["step"], event.get("stage"), event.get("phase")) for event in events(folder, name)]
        assert len(written) == len(set(written)) > 0, (name, written)
    assert_same_training(folder, reference)


def test_mistakes_end_all_processes_with_one_line_each(data, tmp_path):
    statuses, _, err = together(data, tmp_path / "run", **{"mesh.data": 3})
    lines = [line for line in err.splitlines() if "error: " in line]
    assert statuses == [2, 2] and len(lines) == 2 and all("config.mesh (data=3" in line for line in lines), err
    assert "Traceback" not in err and not (tmp_path / "run").exists()


def test_an_error_of_the_first_process_is_reported_by_all(data, tmp_path):
    with run_folder.lock(str(tmp_path)):
        statuses, _, err = together(data, tmp_path)
    assert statuses == [2, 2] and err.count(f"error: another process is training in {tmp_path}") == 2, err


@pytest.mark.parametrize("what", ["config", "folder"])
def test_another_config_or_folder_is_the_same_line_on_all_and_leaves_nothing(data, tmp_path, what):
    if what == "config":
        second, line = (
            ["--config.optim.clip=2"],
            "process 1 has config.optim.clip=2.0, the first process has 1.0; start all",
        )
    else:
        second, line = (
            [f"--workdir={tmp_path}/other"],
            "is another folder in process 1 than in the first process; use one",
        )
    patches = {"lowrank_jax.machine.agreement.SHARED_SECONDS": 1}
    statuses, _, err = together(data, tmp_path / "run", patches=patches, second=second)
    lines = [text for text in err.splitlines() if "error: " in text]
    assert statuses == [2, 2] and len(lines) == 2 and all(line in text for text in lines), err
    assert not list(tmp_path.iterdir())


FAULT = """
import os, sys, time
from lowrank_jax.machine import agreement, coordinator, processes
coordinator.HEARTBEAT_SECONDS, coordinator.SILENT_SECONDS = 0.2, 2
index, number = map(int, sys.argv[2:])
processes.start(sys.argv[1], 2, index)
agreement.gather(index)
if index == 0:
    os.kill(os.getpid(), number)
time.sleep(20)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_first_process_that_is_killed_or_stopped_ends_the_other_with_one_line_and_no_stack(number):
    address, env = free_address(), os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = lambda i: [sys.executable, "-c", FAULT, address, str(i), str(int(number))]
    both = [subprocess.Popen(command(i), env=env, text=True, stderr=subprocess.PIPE) for i in range(2)]
    _, err = both[1].communicate(timeout=60)
    both[0].kill()
    both[0].communicate()
    reason = "has ended without a word" if number == signal.SIGKILL else "has not answered for"
    (line,) = [text for text in err.splitlines() if not text.startswith("[Gloo]")]
    assert both[1].returncode == 1 and line.startswith(f"process 1: error: the first process {reason}"), err


def test_flags_of_several_processes_go_together(data, tmp_path):
    status, _, err = runs.run("main", *runs.train_args(data, tmp_path / "run"), "--processes=2")
    runs.assert_one_line(status, err, 2, "--coordinator", "--process=I")


MEETING = """
import sys, time
from lowrank_jax.machine import agreement, processes
from lowrank_jax.config import UsageError
index = int(sys.argv[1])
processes.start(sys.argv[2], 2, index) if sys.argv[2:] else processes.start()
print(agreement.gather({"mine": index}), processes.index(), processes.count(), processes.is_first())
print(agreement.on_first(lambda: f"from {index}"))
def refuse():
    raise UsageError(f"said by {index}")
try:
    agreement.on_first(refuse)
except UsageError as e:
    print(e)
print(processes.barrier("both", 30))
if index == 0:
    print(processes.barrier("alone", 1))
sys.stdout.flush()
processes.barrier("end", 30)
"""


def slurm(i: int) -> dict[str, str]:
    """Return the environment of a job step's task, as far as JAX reads it; the port follows from the job's number."""
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    return job | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}


@pytest.mark.parametrize("through", ["coordinator", "slurm"])
def test_processes_agree_share_the_first_ones_results_and_notice_an_absent_one(through):
    address = [free_address()] if through == "coordinator" else []
    env = lambda i: os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | ({} if address else slurm(i))
    command = lambda i: [sys.executable, "-c", MEETING, str(i), *address]
    both = [subprocess.Popen(command(i), cwd=ROOT, env=env(i), text=True, stdout=subprocess.PIPE) for i in range(2)]
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in both]
    for i, lines in enumerate(outputs):
        lines = [line for line in lines if not line.startswith("[Gloo]")]
        assert lines[0] == f"[{{'mine': 0}}, {{'mine': 1}}] {i} 2 {i == 0}"
        assert lines[1:4] == ["from 0", "said by 0", "True"]
        assert lines[4:] == (["False"] if i == 0 else [])


NOTES_SIGNALS = """
import os, pathlib, signal, sys, time
flags, received = dict(arg.split("=", 1) for arg in sys.argv[1:]), []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: received.append(number))
place = pathlib.Path(flags["--workdir"], flags["--process"])
place.touch()
while not received:
    time.sleep(0.02)
time.sleep(0.5)
place.write_text(f"{os.environ['JAX_LOCAL_DEVICE_IDS']} {flags['--processes']} {[int(number) for number in received]}")
sys.exit(128 + received[0])
"""


def test_a_terminals_ctrl_c_reaches_each_process_once_and_each_has_a_gpu_of_its_own(tmp_path):
    """The launcher, with a program in place of training. A second SIGINT would make training quit without saving."""
    for name, text in (("__init__", ""), ("main", NOTES_SIGNALS)):
        (tmp_path / "lowrank_jax").mkdir(exist_ok=True)
        (tmp_path / "lowrank_jax" / f"{name}.py").write_text(text)
    (tmp_path / "caller").mkdir()  # paths are the caller's
    line = f"import sys; from lowrank_jax.machine import __main__ as launch; launch.ROOT = {str(tmp_path)!r}; "
    line += "sys.exit(launch.train_in_processes(['--workdir=.'], processes=2, devices=0))"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", line], cwd=tmp_path / "caller", env=env, process_group=0) as launcher:
        while len(list((tmp_path / "caller").iterdir())) < 2:
            assert launcher.poll() is None
            time.sleep(0.05)
        os.killpg(launcher.pid, signal.SIGINT)
        assert launcher.wait(timeout=60) == 130
    assert [(tmp_path / "caller" / str(i)).read_text() for i in range(2)] == ["0 2 [2]", "1 2 [2]"]
