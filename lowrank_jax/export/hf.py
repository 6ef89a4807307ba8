"""A folder for Hugging Face transformers: weights in low rank, the model's code, tokenizer, settings and a card.

AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) and AutoTokenizer.from_pretrained(folder) load it.
"""

import json
import os
import shutil

import jax
import numpy as np

from lowrank_jax.config import ModelConfig, PhaseConfig, RunConfig, UsageError
from lowrank_jax.data import chat
from lowrank_jax.data.tokenizer import Tokenizer
from lowrank_jax.export import hf_tokenizer, verify
from lowrank_jax.model import EPS
from lowrank_jax.trained import Trained

CODE = "modeling_lowrank.py"
CHUNK = 512  # tokens of a prompt that are verified at a time, so that their biases fit into memory


def write(trained: Trained, folder: str) -> str:
    """Writes the files into `folder`, which it makes, and returns it; raises UsageError for a foreign tokenizer that
    cannot be described, and where a package is missing.
    """
    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise UsageError("--format=hf needs the package safetensors: pip install safetensors") from None
    config, tokenizer, params, progress = trained
    length = verify.longest(config)
    texts = hf_tokenizer.files(tokenizer, length)
    texts["config.json"] = _json(_settings(config.model, tokenizer, length))
    texts["generation_config.json"] = _json(_special_ids(tokenizer) | {"eos_token_id": chat.stop_ids(tokenizer)})
    texts["README.md"] = _card(config, progress)
    os.makedirs(folder, exist_ok=True)
    for name, text in texts.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8", newline="") as f:
            f.write(text)
    shutil.copyfile(os.path.join(os.path.dirname(__file__), CODE), os.path.join(folder, CODE))
    weights = os.path.join(folder, "model.safetensors")
    save_file(tensors(params), weights, metadata={"format": "pt"})
    shutil.copymode(os.path.join(folder, "config.json"), weights)  # it was for the owner alone
    return folder


def tensors(params: dict) -> dict[str, np.ndarray]:
    """fp32 weights by the names of modeling_lowrank.py; torch has a matrix as [out, in]."""
    found = {"model.embed_tokens.weight": params["embed"]["table"], "model.norm.weight": params["norm"]["gain"]}
    if "up" in params["embed"]:
        found["model.embed_up.weight"] = params["embed"]["up"].T
    if "head" in params:
        found["lm_head.weight"] = params["head"]["table"]
        if "up" in params["head"]:
            found["lm_head_down.weight"] = params["head"]["up"]
    for path, w_N in jax.tree_util.tree_leaves_with_path(params["blocks"]):
        keys = [key.key for key in path if key.key != "gain"]
        for i, w in enumerate(np.asarray(w_N)):
            found[f"model.layers.{i}.{'.'.join(keys)}.weight"] = w.T
    return {name: np.ascontiguousarray(w, np.float32) for name, w in found.items()}


def check(trained: Trained, folder: str) -> float:
    """The largest difference of two logits, with the cache between chunks of the prompts.

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

    def theirs(tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
        cache, rows = None, []
        for start in range(0, len(tokens), CHUNK):
            here = places[(places >= start) & (places < start + CHUNK)] - start
            chunk = torch.tensor(tokens[None, start : start + CHUNK])
            out = net(chunk, past_key_values=cache, logits_to_keep=torch.tensor(here))
            cache, rows = out.past_key_values, [*rows, out.logits[0]]
        return torch.cat(rows).numpy()

    with torch.no_grad():
        return verify.check(verify.difference(trained, theirs))


def _settings(c: ModelConfig, tokenizer: Tokenizer, length: int) -> dict:
    code = CODE.removesuffix(".py")
    rank_q, rank_k, rank_v, rank_o = c.ranks
    return {
        "architectures": ["LowRankForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{code}.LowRankConfig",
            "AutoModel": f"{code}.LowRankModel",
            "AutoModelForCausalLM": f"{code}.LowRankForCausalLM",
        },
        "model_type": "lowrank_alibi",
        "dtype": "float32",
        "vocab_size": c.vocab,
        "hidden_size": c.d,
        "intermediate_size": c.hidden,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "rank_q": rank_q,
        "rank_k": rank_k,
        "rank_v": rank_v,
        "rank_o": rank_o,
        "shared_kv": c.shared_kv,
        "latent_norm": c.latent_norm,
        "mlp_rank": c.mlp_rank,
        "embed_rank": c.embed_rank,
        "rms_norm_eps": EPS,
        "max_position_embeddings": length,
        "tie_word_embeddings": c.tied,
        "eos_token_id": tokenizer.eos,
    } | _special_ids(tokenizer)


def _special_ids(tokenizer: Tokenizer) -> dict:
    pad = tokenizer.names["pad_token"] if "pad_token" in tokenizer.names else tokenizer.names["eos_token"]
    return {"bos_token_id": tokenizer.bos, "pad_token_id": tokenizer.specials[pad]}


def _json(value: dict) -> str:
    return json.dumps(value, indent=2) + "\n"


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

| | |
|---|---|
{facts}
"""


def _card(config: RunConfig, progress: dict) -> str:
    """The model card: what the model is and, as far as the run's progress tells it, what it has been trained on."""
    c = config.model
    facts = {
        "width, layers, heads": f"{c.d}, {c.layers}, {c.heads}",
        "ranks of Q, K, V, O": ", ".join(map(str, c.ranks)) if c.rank else "dense",
        "vocabulary": f"{c.vocab:,}",
        "longest sequence in training": f"{verify.longest(config):,}",
        "precision in training": config.precision,
        "pretraining data": _sources(config.pretrain),
    }
    if config.sft.steps:
        facts["chat data"] = _sources(config.sft)
    plain = {key: value for key, value in progress.items() if isinstance(value, (int, float, str)) and value != ""}
    facts |= {f"`{key}` in training": f"{value:,}" if isinstance(value, int) else value for key, value in plain.items()}
    return CARD.format(facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()))


def _sources(phase: PhaseConfig) -> str:
    """Public names as they are, of files the last part alone: where they lay is nobody's business."""
    found = [source.spec.partition(":") for source in phase.sources]
    public = ("hf", "tfds", "builtin")
    return ", ".join(f"`{kind}:{place if kind in public else os.path.basename(place)}`" for kind, _, place in found)
