"""A folder for plain PyTorch: low-rank weights, the module that runs them, tokenizer, sizes and an example."""

import numpy as np

from lowrank_jax.config import RunFailure
from lowrank_jax.data import tokenizer
from lowrank_jax.export import folder as folders
from lowrank_jax.export import verify, weights
from lowrank_jax.training.trained import Trained


def write(trained: Trained, folder: str) -> str:
    """Write the files into a folder, which is created, and return it."""
    texts = {"lowrank.py": folders.packaged("lowrank.py"), "example.py": folders.packaged("cards/example.py.txt")}
    texts["README.md"] = folders.packaged("cards/torch.md", facts=folders.facts(trained))
    folders.write_weights(trained, folder, texts, state(trained.params))
    return folder


def state(params: dict) -> dict[str, np.ndarray]:
    """Return fp32 weights by the names of lowrank.py."""
    return {name.removeprefix(weights.PREFIX): w for name, w in weights.tensors(params).items()}


def check(trained: Trained, folder: str) -> float:
    """Return the largest difference of two logits."""
    verify.check_ids(trained.tokenizer, tokenizer.load(folder).encode)
    verify.need("torch")
    import torch

    from lowrank_jax.export.lowrank import LowRank

    try:
        net = LowRank.load(folder)
    except RuntimeError as e:  # names or shapes of weights
        raise RunFailure(f"the export does not load: {' '.join(str(e).split())[:300]}") from None

    def read(tokens: np.ndarray, positions: np.ndarray, past):
        logits, past = net(torch.tensor(tokens[None]), past)
        return logits[0, torch.tensor(positions)].numpy(), past

    with torch.no_grad():
        return verify.check_cached(trained, read)
