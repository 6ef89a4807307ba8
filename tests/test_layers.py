"""Imports go one way through the rooms, and one file alone imports each package that has a keeper."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parents[1] / "lowrank_jax"
ROOMS = ["config", "machine", "model", "data", "inference", "training", "export"]  # above them lie the commands
STRANGERS = {("model", "data"), ("data", "model"), ("data", "jax")}
KEEPERS = {
    "orbax": "training/checkpoint",
    "flax": "model/network",
    "ml_collections": "cli",
    "qwix": "inference/quantize",
}
KEEPERS |= {"sentencepiece": "data/tokenizer", "tokenizers": "data/tokenizer", "pyarrow": "data/tables"}
KEEPERS |= {name: "training/track" for name in ("tensorboardX", "wandb", "mlflow")} | {
    "uvicorn": "inference/server/listen"
}
KEEPERS |= {"gguf": "export/gguf", "onnx": "export/onnx", "onnxruntime": "export/onnx", "xllamacpp": "export/llama"}
KEEPERS |= {name: "inference/server/routes" for name in ("starlette", "prometheus_client")} | {
    "pydantic": "inference/server/api"
}


def test_imports_go_one_way_and_packages_have_one_keeper():
    for path in PACKAGE.rglob("*.py"):
        file = str(path.relative_to(PACKAGE).with_suffix(""))
        room = "commands" if file.endswith("__main__") else file.split("/")[0]
        for node in ast.walk(ast.parse(path.read_text())):
            modules = (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", ())]
            )
            for module in modules if isinstance(node, ast.Import | ast.ImportFrom) else ():
                package, *inner = module.split(".")
                targets = [package] if package != "lowrank_jax" else inner[:1] or [alias.name for alias in node.names]
                for target in targets:
                    assert KEEPERS.get(target, file) == file, f"{file} imports {target}, which {KEEPERS[target]} keeps"
                    assert (room, target) not in STRANGERS, f"{file} imports {target}"
                    if room in ROOMS and package == "lowrank_jax" and target != "__version__":
                        assert target in ROOMS[: ROOMS.index(room) + 1], f"{file} imports {target}, which lies above it"
