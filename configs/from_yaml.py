"""A config from a YAML file with the same keys: --config=configs/from_yaml.py:my.yaml.

A key may also stand at the top level, without its group, as in the files of many trainers. A key that pretrain and sft
share then means pretrain's:

    d: 768
    layers: 12
    heads: 24
    rank: 96
    vocab_size: 16000
    steps: 10000
    block: 256
    auto_grow: true
    grow_plan: [256, 512, 1024]
    sft: {sources: "json:chats.jsonl", steps: 1000}
"""

import yaml

from configs import default
from lowrank_jax.config import UsageError, local_path


def get_config(path: str = ""):
    path = local_path(path, "--config=configs/from_yaml.py:PATH")
    try:
        with open(path, encoding="utf-8") as f:
            values = yaml.safe_load(f)
    except OSError as e:
        raise UsageError(f"--config=configs/from_yaml.py:PATH: {path or 'PATH is missing'}: {e.strerror}") from None
    except yaml.YAMLError as e:
        raise UsageError(f"{path} is not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} must have keys and values, such as d: 768")
    c = default.get_config()
    for key, value in values.items():
        groups = [c, c.model, c.pretrain, c.tokenizer, c.optim, c.every]
        group = next((group for group in groups if key in group), c)
        if isinstance(value, dict) and key in group:
            for inner in value:
                group[key][inner] = _plain(value[inner])
        else:
            group[key] = _plain(value)  # RunConfig rejects an unknown key by its name
    return c


def _plain(value):
    return tuple(value) if isinstance(value, list) else value
