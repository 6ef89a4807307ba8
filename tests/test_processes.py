"""Several real processes as one run: the same data and losses as one process, also where one of them is disturbed."""

import functools
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import runs

from lowrank_jax import trained, workdir

ROOT = pathlib.Path(__file__).parents[1]
FSDP = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 1}


def together(data, folder, faults: str = "", processes: int = 2, devices: int = 2, **changes):
    """(exit status, stdout, stderr) of a run of so many processes."""
    args = runs.train_args(data, folder, **FSDP | changes)
    env = os.environ | {"LOWRANK_FAULTS": faults, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": runs.CACHE}
    env |= {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "scripts/launch_local.py", f"--processes={processes}", f"--devices={devices}", "--"]
    with subprocess.Popen(
        [*command, *args],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        errors="replace",
    ) as launcher:
        try:
            out, err = launcher.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            launcher.terminate()
            raise
    return launcher.returncode, out, err


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


@pytest.fixture(scope="module")
def killed(data, tmp_path_factory):
    """A run of two processes of which one was killed, and how it ended."""
    folder = tmp_path_factory.mktemp("processes") / "killed"
    started = time.monotonic()
    return folder, together(data, folder, "kill@step=8:1"), time.monotonic() - started


def test_a_run_with_a_killed_process_ends_and_goes_on_with_one(killed, data, reference):
    folder, (status, _, _), seconds = killed
    assert status == 137 and seconds < 200
    assert max(event["step"] for event in events(folder, "save")) in (4, 6)  # the one at 6 may not be whole
    status, out, err = runs.train(data, folder)
    assert status == 0, err
    starts = events(folder, "start")
    assert [(start["processes"], start["devices"]) for start in starts] == [(2, 4), (1, 1)]
    assert_same_training(folder, reference)


def test_a_signal_to_one_stops_all_at_one_step_and_an_oom_of_all_is_recovered_from(data, reference, tmp_path):
    folder = tmp_path / "run"
    status, _, err = together(data, folder, "oom@step=4,term@step=7:1")
    assert status == 143, err
    (oom,), (preempt,) = events(folder, "oom"), events(folder, "preempt")
    assert oom["step"] == 3 and oom["microbatch_tokens"] == 32 and 7 <= preempt["step"] <= 9
    assert preempt["step"] in [event["step"] for event in events(folder, "save")]
    assert err.count("out of memory at step 4: going on") == 1  # the first process alone speaks
    status, out, err = together(data, folder)
    assert status == 0, err
    assert out.count("done: step") == 1 and len(events(folder, "finish")) == 1
    assert events(folder, "start")[0]["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    assert_same_training(folder, reference)


def test_mistakes_end_all_processes_with_one_line_each(data, tmp_path):
    status, _, err = together(data, tmp_path / "run", **{"mesh.data": 3})
    lines = [line for line in err.splitlines() if "error: " in line]
    assert status == 2 and len(lines) == 2 and all("config.mesh (data=3" in line for line in lines), err
    assert "Traceback" not in err and not (tmp_path / "run").exists()


def test_what_the_first_process_finds_wrong_is_told_by_all(data, tmp_path):
    with workdir.lock(str(tmp_path)):
        status, _, err = together(data, tmp_path)
    assert status == 2 and err.count(f"error: another process is training in {tmp_path}") == 2, err


def test_flags_of_many_processes_go_together(data, tmp_path):
    status, _, err = runs.run("main", *runs.train_args(data, tmp_path / "run"), "--processes=2")
    runs.assert_one_line(status, err, 2, "--coordinator", "--process=I")


MEETING = """
import sys, time
from lowrank_jax import processes
from lowrank_jax.config import UsageError
index = int(sys.argv[1])
processes.start(sys.argv[2], 2, index) if sys.argv[2:] else processes.start()
print(processes.gather({"mine": index}), processes.index(), processes.count(), processes.is_first())
print(processes.on_first(lambda: f"from {index}"))
def refuse():
    raise UsageError(f"said by {index}")
try:
    processes.on_first(refuse)
except UsageError as e:
    print(e)
print(processes.meet("both", 30))
if index == 0:
    print(processes.meet("alone", 1))
sys.stdout.flush()
processes.meet("end", 30)
"""


def slurm(i: int) -> dict[str, str]:
    """The environment of a job step's task, as far as JAX reads it; the number of the job makes the port."""
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    return job | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}


@pytest.mark.parametrize("through", ["coordinator", "slurm"])
def test_processes_agree_share_what_the_first_finds_and_notice_that_one_is_alone(through):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = [f"127.0.0.1:{s.getsockname()[1]}"] if through == "coordinator" else []
    env = lambda i: os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | ({} if address else slurm(i))
    command = lambda i: [sys.executable, "-c", MEETING, str(i), *address]
    both = [subprocess.Popen(command(i), cwd=ROOT, env=env(i), text=True, stdout=subprocess.PIPE) for i in range(2)]
    told = [process.communicate(timeout=120)[0].splitlines() for process in both]
    for i, lines in enumerate(told):
        lines = [line for line in lines if not line.startswith("[Gloo]")]
        assert lines[0] == f"[{{'mine': 0}}, {{'mine': 1}}] {i} 2 {i == 0}"
        assert lines[1:4] == ["from 0", "said by 0", "True"]
        assert lines[4:] == (["False"] if i == 0 else [])
