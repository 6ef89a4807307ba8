"""Reading of exported weights, and writing of a run with them."""

import dataclasses
import json
import os

import jax
import numpy as np

from lowrank_jax.config import RunConfig, UsageError
from lowrank_jax.data import tokenizer
from lowrank_jax.data.tokenizer import Tokenizer
from lowrank_jax.export import verify, weights
from lowrank_jax.export.folder import ORIGIN, TOKENIZER
from lowrank_jax.machine import sharding
from lowrank_jax.training import checkpoint, run_folder, step
from lowrank_jax.training.plan import Progress
from lowrank_jax.training.trained import Trained

PICKLED = (".pt", ".pth", ".bin")


def open_export(source: str, tokenizer_path: str = "", base: RunConfig | None = None) -> Trained:
    """Read an export's folder or a file of weights into host arrays; `base` is the config to train with.

    `progress` tells the step and the tokens of its training, 0 where they are unknown. Raises UsageError for a source
    that is missing, damaged, or of another architecture.
    """
    if not os.path.exists(source):
        raise UsageError(f"--from={source}: no such file or folder")
    folder = source if os.path.isdir(source) else os.path.dirname(os.path.abspath(source))
    values, origin = _read_json(folder, "config.json"), _read_json(folder, ORIGIN, {"config": {}, "progress": {}})
    keys = weights.model_keys(values)
    own = os.path.join(folder, TOKENIZER)
    if not (tokenizer_path or os.path.isdir(own) or os.path.isfile(os.path.join(folder, tokenizer.JSON_FILE))):
        raise UsageError(f"{folder} has no tokenizer; name one with --tokenizer=PATH")
    tok = tokenizer.load(tokenizer_path or (own if os.path.isdir(own) else folder))
    if tok.vocab_size != keys["vocab"]:
        raise UsageError(f"the weights have {keys['vocab']} pieces, but the tokenizer has {tok.vocab_size}")
    config = _config(base, origin["config"], values, keys)
    params = weights.params(config.model, _arrays(source))
    known = {f.name: origin["progress"][f.name] for f in dataclasses.fields(Progress) if f.name in origin["progress"]}
    return Trained(config, tok, params, Progress(**known))


def write(config: RunConfig, tok: Tokenizer, params: dict, origin: Progress, folder: str) -> str:
    """Create a run's folder with parameters that `origin` tells of, as a checkpoint of step 0; return their SHA-256."""
    place = sharding.whole(sharding.one_device())
    state = step.first_state(config, jax.tree.map(lambda w: sharding.put(w, place), params))
    os.makedirs(folder)
    with checkpoint.Checkpoints(folder, config.every.keep) as checkpoints:
        checkpoints.save(state, Progress())
    tok.save(run_folder.tokenizer_folder(folder))
    run_folder.write_config(folder, config, tok.files_sha256)
    sha256 = checkpoint.tree_sha256(state.params)
    facts = {"trained_step": origin.step, "trained_tokens": origin.tokens, "params_sha256": sha256}
    run_folder.log_event(folder, "import", 0, **facts)
    return sha256


def _config(base: RunConfig | None, origin: dict, values: dict, keys: dict) -> RunConfig:
    """Return `base`, or the exported run's config, with the sizes in config.json, `values`."""
    if not base and not origin:
        raise UsageError(f"the weights have no {ORIGIN} beside them; name the settings to train with: --config=FILE")
    settings = (base or RunConfig.from_dict(origin)).to_dict()
    settings["model"] |= {"vocab": keys["vocab"]}
    config = RunConfig.from_dict(settings)
    if all(values.get(key, True) == size for key, size in weights.sizes(config.model).items()):
        return config  # the same sizes, perhaps in other words: `mlp` 0 or its default width
    return RunConfig.from_dict(settings | {"model": settings["model"] | keys})


def _arrays(path: str) -> dict[str, np.ndarray]:
    """Return the arrays of a file, or of all weight files in a folder, by name; raises UsageError without any."""
    files = [path]
    if os.path.isdir(path):
        entries = [os.path.join(path, name) for name in sorted(os.listdir(path))]
        files = [f for f in entries if f.endswith(".safetensors")] or [f for f in entries if f.endswith(PICKLED)]
    if not files:
        raise UsageError(f"--from={path} has no weights (model.safetensors)")
    arrays = {}
    for file in files:
        if not file.endswith((".safetensors", *PICKLED)):
            raise UsageError(f"--from={file} must be a folder, or end in .safetensors, {', '.join(PICKLED)}")
        arrays |= _pickled(file) if file.endswith(PICKLED) else _safetensors(file)
    return arrays


def _safetensors(path: str) -> dict[str, np.ndarray]:
    verify.need("safetensors")
    from safetensors.flax import load_file  # numpy has no bfloat16

    try:
        return {name: np.asarray(w, np.float32) for name, w in load_file(path).items()}
    except Exception as e:  # the package has a class for each fault of the header and the file's length
        raise UsageError(f"{path} is damaged: {' '.join(str(e).split())[:200]}") from None


def _pickled(path: str) -> dict[str, np.ndarray]:
    verify.need("torch")
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # runs no code from the file
    except OSError:
        raise
    except Exception as e:  # faults of zip files and pickles, and forbidden classes
        raise UsageError(f"{path} is no state dict: {' '.join(str(e).split())[:200]}") from None
    if not isinstance(state, dict) or not all(isinstance(w, torch.Tensor) for w in state.values()):
        raise UsageError(f"{path} is no state dict; save one with torch.save(net.state_dict(), path)")
    return {name: w.float().numpy() for name, w in state.items()}


def _read_json(folder: str, name: str, default: dict | None = None) -> dict:
    """Return the contents of a JSON file, which must have the groups of `default`; that is for a missing file."""
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        if default is None:
            raise UsageError(f"{folder} has no {name}, which describes the weights")
        return default
    try:
        with open(path, encoding="utf-8") as f:
            values = json.load(f)
        if not isinstance(values, dict) or any(not isinstance(values.get(key), dict) for key in default or ()):
            raise ValueError("expected the groups that an export writes")
    except ValueError as e:
        raise UsageError(f"{path} is damaged: {e}") from None
    return values
