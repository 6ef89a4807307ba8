"""Reading data needs no JAX: a tokenising process would pay a second for it."""

import subprocess
import sys

import pytest

MODULES = ("stream", "pretokenize", "sources", "tokenizer", "chat", "packing", "__main__")


@pytest.mark.parametrize("module", MODULES)
def test_importing_the_data_room_does_not_import_jax(module):
    code = f"import sys, lowrank_jax.data.{module}; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
