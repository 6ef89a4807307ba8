"""The shipped configs, such as `lowrank_jax.configs.default`: the files of the top-level `configs/`.

A wheel has those files in this folder.
"""

import pathlib

if not (pathlib.Path(__file__).parent / "default.py").is_file():
    __path__ = [str(pathlib.Path(__file__).parents[2] / "configs")]
