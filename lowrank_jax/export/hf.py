"""A folder for Hugging Face transformers: weights in low rank, the model's code, tokenizer, settings and a card.

AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) and AutoTokenizer.from_pretrained(folder) load it.
"""

import numpy as np

from lowrank_jax.config import UsageError
from lowrank_jax.data import chat
from lowrank_jax.export import folder as folders
from lowrank_jax.export import verify, weights
from lowrank_jax.training.trained import Trained

CODE = "modeling_lowrank.py"
MERGED = (
    "--merge: no class of transformers' own is exact, as those with ALiBi (Bloom, MPT, Falcon) have LayerNorm and GELU "
    "instead of RMSNorm and SwiGLU; use --format=hf without it, or --format=gguf --attn=dense for merged weights"
)


def write(trained: Trained, folder: str, merge: bool = False) -> str:
    """Writes the files into `folder`, which it makes, and returns it; raises UsageError for a foreign tokenizer that
    cannot be described, where a package is missing, and for `merge`.
    """
    if merge:
        raise UsageError(MERGED)
    name = CODE.removesuffix(".py")
    settings = {
        "architectures": ["LowRankForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{name}.LowRankConfig",
            "AutoModel": f"{name}.LowRankModel",
            "AutoModelForCausalLM": f"{name}.LowRankForCausalLM",
        },
        "dtype": "float32",
    }
    ends = weights.special_ids(trained.tokenizer) | {"eos_token_id": chat.stop_ids(trained.tokenizer)}
    texts = {
        "generation_config.json": folders.as_json(ends),
        "README.md": CARD.format(facts=folders.facts(trained.config, trained.progress)),
    }
    folders.write(trained, folder, settings, texts, [CODE])
    folders.write_weights(trained, folder, weights.tensors(trained.params), "hf")
    return folder


def check(trained: Trained, folder: str, merge: bool = False) -> float:
    """The largest difference of two logits, of prompts read as a whole and token by token.

    Raises RunFailure where it is too large or the tokenizer is another, NotInstalled where nothing here runs it.
    """
    try:
        import torch
        import transformers

        from lowrank_jax.export.modeling_lowrank import LowRankForCausalLM
    except ImportError:
        raise verify.NotInstalled("pip install torch transformers") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tok = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # without, it asks
    verify.check_ids(trained.tokenizer, lambda text: tok(text)["input_ids"][1:])
    verify.check_chat(
        trained.tokenizer,
        lambda messages: tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=False),
    )
    net = LowRankForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def read(tokens: np.ndarray, places: np.ndarray, cache):
        out = net(torch.tensor(tokens[None]), past_key_values=cache, logits_to_keep=torch.tensor(places))
        return out.logits[0].numpy(), out.past_key_values

    with torch.no_grad():
        return verify.check(verify.difference_of_reader(trained, read))


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [lowrank_alibi, custom_code]
---

# A low-rank ALiBi language model

Trained with lowrank_jax: pre-norm RMSNorm, SwiGLU, ALiBi, attention in low rank; the cache holds latents, not keys and
values. It runs at any length.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)  # or it asks
chat = [{{"role": "user", "content": "Hello."}}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=100)[0]))
```

{facts}"""
