"""Measures a preset beside its dense twin on this machine's CPU, or on chips by their compilers alone.

    python scripts/bench/dense_twin.py --presets=small,base
    python scripts/bench/dense_twin.py --presets=base,custom --topologies=v5e:2x2,h100:4

Each line of docs/results/cost.jsonl is one measurement of a process of its own, and what has a line is not measured
again (--again does). Low rank and dense take turns. On a CPU: seconds of CPU and of the clock per step, decoded tokens
a second after 256 and 3,840 tokens, the bytes of the cache, and the most memory that the process ever had. On a chip:
what its compiler says of the longest stage's step.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

from lowrank_jax import cli
from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.model import costs
from lowrank_jax.training import run_folder

ROOT = os.path.abspath(sys.path[0])
VOCAB, LENGTH, CONTEXT = 8192, 1024, 4096
BEFORE = (256, 3840)  # tokens in the cache when decoding is timed
MODELS = ("low rank", "dense")


def command(argv: list[str]) -> dict | None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--presets", default="small,base", help="of configs/preset.py, or custom")
    parser.add_argument("--topologies", default="", help="to compile for, such as v5e:2x2,h100:4 (default: measure)")
    parser.add_argument("--results", default=os.path.join(ROOT, "docs", "results"))
    parser.add_argument("--again", action="store_true", help="also what has a line")
    parser.add_argument("--child", default="", help="PRESET,MODEL,WHAT: one measurement, in this process")
    args = parser.parse_args(argv)
    if args.child:
        preset, which, what = args.child.split(",")
        measure = {"train": train, "decode": decode}.get(what) or (lambda preset, which: compiled(preset, which, what))
        return measure(preset, which)
    os.makedirs(args.results, exist_ok=True)
    done = {(row["preset"], row["model"], row["what"]) for row in run_folder.read_rows(args.results, "cost.jsonl")}
    for preset in args.presets.split(","):
        for what in filter(None, args.topologies.split(",")) if args.topologies else ("train", "decode"):
            for which in MODELS:
                if args.again or (preset, which, what) not in done:
                    row = in_a_process(preset, which, what)
                    run_folder.append(args.results, "cost.jsonl", row)
                    print(json.dumps(row), flush=True)
    return None


def in_a_process(preset: str, which: str, what: str) -> dict:
    child = [sys.executable, os.path.abspath(__file__), f"--child={preset},{which},{what}", "--json"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(child, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RunFailure(f"{preset}, {which}, {what}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    git = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    row = {"preset": preset, "model": which, "what": what} | json.loads(done.stdout.strip().splitlines()[-1])
    return row | {"commit": git.stdout.strip(), "time": round(time.time())}


def config_of(preset: str, which: str, **model):
    if which not in MODELS:
        raise UsageError(f"a model is one of {', '.join(MODELS)}, not {which}")
    path = "configs/custom.py" if preset == "custom" else f"configs/preset.py:{preset}"
    changes = {"model.vocab": VOCAB, "tokenizer.vocab_size": VOCAB} | ({"model.rank": 0} if which == "dense" else {})
    return cli.read_config([f"--config={path}", *(f"--config.{k}={v}" for k, v in (changes | model).items())])


# ----------------------------------------------------------------------------------------- one measurement, in a child


def train(preset: str, which: str, steps: int = 5) -> dict:
    """A step of 4 rows of LENGTH tokens, one row at a time, in fp32."""
    import jax
    import numpy as np

    from lowrank_jax.training import step
    from lowrank_jax.training.plan import stages_of

    shape = {"pretrain.tokens_per_step": 4 * LENGTH, "pretrain.microbatch_tokens": LENGTH, "pretrain.block": LENGTH}
    config = config_of(preset, which, **shape, **{"pretrain.steps": 100, "sft.steps": 0, "model.scan": False})
    (stage,) = stages_of(config)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (4, LENGTH), np.int32)
    ones = {"weights": np.ones(tokens.shape, np.float32), "segments": np.ones(tokens.shape, np.int32)}
    state, batch = step.first_state(config, step.init_params(config)), {"tokens": tokens, "targets": tokens} | ones
    run = step.lower(config, stage).compile()
    need = run.memory_analysis()
    before, clock, cpu = memory(), [], []
    for _ in range(steps + 1):
        started, used = time.perf_counter(), time.process_time()
        state, metrics = run(state, batch)
        jax.block_until_ready(metrics)
        clock.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    found = {
        "parameters": costs.parameters(config.model)["total"],
        "attention": costs.parameters(config.model)["attention"],
    }
    found |= {"flops_per_token": costs.train_flops_per_token(config.model, LENGTH), "tokens_per_step": 4 * LENGTH}
    found |= {"cpu_seconds": statistics.median(cpu[1:]), "seconds": statistics.median(clock[1:])}
    found |= {"state_bytes": need.argument_size_in_bytes, "temporary_bytes": need.temp_size_in_bytes}
    return found | {"peak_rss_bytes": memory(), "rss_before_bytes": before}


def decode(preset: str, which: str, new: int = 33) -> dict:
    """One row, greedy, in fp32, with BEFORE tokens in the cache; random weights.

    Both by XLA: what lowrank_jax/inference/cpu_decoder.py does for the low-rank model alone is in docs/inference.md.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lowrank_jax.inference import decoder, engine, sampling
    from lowrank_jax.machine import sharding
    from lowrank_jax.model import network

    config = config_of(preset, which)
    make = lambda: jax.tree.map(lambda w: w + 0.01, network.init(config.model, jax.random.key(0)))  # no factor is zero
    params = jax.jit(make, out_shardings=sharding.whole(sharding.one_device()))()
    weights = decoder.prepare(config.model, params, "fp32", jnp.float32)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    del params
    e = engine.Engine(config.model, weights, (), 1, CONTEXT)
    found = {"cache_bytes": sum(x.nbytes for x in jax.tree.leaves(e._cache)), "context": CONTEXT, "weight_bytes": size}
    found["cache_bytes_per_token"] = costs.kv_bytes_per_token(config.model, 4)["latent"]
    for count in BEFORE:
        prompt, speeds = np.random.default_rng(count).integers(5, VOCAB, count).tolist(), []
        for _ in range(4):  # the first one compiles
            slot, ends = e.add(engine.Request(prompt, new, sampling.PRESETS["det"])), []
            while e.free < 1:
                if slot in e.step():
                    ends.append(time.perf_counter())
            speeds.append((new - 1) / (ends[-1] - ends[0]))  # the first step gives one token
        found[f"tokens_per_s_{count}"] = max(speeds[1:])
    return found | {"peak_rss_bytes": memory()}


def compiled(preset: str, which: str, topology: str) -> dict:
    """The longest stage's step, as `lowrank_jax.plan --topology` sees it."""
    from lowrank_jax import plan

    told = plan.for_topology(config_of(preset, which, **{"sft.steps": 0}), topology)
    last = told["stages"][-1]
    names = ("name", "seq_len", "batch", "microbatch", "remat", "attention_kernel", "peak_bytes_per_device")
    names += ("param_bytes_per_device", "optimizer_bytes_per_device", "activation_bytes_per_device", "gathered_bytes")
    names += ("collective_bytes", "compute_seconds", "memory_seconds", "network_seconds", "est_step_seconds")
    found = {name: last[name] for name in names} | {"devices": told["devices"], "device_kind": told["device_kind"]}
    return found | {"model_flops_per_step": last["flops_per_step"], "parameters": told["params"]["total"]}


def memory() -> int:
    """The most bytes that this process ever had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    cli.main(command)
