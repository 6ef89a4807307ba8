"""What a model costs, by arithmetic on its config alone: parameters, FLOPs and cache bytes, beside a dense twin.

The dense twin has the same width, depth, MLP and vocabulary, with full D x D attention projections.
"""

import dataclasses

from lowrank_jax.config import ModelConfig


def parameters(m: ModelConfig) -> dict[str, int]:
    """Parameters by component; equals a count of the arrays that `model.init` makes."""
    q, k, v, o = m.ranks
    downs = q + k + o if m.shared_kv else q + k + v + o
    attention = m.layers * m.d * (downs + q + k + v + o if m.rank else 4 * m.d)
    per_matrix = m.mlp_rank * (m.d + m.hidden) if m.mlp_rank else m.d * m.hidden
    embedding = m.embed_rank * (m.vocab + m.d) if m.embed_rank else m.vocab * m.d
    counts = {"attention": attention, "mlp": 3 * m.layers * per_matrix, "embedding": embedding}
    counts["head"] = 0 if m.tied else embedding  # which is then the embedding
    counts["norm"] = (2 * m.layers + 1) * m.d
    return counts | {"total": sum(counts.values())}


def dense_parameters(m: ModelConfig) -> dict[str, int]:
    """Parameters by component of the dense twin."""
    return parameters(dense_twin(m))


def dense_twin(m: ModelConfig) -> ModelConfig:
    return dataclasses.replace(m, rank=0, shared_kv=False, mlp_rank=0, embed_rank=0)


def train_flops_per_token(m: ModelConfig, seq_len: int) -> float:
    """FLOPs of one trained token, forward and backward (2 + 4 per weight used), without rematerialisation.

    The head has as many weights as the embedding, tied or not; a factored embedding is multiplied on the way in too,
    a plain one is only looked up. Causal
    attention over T keys costs 2 x 2 x T/2 x D forward, three times that with the backward pass.
    """
    counts = parameters(m)
    used = counts["attention"] + counts["mlp"] + counts["embedding"] + (m.embed_rank * m.d if m.embed_rank else 0)
    return 6.0 * used + 6.0 * m.layers * seq_len * m.d


def kv_bytes_per_token(m: ModelConfig, bytes_per_value: int) -> dict[str, int]:
    """Bytes that one token adds to the cache: its latents, and the keys and values a dense model would keep."""
    _, k, v, _ = m.ranks
    latent = k if m.shared_kv else k + v if m.rank else 2 * m.d
    return {"latent": m.layers * latent * bytes_per_value, "dense": m.layers * 2 * m.d * bytes_per_value}
