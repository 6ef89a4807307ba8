"""A run made of exported weights, for training to go on from: `init_from` takes it, and every other command opens it.

    python -m lowrank_jax.importer --from=exports/hf --workdir=runs/again
    python -m lowrank_jax.main --config=configs/quickstart.py --config.init_from=runs/again --workdir=runs/more

`--from` is a folder that `lowrank_jax.export` made with --format=hf or torch, also as transformers has saved it anew,
or a state dict (.safetensors, .pt, .bin) with such a config.json beside it.
"""

import dataclasses
import json
import os

import jax
import numpy as np

from lowrank_jax.config import RunConfig, UsageError
from lowrank_jax.data import tokenizer
from lowrank_jax.data.tokenizer import Tokenizer
from lowrank_jax.export import weights
from lowrank_jax.export.folder import ORIGIN, TOKENIZER
from lowrank_jax.machine import sharding
from lowrank_jax.training import checkpoint, run_folder, step
from lowrank_jax.training.progress import Progress
from lowrank_jax.training.trained import Trained

PICKLED = (".pt", ".pth", ".bin")


def open_export(source: str, tokenizer_path: str = "", given: RunConfig | None = None) -> Trained:
    """Read an export's folder or a file of weights into host arrays; `given` is the config to train with.

    `progress` tells the step and the tokens of its training, 0 where that is not known. Raises UsageError for what is
    not there, damaged, or of another architecture.
    """
    if not os.path.exists(source):
        raise UsageError(f"--from={source}: no such file or folder")
    folder = source if os.path.isdir(source) else os.path.dirname(os.path.abspath(source))
    values, origin = _read_json(folder, "config.json"), _read_json(folder, ORIGIN, {"config": {}, "progress": {}})
    keys = weights.model_keys(values)
    tok = tokenizer.load(tokenizer_path or _tokenizer_in(folder))
    if tok.vocab_size != keys["vocab"]:
        raise UsageError(f"the weights are of {keys['vocab']} pieces, and the tokenizer has {tok.vocab_size}")
    config = _config(given, origin["config"], values, keys)
    params = weights.params(config.model, _arrays(source))
    known = {f.name: origin["progress"][f.name] for f in dataclasses.fields(Progress) if f.name in origin["progress"]}
    return Trained(config, tok, params, Progress(**known))


def write(config: RunConfig, tok: Tokenizer, params: dict, facts: dict, folder: str) -> str:
    """Makes the run's folder, with the parameters as a checkpoint of step 0; returns their SHA-256."""
    place = sharding.whole(sharding.one_device())
    state = step.first_state(config, jax.tree.map(lambda w: sharding.put(w, place), params))
    os.makedirs(folder)
    with checkpoint.Checkpoints(folder, config.every.keep) as saved:
        saved.save(state, Progress())
    tok.save(run_folder.tokenizer_folder(folder))
    run_folder.write_config(folder, config)
    sha256 = checkpoint.tree_sha256(state.params)
    run_folder.log_event(folder, "import", 0, **facts, params_sha256=sha256)
    return sha256


def _config(given: RunConfig | None, origin: dict, values: dict, keys: dict) -> RunConfig:
    """The run's config: of `--config`, or of the run that was exported; with the sizes in config.json, `values`."""
    if not given and not origin:
        raise UsageError(f"there is no {ORIGIN} beside the weights; say with --config=FILE how it is to be trained")
    base = (given or RunConfig.from_dict(origin)).to_dict()
    base["model"] |= {"vocab": keys["vocab"]}
    as_it_is = RunConfig.from_dict(base)
    if all(values.get(key, True) == size for key, size in weights.sizes(as_it_is.model).items()):
        return as_it_is  # it may say the same in other words
    return RunConfig.from_dict(base | {"model": base["model"] | keys})


def _arrays(path: str) -> dict[str, np.ndarray]:
    """Arrays by name of a file, or of all files of weights in a folder; raises UsageError where there are none."""
    files = [path]
    if os.path.isdir(path):
        names = sorted(os.listdir(path))
        files = [name for name in names if name.endswith(".safetensors")]
        files = files or [name for name in names if name.endswith(PICKLED)]
        if not files:
            raise UsageError(f"--from={path} has no weights (model.safetensors)")
        files = [os.path.join(path, name) for name in files]
    found = {}
    for file in files:
        if not file.endswith((".safetensors", *PICKLED)):
            raise UsageError(f"--from={file} must be a folder, or end in .safetensors, {', '.join(PICKLED)}")
        found |= _pickled(file) if file.endswith(PICKLED) else _safetensors(file)
    return found


def _safetensors(path: str) -> dict[str, np.ndarray]:
    try:
        from safetensors.flax import load_file  # numpy has no bfloat16
    except ImportError:
        raise UsageError("--from needs the package safetensors: pip install safetensors") from None
    try:
        return {name: np.asarray(w, np.float32) for name, w in load_file(path).items()}
    except Exception as e:  # of a header or a cut file; the package has a class of its own for each
        raise UsageError(f"{path} is damaged: {' '.join(str(e).split())[:200]}") from None


def _pickled(path: str) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise UsageError(f"--from={path} needs PyTorch: pip install torch") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # no code in it is run
    except OSError:
        raise
    except Exception as e:  # of zip files, pickles and what is not allowed in them
        raise UsageError(f"{path} is no state dict: {' '.join(str(e).split())[:200]}") from None
    if not isinstance(state, dict) or not all(isinstance(w, torch.Tensor) for w in state.values()):
        raise UsageError(f"{path} is no state dict: names and tensors are expected, as of net.state_dict()")
    return {name: w.float().numpy() for name, w in state.items()}


def _tokenizer_in(folder: str) -> str:
    """The run's own tokenizer, which the export has along; otherwise the tokenizer.json."""
    own = os.path.join(folder, TOKENIZER)
    if not os.path.isdir(own) and not os.path.isfile(os.path.join(folder, tokenizer.JSON_FILE)):
        raise UsageError(f"{folder} has no tokenizer; name one with --tokenizer=PATH")
    return own if os.path.isdir(own) else folder


def _read_json(folder: str, name: str, otherwise: dict | None = None) -> dict:
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        if otherwise is None:
            raise UsageError(f"{folder} has no {name}, which says what the weights are of")
        return otherwise
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
        if not isinstance(found, dict) or any(not isinstance(found.get(key), dict) for key in otherwise or ()):
            raise ValueError("not what an export has there")
    except ValueError as e:
        raise UsageError(f"{path} is damaged: {e}") from None
    return found
