"""A config from a YAML file with the same keys: --config=from_yaml:my.yaml.

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

import math

import yaml

from lowrank_jax.config import UsageError, local_path
from lowrank_jax.configs import default

MOST_VALUES = 100_000


def get_config(path: str = ""):
    path = local_path(path, "--config=from_yaml:PATH")
    try:
        with open(path, encoding="utf-8") as f:
            text = f.read()
        if _size(yaml.compose(text, yaml.SafeLoader), {}) > MOST_VALUES:
            raise UsageError(f"{path} has more than {MOST_VALUES:,} values where its aliases are written out")
        values = yaml.safe_load(text)
    except OSError as e:
        raise UsageError(f"--config=from_yaml:PATH: {path or 'PATH is missing'}: {e.strerror}") from None
    except RecursionError:
        raise UsageError(f"{path} is not YAML for a config: its values are nested too deeply") from None
    except (yaml.YAMLError, ValueError) as e:  # a date or a number that cannot be is a ValueError
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


def _size(node: yaml.Node | None, sizes: dict[int, float]) -> float:
    """Return the number of values of a YAML node with its aliases written out; a node inside itself has no end."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        items = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for item in items for part in (item if isinstance(item, tuple) else (item,))]
        sizes[id(node)] = 1 + sum(_size(part, sizes) for part in parts)
    return sizes[id(node)]


def _plain(value):
    return tuple(value) if isinstance(value, list) else value
