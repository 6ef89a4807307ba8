"""Measure a preset beside its dense twin on this machine's CPU, or on chips by their compilers alone.

Compared: low rank with the dense model of the same width and depth. Fair: both run the same code in fp32 with the same
batch and microbatch, decode by XLA, and take turns in processes of their own; each figure is a median.

    python scripts/bench/dense_twin.py --presets=small,base
    python scripts/bench/dense_twin.py --presets=base,custom --topologies=v5e:2x2,h100:4

Each line of docs/results/cost.jsonl is one measurement, and is not measured again without --again. On a CPU: CPU and
clock seconds per step, decoded tokens per second after 256 and 3,840 tokens, the bytes of the cache, and the peak
memory of the process. On a chip: what its compiler says of the longest stage's step.
"""

import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

from lowrank_jax import cli
from lowrank_jax.config import UsageError
from lowrank_jax.model import costs
from lowrank_jax.training import run_folder
from scripts.bench import harness

VOCAB, LENGTH, CONTEXT = 8192, 1024, 4096
BEFORE = (256, 3840)  # tokens in the cache when decoding is timed
MODELS = ("low rank", "dense")


def command(argv: list[str]) -> dict | None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--presets", default="small,base", help="of configs/preset.py, or custom")
    parser.add_argument("--topologies", default="", help="to compile for, such as v5e:2x2,h100:4 (default: measure)")
    parser.add_argument("--results", default=os.path.join(harness.ROOT, "docs", "results"))
    parser.add_argument("--again", action="store_true", help="repeat measurements that have a line")
    args = parser.parse_args(argv)
    os.makedirs(args.results, exist_ok=True)
    done = {(row["preset"], row["model"], row["what"]) for row in run_folder.read_rows(args.results, "cost.jsonl")}
    for preset in args.presets.split(","):
        for what in filter(None, args.topologies.split(",")) if args.topologies else ("train", "decode"):
            for which in MODELS:
                if args.again or (preset, which, what) not in done:
                    row = {"preset": preset, "model": which, "what": what}
                    row |= harness.in_a_process(__file__, preset, which, what, JAX_PLATFORMS="cpu")
                    row |= {"commit": commit(), "time": round(time.time())}
                    run_folder.append(args.results, "cost.jsonl", row)
                    print(json.dumps(row), flush=True)
    return None


def commit() -> str:
    line = ["git", "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(line, cwd=harness.ROOT, capture_output=True, text=True).stdout.strip()


def config_of(preset: str, which: str, **model):
    if which not in MODELS:
        raise UsageError(f"a model is one of {', '.join(MODELS)}, not {which}")
    path = f"{harness.ROOT}/configs/" + ("custom.py" if preset == "custom" else f"preset.py:{preset}")
    changes = {"model.vocab": VOCAB, "tokenizer.vocab_size": VOCAB} | ({"model.rank": 0} if which == "dense" else {})
    return cli.read_config([f"--config={path}", *(f"--config.{k}={v}" for k, v in (changes | model).items())])


# ----------------------------------------------------------------------------------------- one measurement, in a child


def train(preset: str, which: str, steps: int = 5) -> dict:
    """Measure a step of 4 rows of LENGTH tokens, with a microbatch of one row, in fp32."""
    from lowrank_jax.training.plan import stages_of

    shape = {"pretrain.tokens_per_step": 4 * LENGTH, "pretrain.microbatch_tokens": LENGTH, "pretrain.block": LENGTH}
    config = config_of(preset, which, **shape, **{"pretrain.steps": 100, "sft.steps": 0, "model.scan": False})
    (stage,) = stages_of(config)
    run, program = harness.compiled_step(config, stage)
    batch, need = harness.random_batch(config, stage), program.memory_analysis()
    before, clock, cpu = peak_bytes(), [], []
    for _ in range(steps + 1):  # the first one is not counted
        started, used = time.perf_counter(), time.process_time()
        run(batch)
        clock.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    counts = costs.parameters(config.model)
    facts = {"parameters": counts["total"], "attention": counts["attention"], "tokens_per_step": 4 * LENGTH}
    facts |= {"flops_per_token": costs.train_flops_per_token(config.model, LENGTH)}
    facts |= {"cpu_seconds": statistics.median(cpu[1:]), "seconds": statistics.median(clock[1:])}
    facts |= {"state_bytes": need.argument_size_in_bytes, "temporary_bytes": need.temp_size_in_bytes}
    return facts | {"peak_rss_bytes": peak_bytes(), "rss_before_bytes": before}


def decode(preset: str, which: str, new: int = 33) -> dict:
    """Measure a row, greedy, in fp32, after BEFORE tokens; random weights.

    XLA decodes both models. The C++ of inference/cpu_decoder.py, for low rank alone, is measured by decode.py.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lowrank_jax.inference import decoder, engine, sampling
    from lowrank_jax.machine import sharding
    from lowrank_jax.model import network

    config = config_of(preset, which)
    first = lambda: jax.tree.map(lambda w: w + 0.01, network.init(config.model, jax.random.key(0)))  # no zero factor
    params = jax.jit(first, out_shardings=sharding.whole(sharding.one_device()))()
    weights = decoder.prepare(config.model, params, "fp32", jnp.float32)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    del params
    e = engine.Engine(config.model, weights, (), 1, CONTEXT)
    cache = jax.eval_shape(lambda: decoder.empty_cache(config.model, 1, CONTEXT, jnp.float32))
    bytes_of = lambda x: x.size * x.dtype.itemsize
    facts = {"cache_bytes": sum(map(bytes_of, jax.tree.leaves(cache))), "context": CONTEXT, "weight_bytes": size}
    facts["cache_bytes_per_token"] = costs.kv_bytes_per_token(config.model, 4)["latent"]
    for count in BEFORE:
        prompt, speeds = np.random.default_rng(count).integers(5, VOCAB, count).tolist(), []
        for _ in range(4):  # the first one compiles
            slot, ends = e.add(engine.Request(prompt, new, sampling.PRESETS["det"])), []
            while e.free < 1:
                if slot in e.step():
                    ends.append(time.perf_counter())
            speeds.append((new - 1) / (ends[-1] - ends[0]))  # the first step gives one token
        facts[f"tokens_per_s_{count}"] = statistics.median(speeds[1:])
    return facts | {"peak_rss_bytes": peak_bytes()}


def compiled(preset: str, which: str, topology: str) -> dict:
    """Return the figures of the longest stage's step, as `lowrank_jax.plan --topology` prints them."""
    from lowrank_jax.training import forecast

    plan = forecast.for_topology(config_of(preset, which, **{"sft.steps": 0}), topology)
    last = plan["stages"][-1]
    names = ("name", "seq_len", "batch", "microbatch", "remat", "attention_kernel", "peak_bytes_per_device")
    names += ("param_bytes_per_device", "optimizer_bytes_per_device", "activation_bytes_per_device", "gathered_bytes")
    names += ("collective_bytes", "compute_seconds", "memory_seconds", "network_seconds", "est_step_seconds")
    facts = {name: last[name] for name in names} | {"devices": plan["devices"], "device_kind": plan["device_kind"]}
    return facts | {"model_flops_per_step": last["flops_per_step"], "parameters": plan["params"]["total"]}


def peak_bytes() -> int:
    """Return the peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(argv: list[str]) -> dict:
    preset, which, what = argv
    measure = {"train": train, "decode": decode}.get(what, functools.partial(compiled, topology=what))
    return measure(preset, which)


if __name__ == "__main__":
    harness.main(command, child)
