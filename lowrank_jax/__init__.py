"""Low-rank ALiBi language models in JAX: one command from raw text to a chat model."""


def load(folder: str, weights: str = "auto"):
    """The trained model of a run's folder, with `.params, .config, .tokenizer, .logits(tokens), .generate(...)`.

    `weights` is how generation keeps them: fp32, bf16, fp16, int8, int4, or auto as the run computed.
    """
    from lowrank_jax import generate  # here, so that importing the package starts neither jax nor orbax
    from lowrank_jax.training import trained  # here, so that importing the package starts neither jax nor orbax

    return generate.Model(trained.open_run(folder), weights)
