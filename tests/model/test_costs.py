"""The arithmetic of costs.py equals the arrays, the cache and the matmuls of the network."""

import math

import jax
import jax.numpy as jnp
import pytest

from configs import default
from lowrank_jax import cli
from lowrank_jax.config import ModelConfig, RunConfig
from lowrank_jax.inference import decoder
from lowrank_jax.model import costs, network

TOY = {"vocab": 61, "d": 64, "layers": 3, "heads": 8, "rank": 8, "mlp": 0}
VARIANTS = {
    "default": {},
    "shared_kv": {"shared_kv": True},
    "uneven shared_kv": {"shared_kv": True, "rank_split": (1, 2, 5, 3), "rank": 7},
    "factored mlp": {"mlp_rank": 9},
    "factored embedding": {"embed_rank": 5},
    "untied head": {"tied": False},
    "untied and factored": {"tied": False, "embed_rank": 5},
    "odd sizes": {"d": 48, "heads": 6, "rank": 20, "mlp": 33, "mlp_rank": 3, "embed_rank": 7, "vocab": 257},
    "one layer, full rank": {"layers": 1, "rank": 64, "rank_split": (1, 1, 1, 1)},
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())


def toy(**changes) -> ModelConfig:
    values = default.get_config().to_dict()
    values["model"].update(TOY | changes)
    return RunConfig.from_dict(values).model


def abstract_params(c: ModelConfig) -> dict:
    return jax.eval_shape(lambda: network.init(c, jax.random.key(0)))


def count_under(params: dict, *prefixes: tuple[str, ...]) -> int:
    paths = [(tuple(k.key for k in path), x) for path, x in jax.tree.leaves_with_path(params)]
    return sum(math.prod(x.shape) for path, x in paths if any(path[: len(p)] == p for p in prefixes))


def matmul_flops(jaxpr) -> int:
    """Return the FLOPs of all matmuls of a traced program, loops included."""
    total = 0
    for e in jaxpr.eqns:
        if e.primitive.name == "dot_general":
            (contracted, _), _ = e.params["dimension_numbers"]
            total += 2 * math.prod(e.outvars[0].aval.shape) * math.prod(e.invars[0].aval.shape[i] for i in contracted)
        inner = [getattr(v, "jaxpr", v) for v in e.params.values()]
        total += e.params.get("length", 1) * sum(matmul_flops(j) for j in inner if hasattr(j, "eqns"))
    return total


@variants
def test_parameters_equal_the_arrays_of_the_model(changes):
    c = toy(**changes)
    params, counts = abstract_params(c), costs.parameters(c)
    assert counts == {
        "attention": count_under(params, ("blocks", "attention")),
        "mlp": count_under(params, ("blocks", "mlp")),
        "embedding": count_under(params, ("embed",)),
        "head": count_under(params, ("head",)),
        "norm": count_under(params, ("blocks", "attention_norm"), ("blocks", "mlp_norm"), ("norm",)),
        "total": count_under(params, ()),
    }


@variants
def test_parameters_of_the_dense_twin_are_those_of_plain_matrices(changes):
    c = toy(**changes)
    counts, table = costs.parameters(costs.dense_twin(c)), c.vocab * c.d
    assert (counts["attention"], counts["mlp"]) == (c.layers * 4 * c.d**2, c.layers * 3 * c.d * c.hidden)
    assert (counts["embedding"], counts["head"]) == (table, 0 if c.tied else table)
    assert counts["norm"] == costs.parameters(c)["norm"]


@pytest.mark.parametrize("d, heads, rank", [(64, 8, 8), (48, 6, 20), (96, 12, 12)])
def test_attention_is_8dr_a_layer_and_7dr_when_keys_and_values_share(d, heads, rank):
    sizes = {"d": d, "heads": heads, "rank": rank, "layers": 5}
    assert costs.parameters(toy(**sizes))["attention"] == 5 * 8 * d * rank
    assert costs.parameters(toy(**sizes, shared_kv=True))["attention"] == 5 * 7 * d * rank


def test_attention_of_the_custom_preset_is_75_percent_smaller_than_dense():
    c = cli.read_config(["--config=configs/custom.py"]).with_vocab(32_000).model
    assert (c.d, c.layers, c.heads, c.rank) == (1024, 20, 32, 128)
    attention = count_under(abstract_params(c), ("blocks", "attention"))
    assert attention == 20 * 8 * 1024 * 128 == costs.parameters(costs.dense_twin(c))["attention"] // 4
    assert attention == costs.parameters(c)["attention"]


@variants
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cache_bytes_equal_those_of_the_decoders_cache(changes, dtype):
    c, rows, size = toy(**changes), 3, 40
    cache = jax.tree.leaves(jax.eval_shape(lambda: decoder.empty_cache(c, rows, size, dtype)))
    claimed = costs.kv_bytes_per_token(c, jnp.dtype(dtype).itemsize)
    assert sum(math.prod(x.shape) * x.dtype.itemsize for x in cache) == rows * size * claimed["latent"]
    dense = jax.ShapeDtypeStruct((c.layers, 2, rows, size, c.heads, c.head_dim), dtype)
    assert math.prod(dense.shape) * dense.dtype.itemsize == rows * size * claimed["dense"]


@variants
@pytest.mark.parametrize("T", [8, 40])
def test_train_flops_are_three_forward_passes_over_the_causal_half(changes, T):
    c, rows = toy(**changes, attention="reference"), 2

    def forward(params):
        return network.logits(c, params, network.features(c, params, jnp.zeros((rows, T), jnp.int32)))

    traced = matmul_flops(jax.make_jaxpr(forward)(abstract_params(c)).jaxpr)
    masked_half = c.layers * 2 * T * c.d  # the reference multiplies the whole square
    assert 3 * (traced / (rows * T) - masked_half) == costs.train_flops_per_token(c, T)
