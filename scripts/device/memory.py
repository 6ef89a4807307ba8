"""Compare the memory gate's prediction with the measured peak of each stage, and recover from a real out-of-memory.

    python scripts/device/memory.py [--small] [--seconds=100]

Each stage runs in a process of its own, as a process reports only its highest peak. The prediction must be at least the
measured peak and at most 1.1 times it. A step has four microbatches, as more take time and no memory.

For the out-of-memory, JAX may take 2.8 GB of a GPU, and `config.memory_gb` hides that from the gate: the first step
fails on the device, and the run must go on with half the microbatch. Other devices are asked for a petabyte instead.
"""

import dataclasses
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

from lowrank_jax import cli
from lowrank_jax.config import RunConfig
from lowrank_jax.machine import faults
from lowrank_jax.training import forecast, verify_resume
from lowrank_jax.training.plan import Stage, stages_of
from scripts.bench import harness
from scripts.device import rows

CONFIGS, SMALL = ("custom.py", "preset.py:1b"), ("quickstart.py",)
LARGEST = 1.1  # the prediction over the measured peak
STEPS, MICROBATCHES = 2, 4
GREEDY = """model.d=512 model.layers=4 model.heads=8 model.rank=64 tokenizer.vocab_size=512 pretrain.steps=6
pretrain.tokens_per_step=32768 pretrain.microbatch_tokens=0 pretrain.block=512 pretrain.auto_grow=False
pretrain.eval_fraction=0 sft.steps=0 memory_gb=10000 every.save=3"""
POOL = 2.8e9  # bytes for JAX; by an H100's compiler a step of GREEDY takes 3.9 GB, and half of it 2.0 GB
TINY = "pretrain.steps=12 pretrain.auto_grow=False pretrain.eval_fraction=0 sft.steps=0 every.save=3"


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        harness.main(None, child)
        return
    p = rows.start(__doc__)
    for number, (name, stage) in enumerate(in_order(SMALL if p.small else CONFIGS)):
        run = lambda name=name, stage=stage: judge(harness.in_a_process(__file__, name, stage.name))
        p.measure("peak of a stage", run, config=name, stage=stage.name)
        if number == 0:
            p.measure("out of memory and recovered", lambda: recover(p.small))


def config_of(name: str) -> RunConfig:
    return forecast.resolve_vocab(cli.read_config([f"--config={harness.ROOT}/configs/{name}"]))


def in_order(names: tuple) -> list[tuple[str, Stage]]:
    """Return (config, stage): the longest and the shortest of each config first, as time may not do for all.

    SFT's stages have the shapes of pretraining's and are left out.
    """
    ranked = []
    for name in names:
        stages = [stage for stage in stages_of(config_of(name)) if stage.phase == "pretrain"]
        ranked += [(min(len(stages) - 1 - i, i + 0.5), name, stage) for i, stage in enumerate(stages)]
    return [(name, stage) for _, name, stage in sorted(ranked, key=lambda item: item[0])]


def judge(facts: dict) -> tuple[bool | None, dict]:
    """Return whether the prediction is at least the measured peak and at most LARGEST times it."""
    if facts["measured_bytes"] is None:
        return None, facts
    ratio = facts["predicted_bytes"] / facts["measured_bytes"]
    return 1 <= ratio <= LARGEST, facts | {"ratio": round(ratio, 4)}


def child(arguments: list[str]) -> dict:
    """Measure a stage: compile it by the memory gate, and run some steps on random tokens."""
    import jax

    from lowrank_jax.machine import sharding
    from lowrank_jax.training import memory, step
    from lowrank_jax.training.plan import unchanged

    cli.use_compilation_cache()
    name, stage_name = arguments
    config, mesh = config_of(name), sharding.one_device()
    stage = next(stage for stage in stages_of(config) if stage.name == stage_name)
    stage = dataclasses.replace(stage, batch=min(stage.batch, MICROBATCHES * stage.microbatch))
    fit = memory.fit(config, unchanged(stage), mesh, memory.limit_bytes(config, mesh))
    device, chosen = jax.local_devices()[0], dataclasses.replace(stage, microbatch=fit.fitted.microbatch)
    peak = lambda: (device.memory_stats() or {}).get("peak_bytes_in_use")
    state = step.first_state(config, step.init_params(config, mesh), 0, mesh)
    batch = jax.block_until_ready(harness.random_batch(config, chosen))
    before, process = peak(), resident_bytes()
    for _ in range(STEPS):
        state, metrics = fit.program(state, batch)
        jax.block_until_ready(metrics)
    facts = {"predicted_bytes": fit.peak_bytes, "measured_bytes": peak(), "kernel": fit.fitted.attention}
    facts |= {"microbatch": chosen.microbatch, "remat": fit.fitted.remat, "note": fit.note}
    facts |= {"limit_bytes": fit.limit_bytes, "compile_seconds": round(fit.seconds, 1), "before_bytes": before}
    if facts["measured_bytes"] is None:
        facts |= {"process_grew_by": resident_bytes() - process}
        facts["reason"] = "this device does not report its peak; the process also holds code and caches"
    elif facts["measured_bytes"] == before:
        facts |= {"measured_bytes": None, "reason": "compiling or the first weights took more than a step"}
    return facts


def resident_bytes() -> int:
    """Return the highest memory of this process so far (Linux counts it in KiB)."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def gpu_bytes() -> int | None:
    """Return the memory of the first NVIDIA GPU, without starting JAX on it."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    lines = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split()
    return int(lines[0]) * 2**20 if lines and lines[0].isdigit() else None


def recover(small: bool) -> tuple[bool, dict]:
    """Train through a real out-of-memory; return whether the run went on with a smaller microbatch and ended."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        total = None if small else gpu_bytes()
        settings = verify_resume.tiny_settings(folder, "bf16") + (GREEDY if total else TINY).split()
        pool = {"XLA_CLIENT_MEM_FRACTION": f"{POOL / total:.5f}"} if total else {faults.VARIABLE: "oom@step=5"}
        env = {k: v for k, v in os.environ.items() if k != "XLA_PYTHON_CLIENT_MEM_FRACTION"} | pool  # its old name
        command = [sys.executable, "-m", "lowrank_jax.main", "--config=configs/default.py", f"--workdir={folder}/run"]
        command += [f"--config.{setting}" for setting in settings]
        done = subprocess.run(command, cwd=harness.ROOT, env=env, capture_output=True, text=True)
        events = list(rows.events_of(f"{folder}/run", "oom"))
        ends = [event["step"] for event in rows.events_of(f"{folder}/run", "finish")]
        figures = {"how": "a small pool" if total else "a petabyte", "status": done.returncode, "finished_at": ends}
        figures["microbatch_tokens"] = [event.get("microbatch_tokens") for event in events]
        if events:
            figures["device_said"] = events[0]["reason"][:120]
        if done.returncode:
            figures["reason"] = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
        elif not events:
            figures["reason"] = "the run never ran out of memory: nothing was shown"
        return bool(done.returncode == 0 and events and len(ends) == 1), figures


if __name__ == "__main__":
    main()
