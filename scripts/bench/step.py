"""Time the training step of a config under changes of it, side by side, on random tokens.

    python scripts/bench/step.py --config=configs/quickstart.py model.scan=True pretrain.microbatch_tokens=0

Each change is one arm beside the unchanged config. Arms take turns, so that a noisy machine slows them alike. Read the
ratio of the median times.
"""

import os
import statistics
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

from lowrank_jax import cli
from lowrank_jax.training import forecast
from lowrank_jax.training.plan import stages_of
from scripts.bench import harness

UNCHANGED = "(unchanged)"


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each arm")
    changes = [a for a in argv if not a.startswith("--")]
    args, base = parser.parse_with_config([a for a in argv if a.startswith("--")])
    flags = [a for a in argv if a.startswith("--config")]
    arms = {UNCHANGED: base} | {change: cli.read_config([*flags, f"--config.{change}"]) for change in changes}
    arms = {name: forecast.resolve_vocab(config) for name, config in arms.items()}
    results = []
    for seq_len in base.pretrain.lengths:
        results += measure(arms, seq_len, args.steps)
    return {"results": results}


def measure(arms: dict, seq_len: int, steps: int) -> list[dict]:
    """Return and print tokens per second of every arm's stage of that length."""
    runs, compile_seconds, tokens = {}, {}, {}
    for name, config in arms.items():
        stage, started = next(s for s in stages_of(config) if s.seq_len == seq_len), time.perf_counter()
        runs[name], _ = harness.compiled_step(config, stage)
        compile_seconds[name], tokens[name] = time.perf_counter() - started, stage.tokens_per_step
        batch = harness.random_batch(config, stage)
        runs[name] = lambda run=runs[name], batch=batch: run(batch)
    seconds = {name: [] for name in runs}
    for _ in range(steps):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    median, rows = {name: statistics.median(values) for name, values in seconds.items()}, []
    for name in runs:
        row = {"length": seq_len, "arm": name, "tokens_per_s": tokens[name] / median[name]}
        rows.append(row | {"ratio": median[UNCHANGED] / median[name], "compile_seconds": compile_seconds[name]})
        print(
            f"length {seq_len:5}  {name:36} {row['tokens_per_s']:9,.0f} tokens/s  {rows[-1]['ratio']:5.2f} x  "
            f"compiled in {compile_seconds[name]:.1f} s",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    cli.main(command)
