"""The notebooks: stored without outputs, and run cell by cell, as Python that needs no Jupyter."""

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest
import runs

NOTEBOOKS = sorted((runs.ROOT / "notebooks").glob("*.ipynb"))
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: pathlib.Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]


@EACH
def test_a_notebook_is_stored_without_outputs_and_is_plain_python(path):
    for cell in cells(path):
        assert not cell["outputs"] and cell["execution_count"] is None
        ast.parse("".join(cell["source"]))  # no magics


@pytest.mark.study
@EACH
def test_a_notebook_runs_in_its_own_folder(path, tmp_path):
    """All cells run in one namespace, in a fresh process; what the last cells compute is printed."""
    shown = {"train_and_chat": "right", "low_rank_against_dense": "[*loss.values(), *cache.values()]"}[path.stem]
    program = "\n".join("".join(cell["source"]) for cell in cells(path)) + f"\nprint(json.dumps({shown}))"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": runs.CACHE,
        "MPLBACKEND": "agg",
        "TMPDIR": str(tmp_path),
    }
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=path.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    values = runs.last_json(done.stdout)
    if path.stem == "train_and_chat":
        assert min(values.values()) >= 0.75, values  # of the answers are right, also in a wording that it has not read
    else:
        dense, low, dense_cache, low_cache = values
        assert dense < 3.5 and low < 3.5 and low_cache * 8 == dense_cache
