"""Every mutation still applies: its text occurs once, and the tests that it names exist."""

import ast
import functools
import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("mutate", ROOT / "scripts" / "studies" / "mutate.py")
mutate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutate)
MUTATIONS = mutate.read_mutations()


@functools.cache
def names_in(file: str) -> set[str]:
    return {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(node, "name")}


def test_each_has_a_name_of_its_own_and_there_are_60():
    assert len({m["name"] for m in MUTATIONS}) == len(MUTATIONS) >= 60


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m['area']}: {m['name']}")
def test_a_mutation_changes_the_code_and_names_tests(mutation):
    original = (ROOT / mutation["file"]).read_text()
    changed = mutate.mutated(mutation, original)
    if mutation["file"].endswith(".py"):
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(original))
    assert changed != original and mutation["tests"]
    for test in mutation["tests"]:
        file, *names = test.split("::")
        assert {name.split("[")[0] for name in names} <= names_in(file), test
