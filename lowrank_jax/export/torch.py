"""A folder for plain PyTorch: low-rank weights, the module that runs them, tokenizer, sizes and an example.

Its lowrank.py needs torch and safetensors alone.
"""

import numpy as np

from lowrank_jax.config import RunFailure
from lowrank_jax.data import tokenizer
from lowrank_jax.export import folder as folders
from lowrank_jax.export import verify, weights
from lowrank_jax.training.trained import Trained


def write(trained: Trained, folder: str) -> str:
    """Write the files into a folder, which is created, and return it."""
    texts = {"README.md": CARD.format(facts=folders.facts(trained)), "example.py": EXAMPLE}
    folders.write(trained, folder, texts, ["lowrank.py"])
    folders.write_weights(trained, folder, state(trained.params))
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


EXAMPLE = '''"""Continues a text: python example.py "Once upon a time"; needs torch, safetensors and tokenizers."""

import os
import sys

from lowrank import LowRank
from tokenizers import Tokenizer

folder = os.path.dirname(os.path.abspath(__file__))
net = LowRank.load(folder)
tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))  # its ids begin with the BOS

text = sys.argv[1] if len(sys.argv) > 1 else "Once upon a time"
ids = tokenizer.encode(text).ids
new = net.generate(ids, 100, temperature=0.7)
print(tokenizer.decode(ids + new))
'''


CARD = """# A low-rank ALiBi language model for PyTorch

Trained with lowrank_jax: pre-norm RMSNorm, SwiGLU, ALiBi, attention in low rank. The cache holds latents instead of
keys and values. The model runs at any length. `python example.py "Once upon a time"` needs torch, safetensors and
tokenizers.

```python
from lowrank import LowRank

net = LowRank.load(FOLDER)
logits, past = net(ids)        # [rows, tokens] to [rows, tokens, vocabulary]
logits, past = net(next, past)
```

Pad rows of different lengths on the left, and pass a mask: `net(ids, past, mask)`. model.safetensors is
`net.state_dict()`.

{facts}"""
