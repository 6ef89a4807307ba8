"""Low-rank ALiBi language models in JAX: one command from raw text to a chat model.

    model = lowrank_jax.train("configs/quickstart.py", "runs/quickstart")  # or lowrank_jax.load("runs/quickstart")
    model.generate("ROMEO:"), model.chat([{"role": "user", "content": "Hello"}]), model.evaluate()

Whatever cannot work raises UsageError, in one line that names the fix.
"""

TYPE_CHECKING = False  # typing's own takes 6 ms to import
if TYPE_CHECKING:
    import os

    from lowrank_jax.config import RunConfig, RunFailure, UsageError
    from lowrank_jax.training.trained import Model

    __version__: str
    Path = str | os.PathLike[str]

__all__ = ["Model", "RunConfig", "RunFailure", "UsageError", "__version__", "load", "train"]
_HOMES = {"Model": "training.trained", "RunConfig": "config", "RunFailure": "config", "UsageError": "config"}

if not TYPE_CHECKING:  # type checkers shall know every name, and no other

    def __getattr__(name: str):
        """Return an exported name at its first use: `import lowrank_jax` starts neither JAX nor Orbax."""
        if name == "__version__":
            value = _version()
        elif name in _HOMES:
            import importlib

            value = getattr(importlib.import_module(f"lowrank_jax.{_HOMES[name]}"), name)
        else:
            raise AttributeError(f"module 'lowrank_jax' has no attribute {name!r}")
        return globals().setdefault(name, value)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def train(config: "RunConfig | dict | Path", workdir: "Path", changes: dict | None = None) -> "Model":
    """Train every phase of a config in `workdir`, or what remains of the run in it, and return the trained model.

    `config` is a ConfigDict, nested dicts with every key, a RunConfig, or what `--config` takes, such as
    "configs/quickstart.py". `changes` sets keys of it: {"pretrain.steps": 200, "sft.steps": 0}. Ctrl-C saves, and then
    raises KeyboardInterrupt: the same call resumes. Raises UsageError for what cannot work, and RunFailure for a run
    that must stop.
    """
    from lowrank_jax import main

    main.train(config, folder := _folder(workdir, "workdir"), {} if changes is None else changes)
    return load(folder)


def load(folder: "Path", weights: str = "auto", step: int | None = None, phase: str = "") -> "Model":
    """Open a run's trained model, with `.generate`, `.chat`, `.stream`, `.evaluate`, `.logits`, `.params`, `.config`.

    `weights` is the format that generation keeps weights in: fp32, bf16, fp16, int8, int4, or auto as the run computed.
    The checkpoint is the newest one, that of a `step`, or the last one of a `phase`: "pretrain" or "sft".
    """
    from lowrank_jax.training.trained import Model, open_run

    folder = _folder(folder, "folder")
    return Model(open_run(folder, None, "folder", step, phase), folder, weights)


def _folder(path: "Path", name: str) -> str:
    import os

    from lowrank_jax.config import UsageError, local_path, shown

    if not isinstance(path, str | os.PathLike):
        raise UsageError(f"{name}={shown(path)} must be a path")
    return local_path(path, name)


def _version() -> str:
    """Return the version in pyproject.toml beside the package, or else of the installed distribution."""
    import pathlib
    import tomllib

    try:
        text = (pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
        project = tomllib.loads(text)["project"]
        if project["name"] == "lowrank_jax":
            return project["version"]
    except (OSError, KeyError, ValueError):  # installed, in a folder of many packages
        pass
    from importlib import metadata

    try:
        return metadata.version("lowrank_jax")
    except metadata.PackageNotFoundError:  # a copy of the package alone
        return "0+unknown"


def _refuse_others(name: str) -> None:
    """Exit for a `python -m NAME` that is no program: Python would import it, do nothing, and report success."""
    import os

    path = os.path.join(__path__[0], *name.split(".")[1:])
    for file in filter(os.path.isfile, (f"{path}.py", f"{path}/__main__.py")):
        with open(file, encoding="utf-8") as f:
            if '__name__ == "__main__"' in f.read():
                return
    from lowrank_jax import __main__

    __main__.refuse(name)


def _run_by_name() -> str:
    """Return the module of this package that `python -m` is about to run, or an empty text."""
    import sys

    if sys.argv[:1] != ["-m"]:  # so it is while Python looks for the module (documented at sys.argv)
        return ""
    _, package, module = sys.orig_argv[-len(sys.argv)].rpartition("lowrank_jax.")
    return package + module


if _name := _run_by_name():
    _refuse_others(_name)
