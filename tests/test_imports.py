"""Importing a part of the package loads nothing that the part does not need."""

import json
import subprocess
import sys

import pytest

# Each step and the modules that must not be loaded after it. One fresh process runs all steps, smallest first, because
# modules stay loaded.
STEPS = {
    "import lowrank_jax": ["jax", "orbax", "flax", "numpy", "ml_collections", "absl"],
    "import lowrank_jax.data.sources, lowrank_jax.data.tokenizer": ["jax", "flax", "orbax", "grain"],
    "import lowrank_jax.training.trained": ["lowrank_jax.cli", "ml_collections", "lowrank_jax.inference.server"],
    "import lowrank_jax.training.loop": ["lowrank_jax.inference.server", "starlette", "uvicorn", "lowrank_jax.cli"],
}


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """Return, for each step, the names of all modules that are loaded after it."""
    lines = [f"{step}; print(json.dumps([{step!r}, sorted(sys.modules)]))" for step in STEPS]
    program = "\n".join(["import json, sys", *lines])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize("step", STEPS)
def test_an_import_does_not_load(step, loaded):
    assert not set(STEPS[step]) & set(loaded[step])
