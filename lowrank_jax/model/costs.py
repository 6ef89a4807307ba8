"""Costs of a model, computed from its config: parameters, FLOPs and cache bytes, beside those of a dense twin.

The dense twin has the same width, depth, hidden width and vocabulary, with full matrices everywhere.
"""

import dataclasses

from lowrank_jax.config import ModelConfig


def parameters(m: ModelConfig) -> dict[str, int]:
    """Return the parameters by component, which equal a count of `network.init`'s arrays."""
    widths = (m.d, m.kv_dim, m.kv_dim, m.d)  # of Q, K, V and O, on the side of the heads
    projections = [rank * (m.d + width) if rank else m.d * width for rank, width in zip(m.ranks, widths)]
    attention = m.layers * (sum(projections) - (m.d * m.ranks[2] if m.shared_kv else 0))
    per_matrix = m.mlp_rank * (m.d + m.hidden) if m.mlp_rank else m.d * m.hidden
    embedding = m.embed_rank * (m.vocab + m.d) if m.embed_rank else m.vocab * m.d
    counts = {"attention": attention, "mlp": 3 * m.layers * per_matrix, "embedding": embedding}
    counts |= {"head": 0 if m.tied else embedding, "norm": (2 * m.layers + 1) * m.d}  # a tied head is the embedding
    return counts | {"total": sum(counts.values())}


def dense_twin(m: ModelConfig) -> ModelConfig:
    return dataclasses.replace(m, kv_heads=0, rank=0, shared_kv=False, mlp_rank=0, embed_rank=0)


def train_flops_per_token(m: ModelConfig, seq_len: int) -> float:
    """Return the FLOPs of a trained token, forward and backward (2 + 4 per weight used), without rematerialisation.

    The head has as many weights as the embedding, tied or not. A factored embedding is multiplied on the way in, too; a
    plain one is only looked up. Causal attention over T keys costs 2 x 2 x T/2 x D forward, and twice that backward.
    """
    counts = parameters(m)
    used = counts["attention"] + counts["mlp"] + counts["embedding"] + (m.embed_rank * m.d if m.embed_rank else 0)
    return 6.0 * used + 6.0 * m.layers * seq_len * m.d


def kv_bytes_per_token(m: ModelConfig, bytes_per_value: int) -> dict[str, int]:
    """Return the cache bytes per token: of the latents, and of the keys and values of a dense model."""
    _, k, v, _ = m.ranks
    latent = k if m.shared_kv else k + v if m.rank else 2 * m.kv_dim
    return {"latent": m.layers * latent * bytes_per_value, "dense": m.layers * 2 * m.d * bytes_per_value}
