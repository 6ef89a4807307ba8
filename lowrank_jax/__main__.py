"""Run any command of the package: `python -m lowrank_jax COMMAND ...`, or `lowrank COMMAND ...` where it is installed.

`COMMAND --help` lists its flags.
"""

import ast
import difflib
import importlib
import os
import pathlib
import sys

from lowrank_jax.machine import startup

COMMANDS = {  # the file below lowrank_jax/ and its function that takes the arguments
    "train": ("main", "command"),
    "plan": ("plan", "command"),
    "config": ("cli", "list_keys"),
    "evaluate": ("evaluate", "command"),
    "generate": ("generate", "command"),
    "chat": ("generate", "chat"),
    "serve": ("serve", "command"),
    "report": ("report", "command"),
    "compress": ("compress", "command"),
    "import": ("importer", "command"),
    "export": ("export.__main__", "command"),
    "tokenize": ("data.__main__", "tokenize"),
    "learn-tokenizer": ("data.__main__", "learn_tokenizer"),
    "verify-resume": ("training.__main__", "command"),
    "launch-local": ("machine.__main__", "command"),
}


def summary(module: str, function: str) -> str:
    """Return the first line of a command's docstring, or of its file's, without importing it and with it JAX."""
    path = pathlib.Path(__file__).parent / f"{module.replace('.', '/')}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    texts = (ast.get_docstring(node) for node in [*functions, tree])
    return next(filter(None, texts), "").split("\n")[0]


def unknown(name: str) -> str:
    """Return the error for a name that is no command, or for a module that is none, such as lowrank_jax.trainer."""
    commands = {command: command for command in COMMANDS} | {"main": "train", "importer": "import"}
    is_module = name.startswith("lowrank_jax.")
    for part in reversed(name.removeprefix("lowrank_jax.").split(".")):
        if near := difflib.get_close_matches(part.replace("_", "-"), commands):
            break
    near = dict.fromkeys(commands[word] for word in near or COMMANDS)
    if is_module:
        return f"error: {name} is no command; use python -m lowrank_jax {' | '.join(near)}"
    return f"error: unknown command {name!r}; use {', '.join(near)}"


def refuse(name: str) -> None:
    """Say that a name is no command, and exit."""
    _console().say(unknown(name))
    sys.exit(2)


def _console():
    startup.open_streams()
    from lowrank_jax.machine import console  # imports tqdm, which `train` need not import before it restarts

    console.prepare_streams()
    return console


def main() -> None:
    word, *arguments = sys.argv[1:] or ["--help"]
    name = word.replace("_", "-")
    if name in ("-h", "--help", "help"):
        lines = [f"  {name:16} {summary(*COMMANDS[name])}" for name in COMMANDS]
        return _console().show("\n".join([__doc__, *lines]), needed=False)
    if name not in COMMANDS:
        refuse(word)
    if name == "train":
        startup.prepare()  # before JAX is imported
    module, function = COMMANDS[name]
    command = getattr(importlib.import_module(f"lowrank_jax.{module}"), function)
    cli = importlib.import_module("lowrank_jax.cli")  # imports JAX, as the command does
    if name == "train":
        startup.spare_imports()
    program = "lowrank" if os.path.basename(sys.argv[0]) == "lowrank" else "lowrank_jax"
    sys.argv = [f"{program} {name}", *arguments]
    cli.main(command)


if __name__ == "__main__":
    main()
