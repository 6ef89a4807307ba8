"""Names of config keys: what each key means, and which key was meant by a name that is none.

The functions take the keys as data, so this file imports nothing of the package.
"""

import ast
import dataclasses
import decimal
import difflib
import io
import tokenize
import typing

# Names of other trainers for our keys. A key with a group is that group's; any other is looked for beside the unknown
# name first, then in all groups in their order.
SYNONYMS = {
    "tokens_per_step": "batch batch_size batch_tokens global_batch_size train_batch_size total_batch_size",
    "microbatch_tokens": "microbatch micro_batch_size device_batch_size per_device_batch_size grad_accum accumulation"
    " gradient_accumulation_steps grad_accum_steps per_device_train_batch_size",
    "lr": "learning_rate peak_lr max_lr base_lr peak_learning_rate",
    "lr_end": "min_lr final_lr end_lr lr_min min_learning_rate",
    "steps": "max_steps num_steps train_steps total_steps num_train_steps n_steps iterations iters max_iters num_iters"
    " epoch epochs num_epochs max_epochs num_train_epochs",
    "warmup": "warmup_steps warmup_ratio num_warmup_steps warmup_iters warmup_fraction",
    "cooldown": "decay_steps cooldown_steps lr_decay_steps warmdown lr_decay_iters",
    "schedule": "lr_schedule scheduler lr_scheduler lr_scheduler_type",
    "block": "block_size seq_len seq_length sequence_length max_seq_len max_seq_length max_length context_length"
    " context ctx_len n_ctx max_position_embeddings",
    "sources": "data dataset datasets data_path data_dir train_data train_file corpus",
    "eval_fraction": "val_fraction validation_split val_split validation_fraction test_size",
    "readers": "num_workers workers dataloader_num_workers",
    "model.d": "d_model dim hidden_size n_embd embed_dim embedding_dim width model_dim n_embed",
    "model.layers": "num_layers n_layers n_layer depth num_hidden_layers num_blocks n_blocks",
    "model.heads": "num_heads n_heads n_head num_attention_heads",
    "model.kv_heads": "num_kv_heads n_kv_heads num_key_value_heads n_kv_head",
    "model.mlp": "intermediate_size d_ff ffn_dim mlp_dim ff_dim hidden_dim ffn_hidden_size",
    "model.rank": "r lora_rank attention_rank low_rank",
    "model.tied": "tie_embeddings tie_word_embeddings tied_embeddings weight_tying",
    "model.attention": "attn attention_backend attn_implementation flash_attention",
    "model.remat": "gradient_checkpointing activation_checkpointing checkpointing rematerialize",
    "optim.name": "optimizer optimiser optim_name",
    "optim.clip": "grad_clip gradient_clip max_grad_norm clip_norm gradient_clipping grad_norm",
    "optim.weight_decay": "wd decay",
    "optim.beta1": "b1 adam_beta1 momentum",
    "optim.beta2": "b2 adam_beta2",
    "optim.ema": "ema_decay",
    "tokenizer.vocab_size": "vocabulary_size n_vocab num_tokens",
    "tokenizer.path": "tokenizer_path tokenizer_name tokenizer_file",
    "every.save": "save_every save_steps save_interval checkpoint_every checkpoint_interval save_freq",
    "every.eval": "eval_every eval_steps eval_interval eval_freq val_every",
    "every.log": "log_every logging_steps log_interval log_steps log_freq",
    "every.keep": "save_total_limit max_to_keep keep_checkpoints keep_last",
    "mesh.data": "dp data_parallel",
    "mesh.tensor": "tp tensor_parallel model_parallel",
    "precision": "dtype compute_dtype mixed_precision amp bf16 fp16 fp8",
    "init_from": "resume_from checkpoint init_checkpoint pretrained pretrained_model model_name_or_path",
    "track": "report_to logger tracker wandb",
    "seed": "random_seed rng_seed",
    "spec": "path source dataset url location file files",
    "weight": "ratio proportion probability share",
    "text_key": "text_column text_field column field",
    "messages_key": "messages_column conversations_key chat_key",
}


def tree(cls) -> dict:
    """Return {key: type} of a dataclass, with a group's tree in place of its type."""
    hints = typing.get_type_hints(cls)
    return {key: tree(hint) if dataclasses.is_dataclass(hint) else hint for key, hint in hints.items()}


def paths(group: dict, prefix: str = "") -> list[str]:
    """Return the dotted path of every key below a group, in order."""
    below = (
        paths(item, f"{prefix}{key}.") if isinstance(item, dict) else [prefix + key] for key, item in group.items()
    )
    return [path for keys in below for path in keys]


def meant(name: str, path: str, siblings: typing.Iterable[str], root: dict) -> str:
    """Return the key that was meant by an unknown `name` of the group `path`, or an empty text.

    A key of the same group (`siblings`) is returned as its name, any other with its path. Exact names and synonyms come
    before similar names.
    """
    leaves, word = paths(root), name.lower().replace("-", "_")

    def place(key: str) -> str:
        if key in siblings:
            return key
        if key.startswith(path.removeprefix("config.") + "."):
            return key.split(".")[-1]
        return next((f"config.{leaf}" for leaf in leaves if key in (leaf, leaf.split(".")[-1])), "")

    names = {leaf.split(".")[-1]: leaf.split(".")[-1] for leaf in leaves} | {key: key for key in siblings}
    names |= {synonym: key for key, words in SYNONYMS.items() if place(key) for synonym in words.split()}
    if word not in names:
        near = difflib.get_close_matches(word, names, 1, 0.85) or difflib.get_close_matches(word, siblings, 1)
        word = near[0] if near else ""
    return place(names[word]) if word else ""


def unknown(name: str, path: str, siblings: typing.Iterable[str], root: dict) -> str:
    """Return the error for an unknown key of the group `path`."""
    near = meant(name[:100], path, siblings, root)
    advice = f"did you mean {near}?" if near else "`python -m lowrank_jax config` lists the keys"
    return f"unknown config key {path}.{name[:100]}; {advice}"


def lookup(dotted: str, root: dict) -> tuple[object, str]:
    """Return a key's type, and the error where the path, such as `pretrain.stepz`, has an unknown key.

    The type is None for a group, and for what lies inside a key, such as sources[0].weight.
    """
    group, path = root, "config"
    for name in dotted.split("."):
        if not isinstance(group, dict):
            return None, ""
        key = name.split("[")[0]
        if key not in group:
            return None, unknown(key, path, group, root)
        group, path = group[key], f"{path}.{key}"
    return None if isinstance(group, dict) or key != name else group, ""


def whole(value: int | float | str) -> int:
    """Return a number, or a text such as 1000, 1e3 or 3.0, as a whole number; raises ValueError for other texts."""
    try:
        return int(value, 0) if isinstance(value, str) else int(value)
    except ValueError:
        pass
    try:
        number = decimal.Decimal(value)
        if number.adjusted() < 40 and number == number.to_integral_value():  # int() of 1e999999999 does not end
            return int(number)
    except ArithmeticError:  # no number, nan or infinity
        pass
    raise ValueError(f"{value!r} is no whole number")


def meanings(source: str) -> dict[str, str]:
    """Return the comment of every key and group, by its path, from the source of configs/default.py.

    A key's comment is the one on its line, with the lines of comment right above it.
    """
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}

    def comment(first: int, last: int) -> str:
        words = [comments[last][0]] if last in comments else []
        while comments.get(first := first - 1, ("", False))[1]:
            words.insert(0, comments[first][0])
        return " ".join(words)

    def read(node: ast.AST, prefix: str) -> dict[str, str]:
        texts = {}
        for pairs in [n for n in ast.walk(node) if isinstance(n, ast.Dict)][:1]:
            for key, value in zip(pairs.keys, pairs.values):
                is_group = isinstance(value, ast.Dict | ast.Call)
                texts[prefix + key.value] = comment(key.lineno, key.lineno if is_group else value.end_lineno)
                if is_group:
                    body = functions[value.func.id] if isinstance(value, ast.Call) else value
                    texts |= read(body, f"{prefix}{key.value}.")
        return texts

    return read(functions["run"], "") | read(functions["groups"], "")
