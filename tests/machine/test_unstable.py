"""Parts of JAX that a new version may move: one line names the part and the version, only for who needs the part."""

import ast
import contextlib
import importlib.metadata
import pathlib
import pkgutil
import re
import sys
import types

import jax
import numpy as np
import pytest
from conftest import run_config
from packaging.version import Version

from lowrank_jax import main
from lowrank_jax.config import UsageError
from lowrank_jax.machine import agreement, devices, processes, sharding, unstable
from lowrank_jax.model import attention
from lowrank_jax.training.plan import stages_of

ROOT = pathlib.Path(__file__).parents[2]
USED = [(name, attribute) for name, (attributes, _) in unstable.PARTS.items() for attribute in attributes.split()]
UNSTABLE = re.compile(r"jax\.(_src|experimental|interpreters|extend)\b|jaxlib\b|(flax|optax|orbax|qwix|grain)\..*\b_\w")


def gather_from_two(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    agreement.gather(1)


def choose_cache(monkeypatch):
    with main._compilation_cache():
        pass


def place_on_tpus(monkeypatch):
    tpus = [types.SimpleNamespace(platform="tpu")] * 2
    sharding.make_mesh(config := run_config(), stages_of(config), tpus)


# Who uses each part.
CALLS = {
    "jax._src.clusters.ClusterEnv": lambda monkeypatch: processes._detect("", 0, -1, 1),
    "jax._src.cudnn.fused_attention_stablehlo": lambda monkeypatch: devices._assume_cudnn(90),
    "jax.experimental.compilation_cache.compilation_cache": choose_cache,
    "jax.experimental.mesh_utils": place_on_tpus,
    "jax.experimental.multihost_utils": gather_from_two,
    "jax.experimental.pallas.ops.tpu.splash_attention": lambda monkeypatch: attention._splash(
        *np.zeros((3, 1, 128, 2, 8), np.float32), attention.alibi_slopes(2), None
    ),
    "jax.experimental.topologies": lambda monkeypatch: devices._describe({}, ""),
}


@pytest.mark.parametrize("name, attribute", [*USED, *((name, None) for name in unstable.PARTS)])
def test_a_part_that_has_moved_is_one_line_that_names_it_and_the_version(name, attribute, monkeypatch):
    if attribute:
        monkeypatch.delattr(pkgutil.resolve_name(name), attribute)
    else:
        package, last = name.rsplit(".", 1)
        monkeypatch.delattr(pkgutil.resolve_name(package), last, raising=False)
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError) as e:
        CALLS[name](monkeypatch)
    assert f"JAX {jax.__version__} " in str(e.value) and "\n" not in str(e.value)
    if "clusters" not in name:  # there the advice is to name the processes
        missing = f"{name}.{attribute}" if attribute else name
        assert f"has no {missing}, which is needed for " in str(e.value) and "install one from 0.10.2" in str(e.value)


def test_an_option_that_has_moved_is_one_line():
    with pytest.raises(UsageError, match=f"JAX {jax.__version__} has no option jax_no_such_option, which is needed"):
        unstable.configure("jax_no_such_option", False)


def test_all_parts_are_there():
    assert all(unstable.part(name) for name in unstable.PARTS) and CALLS.keys() == unstable.PARTS.keys()


def test_no_other_file_imports_what_may_move():
    files = [*(ROOT / "lowrank_jax").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            assert not [n for n in names if UNSTABLE.match(module + n)], f"{path}:{getattr(node, 'lineno', 0)}"
            dotted = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            assert not UNSTABLE.match(dotted), f"{path}:{getattr(node, 'lineno', 0)}"


def test_the_versions_that_are_tested_are_those_of_the_pins():
    pins = re.findall(r"^jax==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.M)
    assert sorted(pins, key=Version) == list(unstable.TESTED)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        assert Version(unstable.TESTED[0]) <= Version(importlib.metadata.version("jax"))
