"""A folder for Hugging Face transformers: low-rank weights, the model's code, tokenizer, settings and a card."""

import numpy as np

from lowrank_jax.export import folder as folders
from lowrank_jax.export import verify, weights
from lowrank_jax.training.trained import Trained

MODULE = "modeling_lowrank"
CLASSES = {"AutoConfig": "LowRankConfig", "AutoModel": "LowRankModel", "AutoModelForCausalLM": "LowRankForCausalLM"}


def write(trained: Trained, folder: str) -> str:
    """Write the files into a folder, which is created, and return it."""
    auto_map = {name: f"{MODULE}.{class_name}" for name, class_name in CLASSES.items()}
    settings = {"architectures": ["LowRankForCausalLM"], "auto_map": auto_map, "dtype": "float32"}
    texts = {name: folders.packaged(name) for name in (f"{MODULE}.py", "lowrank.py")}
    texts["README.md"] = folders.packaged("cards/hf.md", facts=folders.facts(trained))
    texts["generation_config.json"] = folders.as_json(weights.token_ids(trained.tokenizer))
    folders.write_weights(trained, folder, texts, weights.tensors(trained.params), settings)
    return folder


def check(trained: Trained, folder: str) -> float:
    """Return the largest difference of two logits."""
    verify.need("torch", "transformers")
    import torch
    import transformers

    from lowrank_jax.export.modeling_lowrank import LowRankForCausalLM

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # else it asks the user
    verify.check_ids(trained.tokenizer, lambda text: tokenizer(text)["input_ids"][1:])
    options = {"add_generation_prompt": True, "return_dict": False}
    verify.check_chat(trained.tokenizer, lambda messages: tokenizer.apply_chat_template(messages, **options))
    net = LowRankForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def read(tokens: np.ndarray, positions: np.ndarray, cache):
        out = net(torch.tensor(tokens[None]), past_key_values=cache, logits_to_keep=torch.tensor(positions))
        return out.logits[0].numpy(), out.past_key_values

    with torch.no_grad():
        return verify.check_cached(trained, read)
