"""Imports go one way through the rooms, and one file alone imports each package that has a keeper."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parents[1] / "lowrank_jax"
ROOMS = ["keys", "config", "machine", "model", "data", "inference", "training", "export"]  # above them lie the commands
APART = {("data", "model"), ("data", "jax"), ("data", "flax")}  # a room and what it does not know, though it lies below
KEEPERS = {"orbax": "training/checkpoint", "flax": "model/network", "ml_collections": "cli", "pyarrow": "data/tables"}
KEEPERS |= {"sentencepiece": "data/tokenizer", "tokenizers": "data/tokenizer", "qwix": "inference/quantize"}
KEEPERS |= {"tensorboardX": "training/track", "wandb": "training/track", "mlflow": "training/track"}
KEEPERS |= {"starlette": "inference/server/routes", "pydantic": "inference/server/api", "onnx": "export/onnx"}
KEEPERS |= {"uvicorn": "inference/server/connections", "gguf": "export/gguf", "xllamacpp": "export/gguf"}
KEEPERS |= {"onnxruntime": "export/onnx", "lm_eval": "training/harness"}


def imports(tree: ast.Module) -> set[str]:
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {f"{n.module}.{a.name}" for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names}


def test_imports_go_one_way_and_packages_have_one_keeper():
    for path in PACKAGE.rglob("*.py"):
        file = str(path.relative_to(PACKAGE).with_suffix(""))
        room = "commands" if file.endswith("__main__") else file.split("/")[0]
        for package, target, *_ in (f"{name}.".split(".") for name in imports(ast.parse(path.read_text()))):
            assert KEEPERS.get(package, file) == file and (room, package) not in APART, f"{file} imports {package}"
            if package == "lowrank_jax" and room in ROOMS:
                allowed = set(ROOMS[: ROOMS.index(room) + 1]) - {other for mine, other in APART if mine == room}
                assert target in allowed, f"{file} imports lowrank_jax.{target}, which is not below it"
