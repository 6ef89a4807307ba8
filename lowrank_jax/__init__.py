"""Low-rank ALiBi language models in JAX: one command from raw text to a chat model."""
