"""Low-rank ALiBi language models in JAX: one command from raw text to a chat model."""

import os
import sys


def _refuse(name: str) -> None:
    """Exit for a `python -m NAME` that is no program: Python would import it, do nothing, and report success."""
    path = os.path.join(__path__[0], *name.split(".")[1:])
    for file in filter(os.path.isfile, (f"{path}.py", f"{path}/__main__.py")):
        with open(file, encoding="utf-8") as f:
            if '__name__ == "__main__"' in f.read():
                return
    from lowrank_jax import __main__

    __main__.refuse(name)


if sys.argv[:1] == ["-m"]:  # so long as Python looks for the module that it will run (documented at sys.argv)
    _, _package, _module = sys.orig_argv[-len(sys.argv)].rpartition("lowrank_jax.")
    if _package:
        _refuse(_package + _module)


def load(folder: str, weights: str = "auto"):
    """Open a run's trained model, with `.params, .config, .tokenizer, .logits(tokens), .generate(...)`.

    `weights` is the format that generation keeps weights in: fp32, bf16, fp16, int8, int4, or auto as the run computed.
    """
    from lowrank_jax.config import local_path
    from lowrank_jax.inference.session import Model  # imported late: `import lowrank_jax` starts neither JAX nor Orbax
    from lowrank_jax.training.trained import open_run

    run = open_run(local_path(folder, "folder"))
    return Model(run.config, run.tokenizer, run.params, weights)
