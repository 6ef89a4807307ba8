"""Kill a short training in the middle, resume it, and compare it with an uninterrupted one by their hashes.

    python scripts/device/resume.py [--small] [--seconds=60]

The runs grow from 64 to 256 tokens and end with SFT, on made-up text. XLA_FLAGS asks for deterministic kernels, without
which a GPU's sums differ from run to run.
"""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

from lowrank_jax.machine import faults
from lowrank_jax.training import verify_resume
from scripts.bench import harness
from scripts.device import rows

FLAG = "--xla_gpu_deterministic_ops=true"
SIZES = """model.d=256 model.layers=2 model.heads=4 model.rank=32 pretrain.tokens_per_step=4096
pretrain.microbatch_tokens=2048 pretrain.block=64 pretrain.grow_plan=64,256 pretrain.steps=50
pretrain.grow_every_steps=25 sft.tokens_per_step=4096 sft.block=256 sft.steps=20"""
SMALL = "pretrain.grow_plan=16,64 pretrain.steps=40 pretrain.grow_every_steps=20 sft.steps=10"
NO_EVALUATION = "pretrain.eval_fraction=0 sft.eval_fraction=0"


def main() -> None:
    p = rows.start(__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        settings = (
            verify_resume.tiny_settings(folder, "bf16") + (SMALL if p.small else SIZES).split() + NO_EVALUATION.split()
        )
        p.measure("a killed run ends like an uninterrupted one", lambda: compare(folder, settings))


def compare(folder: pathlib.Path, settings: list[str]) -> tuple[bool, dict]:
    """Return whether both runs end with the same hashes and metrics."""
    train(folder, "alone", settings)
    train(folder, "killed", settings, "kill@save=2")  # after the 34th step; the first checkpoint is whole by then
    train(folder, "killed", settings)
    difference = verify_resume.difference(folder / "alone", folder / "killed")
    finish = verify_resume.events_of(folder / "alone")[-1]
    hashes = {key: finish[key][:16] for key in ("data_sha256", "params_sha256")}
    restored = [event["step"] for event in rows.events_of(folder / "killed", "restore")]
    figures = {"killed_at": 34, "resumed_at": restored, "steps": finish["step"], "hashes": hashes}
    reason = difference[:300] or ("" if len(restored) == 1 else "the killed run did not resume once")
    return not reason, figures | ({"reason": reason} if reason else {})


def train(folder: pathlib.Path, name: str, settings: list[str], fault: str = "") -> None:
    """Run the training command, and check that it ends as it should: killed where a fault says so."""
    flags = " ".join(filter(None, [os.environ.get("XLA_FLAGS"), FLAG]))
    env = os.environ | {"XLA_FLAGS": flags, faults.VARIABLE: fault}
    command = [sys.executable, "-m", "lowrank_jax.main", "--config=configs/default.py", f"--workdir={folder / name}"]
    command += [f"--config.{setting}" for setting in settings]
    done = subprocess.run(command, cwd=harness.ROOT, env=env, capture_output=True, text=True)
    if done.returncode != (-signal.SIGKILL if fault else 0):
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"{name} {fault} ended with status {done.returncode}: {lines[-1]}")


if __name__ == "__main__":
    main()
