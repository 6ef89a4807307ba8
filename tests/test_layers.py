"""A module imports only what stands below it in the house."""

import ast
import functools
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "lowrank_jax"

# From the top down; modules on one line do not import each other. `data` is a floor of its own.
FLOORS = [
    ["compress"],
    ["foreign"],
    ["main", "importer"],
    ["train"],
    ["phase", "report"],
    ["export.__main__"],
    ["export.hf", "export.torch", "export.onnx", "export.gguf"],
    ["export.folder"],
    ["export.hf_tokenizer", "export.llama", "export.fidelity"],
    [
        "export.modeling_lowrank",
        "export.lowrank",
        "export.weights",
        "export.mix",
        "export.pieces",
        "export.template",
        "export.verify",
    ],
    ["evaluate", "generate", "serve"],
    ["routes"],
    ["scheduler", "answers"],
    ["api"],
    ["engine"],
    ["plan"],
    ["programs", "meter", "trained", "warmstart"],
    ["fit"],
    ["step"],
    ["checkpoint"],
    ["native"],
    ["decoder", "sampling", "writer"],
    ["data.stream"],
    ["data.packing"],
    ["data.chat", "data.reader"],
    ["data.sources"],
    ["data.tables"],
    ["data.files"],
    ["data.tokenizer", "data.builtin", "data.records"],
    ["model"],
    ["attention", "quantize"],
    ["panels", "compiled"],
    ["loss", "optim", "guard", "factorize"],
    ["sharding"],
    ["stages"],
    ["roofline"],
    ["costs", "precision", "devices", "track", "hlo"],
    ["workdir", "faults", "cli", "interrupt"],
    ["processes"],
    ["config"],
    ["startup"],
]
FLOOR_OF = {module: i for i, floor in enumerate(FLOORS) for module in floor}
# Packages that one file alone may import.
KEEPERS = {"orbax": "checkpoint", "flax": "model", "ml_collections": "cli", "sentencepiece": "data.tokenizer"}
KEEPERS |= {
    "tokenizers": "data.tokenizer",
    "pyarrow": "data.tables",
    "tensorboardX": "track",
    "wandb": "track",
    "mlflow": "track",
    "qwix": "quantize",
    "gguf": "export.gguf",
    "onnx": "export.onnx",
    "onnxruntime": "export.onnx",
    "xllamacpp": "export.llama",
    "starlette": "routes",
    "prometheus_client": "routes",
    "uvicorn": "serve",
}


@functools.cache
def modules() -> dict[str, ast.Module]:
    files = [f for f in PACKAGE.rglob("*.py") if f.name != "__init__.py"]
    return {".".join(f.relative_to(PACKAGE).with_suffix("").parts): ast.parse(f.read_text()) for f in files}


def imports(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_a_floor():
    assert set(modules()) == set(FLOOR_OF)


@pytest.mark.parametrize("module", sorted(FLOOR_OF))
def test_imports_go_down(module):
    for name in imports(modules()[module]):
        target = name.removeprefix("lowrank_jax.")
        if name.startswith("lowrank_jax.") and target in FLOOR_OF:
            assert FLOOR_OF[target] > FLOOR_OF[module], f"{module} imports {target}, which is not below it"


@pytest.mark.parametrize("package", sorted(KEEPERS))
def test_a_guarded_package_is_imported_in_one_file(package):
    users = {m for m, tree in modules().items() if any(n.split(".")[0] == package for n in imports(tree))}
    assert users == {KEEPERS[package]}
