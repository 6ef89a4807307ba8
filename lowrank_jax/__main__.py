"""Run any command of the package: `python -m lowrank_jax COMMAND ...`; `COMMAND --help` lists its flags."""

import ast
import difflib
import importlib
import pathlib
import sys

from lowrank_jax.machine import startup

COMMANDS = {  # the file below lowrank_jax/ and its function that takes the arguments
    "train": ("main", "command"),
    "plan": ("plan", "command"),
    "evaluate": ("evaluate", "command"),
    "generate": ("generate", "command"),
    "serve": ("serve", "command"),
    "report": ("report", "command"),
    "compress": ("compress", "command"),
    "import": ("importer", "command"),
    "export": ("export.__main__", "command"),
    "tokenize": ("data.__main__", "tokenize"),
    "learn_tokenizer": ("data.__main__", "learn_tokenizer"),
    "verify_resume": ("training.__main__", "command"),
    "launch_local": ("machine.__main__", "command"),
}


def summary(module: str, function: str) -> str:
    """Return the first line of a command's docstring, or of its file's, without importing it and with it JAX."""
    path = pathlib.Path(__file__).parent / f"{module.replace('.', '/')}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    texts = (ast.get_docstring(node) for node in [*functions, tree])
    return next(filter(None, texts), "").split("\n")[0]


def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name not in COMMANDS:
        from lowrank_jax.machine import console  # imports tqdm, which `train` need not import before it restarts

        startup.open_streams()
        console.prepare_streams()
        if name in ("-h", "--help"):
            lines = [f"  {name:16} {summary(*COMMANDS[name])}" for name in COMMANDS]
            return console.show("\n".join([__doc__, *lines]), needed=False)
        near = difflib.get_close_matches(name, COMMANDS) or COMMANDS
        console.say(f"error: unknown command {name!r}; use {', '.join(near)}")
        sys.exit(2)
    if name == "train":
        startup.prepare()  # before JAX is imported
    module, function = COMMANDS[name]
    command = getattr(importlib.import_module(f"lowrank_jax.{module}"), function)
    cli = importlib.import_module("lowrank_jax.cli")  # imports JAX, as the command does
    if name == "train":
        startup.spare_imports()
    sys.argv = [f"lowrank_jax {name}", *arguments]
    cli.main(command)


if __name__ == "__main__":
    main()
