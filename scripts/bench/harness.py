"""Shared by the benchmarks: measurements in processes of their own, medians, and the compiled step of a stage."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from lowrank_jax import cli
from lowrank_jax.config import RunConfig, RunFailure

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))


def in_a_process(script: str, *arguments, **environment: str) -> dict:
    """Return the JSON that `python SCRIPT --child ARGUMENTS` prints last; raises RunFailure with its last line."""
    command = [sys.executable, os.path.abspath(script), "--child", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["?"])[-1]
        raise RunFailure(f"{' '.join(map(str, arguments))}: {reason[:200]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(command: Callable, child: Callable[[list[str]], dict]) -> None:
    """Run a benchmark's command, or with --child a single measurement, which prints its JSON as the last line."""
    if sys.argv[1:2] == ["--child"]:
        print("\n" + json.dumps(child(sys.argv[2:])))
    else:
        cli.main(command)


def medians(samples: list[dict]) -> dict:
    """Return the median of each number over the samples that have it."""
    keys = dict.fromkeys(key for sample in samples for key in sample)
    return {key: statistics.median(sample[key] for sample in samples if key in sample) for key in keys}


def median_seconds(run: Callable[[], object], rounds: int) -> float:
    """Return the median duration of `run`, after a first call that is not counted."""
    run()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def compiled_step(config: RunConfig, stage):
    """Return (a function that trains a step on a batch and returns its metrics when they are there, its program)."""
    import jax

    from lowrank_jax.training import step
    from lowrank_jax.training.plan import unchanged

    state = step.first_state(config, step.init_params(config))
    program = step.lower(config, unchanged(stage)).compile()

    def run(batch: dict) -> dict:
        nonlocal state
        state, metrics = program(state, jax.device_put(batch))
        return jax.block_until_ready(metrics)

    return run, program


def random_batch(config: RunConfig, stage) -> dict:
    """Return a placed batch of random tokens in the shape of the stage, as one document per row."""
    import jax
    import numpy as np

    shape = (stage.batch, stage.seq_len)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab, shape, np.int32)
    ones = {"weights": np.ones(shape, np.float32), "segments": np.ones(shape, np.int32)}
    return jax.device_put({"tokens": tokens, "targets": tokens} | ones)
