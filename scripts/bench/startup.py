"""Time the training command from its launch to its first step, with an empty compilation cache and with a full one.

    python scripts/bench/startup.py --config=configs/quickstart.py --config.pretrain.steps=100

Each round is a new run, which learns its tokenizer anew. The first round fills the cache, and the others count as warm.
The C++ for CPUs is compiled before, as scripts/setup.sh does.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

from lowrank_jax import cli
from lowrank_jax.config import RunFailure
from lowrank_jax.model.kernels import build
from lowrank_jax.training import run_folder


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args, settings = parser.parse_known_args(argv)
    for target in build.TARGETS:
        build.load(target)
    with tempfile.TemporaryDirectory() as folder:
        cold, *warm = (first_step(settings, os.path.join(folder, str(i)), folder) for i in range(args.rounds))
    median = statistics.median(warm) if warm else float("nan")
    print(f"cold {cold:.1f} s, warm {median:.1f} s (median of {len(warm)})", flush=True)
    return {"cold_seconds": cold, "warm_seconds": warm}


def first_step(settings: list[str], run: str, folder: str) -> float:
    """Return the seconds from the launch of a new run to its first `stage` event, which follows its first step."""
    cache = {"JAX_COMPILATION_CACHE_DIR": os.path.join(folder, "cache")}
    line = [sys.executable, "-m", "lowrank_jax.main", *settings, f"--workdir={run}"]
    started = time.monotonic()
    with subprocess.Popen(line, env=os.environ | cache, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while not any(row["event"] == "stage" for row in run_folder.read_rows(run, "events.jsonl")):
            if process.poll() is not None:
                raise RunFailure(process.stderr.read().decode(errors="replace").strip().splitlines()[-1])
            time.sleep(0.05)
        seconds = time.monotonic() - started
        process.kill()
    return seconds


if __name__ == "__main__":
    cli.main(command)
