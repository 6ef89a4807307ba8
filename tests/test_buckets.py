"""The commands as real processes on a run in a bucket, with an object server on this machine."""

import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from runs import assert_one_line, last_json, launch, same_end, train_args

s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto")

URL = "s3://bucket/runs/a"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Return the environment in which a process reaches the server, which has one empty bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = open(tmp_path_factory.mktemp("server") / "log", "w")
    command = [sys.executable, "-m", "moto.server", f"-p{port}"]
    with log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            address = f"http://127.0.0.1:{port}"
            keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
            while not _listens(port):
                assert server.poll() is None, open(log.name).read()
                time.sleep(0.05)
            s3fs.S3FileSystem(key="x", secret="x", endpoint_url=address, skip_instance_cache=True).mkdir("bucket")
            yield keys | {"AWS_ENDPOINT_URL": address}
        finally:
            server.kill()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _run(environment: dict, host, module: str, *args: str, faults: str = "") -> tuple[int, str, str]:
    process = launch(module, *args, faults=faults, env=environment | {"LOWRANK_MIRROR": str(host)})
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def test_a_killed_run_in_a_bucket_goes_on_on_another_host_bit_for_bit(data, reference, tmp_path, environment):
    args = ["--json", *train_args(data, URL)]
    for host, fault, status in (("a", "kill@step=8", -signal.SIGKILL), ("b", "term@step=11", 128 + signal.SIGTERM)):
        code, _, err = _run(environment, tmp_path / host, "main", *args, faults=fault)
        assert code == status, err
        shutil.rmtree(tmp_path / host)  # the host is gone
    code, out, err = _run(environment, tmp_path / "c", "main", *args)
    assert code == 0 and last_json(out)["workdir"] == URL, err
    bucket = s3fs.S3FileSystem(
        key="x", secret="x", endpoint_url=environment["AWS_ENDPOINT_URL"], skip_instance_cache=True
    )
    bucket.get("bucket/runs/a", str(tmp_path / "copy"), recursive=True)
    assert same_end(tmp_path / "copy", reference)
    assert {path.name for path in (tmp_path / "copy" / "checkpoints").iterdir()} == {"9", "12", "13"}

    host = tmp_path / "reader"
    code, out, err = _run(environment, host, "evaluate", "--json", f"--workdir={URL}", "--lengths=64")
    _, expected, _ = _run(environment, host, "evaluate", "--json", f"--workdir={reference}", "--lengths=64")
    assert code == 0 and last_json(out)["results"] == last_json(expected)["results"], err
    code, out, err = _run(environment, host, "generate", f"--workdir={URL}", "--prompt=The cat", "--max_tokens=3")
    assert code == 0 and out.startswith("The cat"), err
    assert_one_line(*_run(environment, host, "evaluate", "--workdir=s3://none/a")[::2], 2, "s3://none/a cannot be read")
