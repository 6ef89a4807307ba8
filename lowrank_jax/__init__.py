"""Low-rank ALiBi language models in JAX: one command from raw text to a chat model."""


def load(folder: str, weights: str = "auto"):
    """Open a run's trained model, with `.params, .config, .tokenizer, .logits(tokens), .generate(...)`.

    `weights` is the format that generation keeps weights in: fp32, bf16, fp16, int8, int4, or auto as the run computed.
    """
    from lowrank_jax.config import local_path
    from lowrank_jax.inference.session import Model  # imported late: `import lowrank_jax` starts neither JAX nor Orbax
    from lowrank_jax.training.trained import open_run

    run = open_run(local_path(folder, "folder"))
    return Model(run.config, run.tokenizer, run.params, weights)
