"""A folder for plain PyTorch: weights in low rank, the module that runs them, tokenizer, sizes and an example.

lowrank.py needs nothing but torch and safetensors; see its head.
"""

import numpy as np

from lowrank_jax.config import RunFailure
from lowrank_jax.data import tokenizer
from lowrank_jax.export import folder as folders
from lowrank_jax.export import verify, weights
from lowrank_jax.training.trained import Trained

CODE = "lowrank.py"


def write(trained: Trained, folder: str) -> str:
    """Writes the files into `folder`, which it makes, and returns it; raises UsageError for a foreign tokenizer that
    cannot be described, and where a package is missing.
    """
    texts = {"README.md": CARD.format(facts=folders.facts(trained.config, trained.progress)), "example.py": EXAMPLE}
    folders.write(trained, folder, {}, texts, [CODE])
    found = weights.tensors(trained.params)
    folders.write_weights(trained, folder, {name.removeprefix(weights.PREFIX): w for name, w in found.items()}, "torch")
    return folder


def check(trained: Trained, folder: str) -> float:
    """The largest difference of two logits, of prompts read as a whole and token by token.

    Raises RunFailure where it is too large or the tokenizer is another, NotInstalled where nothing here runs it.
    """
    verify.check_ids(trained.tokenizer, tokenizer.load(folder).encode)
    try:
        import torch

        from lowrank_jax.export.lowrank import LowRank
    except ImportError:
        raise verify.NotInstalled("pip install torch") from None
    try:
        net = LowRank.load(folder)
    except RuntimeError as e:  # names or shapes of weights
        raise RunFailure(f"the export does not load: {' '.join(str(e).split())[:300]}") from None

    def read(tokens: np.ndarray, places: np.ndarray, past):
        logits, past = net(torch.tensor(tokens[None]), past)
        return logits[0, torch.tensor(places)].numpy(), past

    with torch.no_grad():
        return verify.check(verify.difference_of_reader(trained, read))


EXAMPLE = '''"""Writes on from a text: python example.py "Once upon a time"; needs torch, safetensors and tokenizers."""

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

Trained with lowrank_jax: pre-norm RMSNorm, SwiGLU, ALiBi, attention in low rank; the cache holds latents, not keys and
values. It runs at any length. `python example.py "Once upon a time"` needs torch, safetensors and tokenizers.

```python
from lowrank import LowRank

net = LowRank.load(FOLDER)
logits, past = net(ids)        # [rows, tokens] to [rows, tokens, vocabulary]
logits, past = net(next, past)
```

Rows of different lengths are padded on the left, with a mask: `net(ids, past, mask)`. model.safetensors is
`net.state_dict()`.

{facts}"""
