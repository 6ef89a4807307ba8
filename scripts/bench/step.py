"""Times the training step of a config under changes of it, side by side, on random tokens.

    python scripts/bench/step.py --config=configs/quickstart.py model.scan=True pretrain.microbatch_tokens=0

Each change is one arm beside the unchanged config. Arms take turns, so that a noisy machine slows them alike; the ratio
of the best times is what to read.
"""

import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

import jax
import numpy as np

from lowrank_jax import cli, plan
from lowrank_jax.training import step
from lowrank_jax.training.plan import stages_of


def prepare(config, seq_len: int):
    """A function that runs one step of the stage of that length, and the seconds its compilation took."""
    stage = next(s for s in stages_of(config) if s.seq_len == seq_len)
    rng, shape = np.random.default_rng(0), (stage.batch, stage.seq_len)
    tokens = rng.integers(0, config.model.vocab, shape, np.int32)
    ones = {"weights": np.ones(shape, np.float32), "segments": np.ones(shape, np.int32)}
    batch = jax.device_put({"tokens": tokens, "targets": tokens} | ones)
    state, started = step.first_state(config, step.init_params(config)), time.perf_counter()
    compiled = step.lower(config, stage).compile()
    seconds = time.perf_counter() - started

    def run():
        nonlocal state
        state, metrics = compiled(state, batch)
        metrics["loss"].block_until_ready()

    return run, seconds, stage.tokens_per_step


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each arm")
    changes = [a for a in argv if not a.startswith("--")]
    args, base = parser.parse_with_config([a for a in argv if a.startswith("--")])
    fixed = [a for a in argv if a.startswith("--config")]
    arms = {"(as it is)": base} | {change: cli.read_config([*fixed, f"--config.{change}"]) for change in changes}
    arms = {name: plan.resolve_vocab(config) for name, config in arms.items()}
    results = []
    for seq_len in base.pretrain.lengths:
        runs = {name: prepare(config, seq_len) for name, config in arms.items()}
        best = dict.fromkeys(runs, float("inf"))
        for _ in range(args.steps):
            for name, (run, _, _) in runs.items():
                started = time.perf_counter()
                run()
                best[name] = min(best[name], time.perf_counter() - started)
        for name, (_, compile_seconds, tokens) in runs.items():
            ratio = best["(as it is)"] / best[name]
            row = {"length": seq_len, "arm": name, "tokens_per_s": tokens / best[name], "ratio": ratio}
            results.append(row | {"compile_seconds": compile_seconds})
            print(
                f"length {seq_len:5}  {name:36} {row['tokens_per_s']:9,.0f} tokens/s  {ratio:5.2f} x  "
                f"compiled in {compile_seconds:.1f} s",
                flush=True,
            )
    return {"results": results}


if __name__ == "__main__":
    cli.main(command)
