"""Reading of exported weights, and writing of a run with them."""

import os

import jax

from lowrank_jax.config import RunConfig, UsageError, shown
from lowrank_jax.data import tokenizer
from lowrank_jax.data.tokenizer import Tokenizer
from lowrank_jax.export import checked, weights
from lowrank_jax.export.folder import ORIGIN, TOKENIZER
from lowrank_jax.machine import sharding
from lowrank_jax.training import checkpoint, run_folder, step
from lowrank_jax.training.plan import Progress
from lowrank_jax.training.trained import Trained


def open_export(source: str, tokenizer_path: str = "", base: RunConfig | None = None) -> Trained:
    """Read an export's folder or a file of weights into host arrays; `base` is the config to train with.

    `progress` tells the step and the tokens of its training, 0 where they are unknown. Raises UsageError for a source
    that is missing, damaged, or of another architecture.
    """
    if not os.path.exists(source):
        raise UsageError(f"--from={source}: no such file or folder")
    folder = source if os.path.isdir(source) else os.path.dirname(os.path.abspath(source))
    values, origin = checked.read_json(os.path.join(folder, "config.json")), _origin(os.path.join(folder, ORIGIN))
    files = checked.weight_files(source)
    with checked.named(folder):
        keys = weights.model_keys(values)
        checked.refuse_larger(files, weights.count(keys), {key: values[key] for key in weights.SIZES if key in values})
    own = os.path.join(folder, TOKENIZER)
    if not (tokenizer_path or os.path.isdir(own) or os.path.isfile(os.path.join(folder, tokenizer.JSON_FILE))):
        raise UsageError(f"{folder} has no tokenizer; name one with --tokenizer=PATH")
    tok = tokenizer.load(tokenizer_path or (own if os.path.isdir(own) else folder))
    if tok.vocab_size != keys["vocab"]:
        raise UsageError(f"the weights have {keys['vocab']} pieces, but the tokenizer has {tok.vocab_size}")
    arrays = checked.arrays(files)
    config = _config(base, origin["config"], values, keys, folder)
    with checked.named(files[0] if len(files) == 1 else source):
        params = weights.params(config.model, arrays)
    return Trained(config, tok, params, Progress(**origin["progress"]))


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


def _config(base: RunConfig | None, origin: dict, values: dict, keys: dict, folder: str) -> RunConfig:
    """Return `base`, or the exported run's config, with the sizes in config.json, `values`."""
    if not base and not origin:
        raise UsageError(f"the weights have no {ORIGIN} beside them; name the settings to train with: --config=FILE")
    with checked.named(os.path.join(folder, ORIGIN)):
        settings = (base or RunConfig.from_dict(run_folder.with_later(origin))).to_dict()
    settings["model"] |= {"vocab": keys["vocab"]}
    with checked.named(os.path.join(folder, "config.json")):
        config = RunConfig.from_dict(settings)
        if all(values.get(key, True) == size for key, size in weights.sizes(config.model).items()):
            return config  # the same sizes, perhaps in other words: `mlp` 0 or its default width
        return RunConfig.from_dict(settings | {"model": settings["model"] | keys})


def _origin(path: str) -> dict:
    """Return the config and the progress of the exported run, both empty where the export does not tell them."""
    origin = checked.read_json(path) if os.path.lexists(path) else {"config": {}, "progress": {}}
    for group in ("config", "progress"):
        if not isinstance(origin.get(group), dict):
            raise UsageError(f"{path} is damaged: {group} is missing, or no group of keys")
    counts = {key: origin["progress"].get(key, 0) for key in ("step", "tokens")}
    for key, count in counts.items():
        if type(count) is not int or count < 0:
            raise UsageError(f"{path} is damaged: its {key}={shown(count)} must be a whole number from 0")
    return origin | {"progress": counts}
