"""Every option of the network reaches each place that describes the network.

The tests walk over all fields of ModelConfig, each with a value that is not the default, on toy models with random
weights. A new field fails until it has an entry in OPTIONS, and then in each place that does not know it.
CONTRIBUTING.md ("How to add a model option") lists these places in order.
"""

import dataclasses
import functools
import json
import math

import exports
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_config
from jax.sharding import AbstractMesh
from test_costs import abstract_params, count_under, matmul_flops
from test_network import full, jit, make, some_tokens

from configs import default
from lowrank_jax.config import ModelConfig, RunFailure, UsageError
from lowrank_jax.export import gguf, hf, onnx
from lowrank_jax.export import torch as plain
from lowrank_jax.inference import cpu_decoder, decoder, quantize
from lowrank_jax.machine import sharding
from lowrank_jax.model import costs, network
from lowrank_jax.training import run_folder, step, trained
from lowrank_jax.training.checkpoint import Checkpoints
from lowrank_jax.training.plan import Progress

PAGE = 'CONTRIBUTING.md ("How to add a model option") lists the places'
FIELDS = [field.name for field in dataclasses.fields(ModelConfig)]

DENSE_O, DENSE_QO = (1.0, 1.0, 2.0, 0.0), (0.0, 1.0, 1.0, 0.0)  # shares of 0 are dense projections

# Toy sizes, with ranks that the packed decoder for CPUs takes: multiples of 16. The rest are the defaults.
TOY = {"vocab": 61, "d": 96, "layers": 1, "heads": 6, "rank": 32, "mlp": 40}
# Values of each field that are neither TOY's nor the default. The first ones of all fields must fit together.
OPTIONS = {
    "vocab": [521],  # that of the tokenizer `tok`, which exports need
    "d": [144],
    "layers": [2],
    "heads": [12],
    "kv_heads": [3, 1],
    "rank": [96, 0],
    "rank_split": [DENSE_QO, DENSE_O, (1.0, 1.0, 1.0, 1.0)],
    "shared_kv": [True],
    "latent_norm": [True],
    "mlp": [64],
    "mlp_rank": [20],
    "embed_rank": [12],
    "tied": [False],
    "attention": ["reference"],
    "scan": [False],
    "remat": [True],
}
# Fields that change how the same function is computed. They may change when a run resumes; all others are in IDENTITY.
HOW_ONLY = {
    "attention": "the kernel depends on the device; all kernels compute the same attention",
    "scan": "compile time and speed only",
    "remat": "memory and speed only",
}
# The packed decoder has factors of each projection.
NOT_PACKED = [("rank", 0), ("rank_split", DENSE_O), ("rank_split", DENSE_QO)]
GROUPED = ("kv_heads", 3)
# Values that a format cannot hold and refuses by name.
FORMATS = {
    "hf": (hf, {}, [GROUPED]),
    "torch": (plain, {}, [GROUPED]),
    "onnx": (onnx, {}, [GROUPED]),
    "gguf dense": (gguf, {"attn": "dense"}, [GROUPED, ("latent_norm", True)]),
    "gguf latent": (gguf, {"attn": "latent"}, [GROUPED, ("latent_norm", True), ("rank", 0)]),
}

# The last dimensions of each array: D model width, A all heads' width, G that of heads of keys, F MLP width, V
# vocabulary, R rank. Factored embeddings have a rank where others have the model's width.
DIMENSIONS = {
    "embed/table": "VD",
    "embed/up": "RD",
    "head/table": "VD",
    "head/up": "RD",
    "norm/gain": "D",
    "blocks/attention_norm/gain": "D",
    "blocks/mlp_norm/gain": "D",
    **{f"blocks/attention/{name}/kernel": "DA" if name == "q" else "DG" for name in "qkv"},
    **{f"blocks/attention/{name}/down": "DR" for name in "qkv"},
    **{f"blocks/attention/{name}/up": "RA" if name == "q" else "RG" for name in "qkv"},
    "blocks/attention/o/kernel": "AD",
    "blocks/attention/o/down": "AR",
    "blocks/attention/o/up": "RD",
    **{f"blocks/mlp/{name}/kernel": "DF" for name in ("gate", "up")},
    **{f"blocks/mlp/{name}/down": "DR" for name in ("gate", "up")},
    **{f"blocks/mlp/{name}/up": "RF" for name in ("gate", "up")},
    "blocks/mlp/out/kernel": "FD",
    "blocks/mlp/out/down": "FR",
    "blocks/mlp/out/up": "RD",
}

# A config.model as the first runs wrote it, with every key they had, and the arrays of their checkpoints. These two
# and the logits below never change: they are what old runs are.
OLD = {
    "vocab": 61,
    "d": 48,
    "layers": 2,
    "heads": 6,
    "rank": 10,
    "rank_split": [1.0, 1.0, 3.0, 3.0],
    "shared_kv": False,
}
OLD |= {"latent_norm": True, "mlp": 40, "mlp_rank": 0, "embed_rank": 0, "attention": "auto", "scan": True}
OLD |= {"remat": False}
OLD_ARRAYS = {
    "embed/table": (61, 48),
    "norm/gain": (48,),
    "blocks/attention_norm/gain": (2, 48),
    "blocks/mlp_norm/gain": (2, 48),
    "blocks/attention/q/down": (2, 48, 5),
    "blocks/attention/q/up": (2, 5, 48),
    "blocks/attention/k/down": (2, 48, 5),
    "blocks/attention/k/up": (2, 5, 48),
    "blocks/attention/v/down": (2, 48, 15),
    "blocks/attention/v/up": (2, 15, 48),
    "blocks/attention/o/down": (2, 48, 15),
    "blocks/attention/o/up": (2, 15, 48),
    "blocks/mlp/gate/kernel": (2, 48, 40),
    "blocks/mlp/up/kernel": (2, 48, 40),
    "blocks/mlp/out/kernel": (2, 40, 48),
}
OLD_LOGITS = [-0.73539, 0.172228, 0.569569, -0.246152, 0.796635, 1.553138]


def config_of(**changes):
    """Return a RunConfig of TOY with some fields of its model changed."""
    return run_config(**{f"model__{key}": value for key, value in (default_model() | TOY | changes).items()})


def default_model() -> dict:
    return default.get_config().to_dict()["model"]


def model_of(field: str, value) -> ModelConfig:
    return config_of(**(value if field in GROUPS else {field: value})).model


def all_at_once(without=()) -> dict:
    """Return the first value of every field, but for those in `without`."""
    return {field: values[0] for field, values in OPTIONS.items() if field not in without}


CASES = [(field, value) for field, values in OPTIONS.items() for value in values]
every_option = pytest.mark.parametrize("field, value", CASES, ids=[f"{field}={value}" for field, value in CASES])
# Options whose code depends on each other.
GROUPS = {
    "dense with one head of keys": {"rank": 0, "kv_heads": 1},
    "dense with three heads of keys": {"rank": 0, "kv_heads": 3},
    "norms beside a dense Q": {"latent_norm": True, "rank_split": DENSE_QO},
    "one latent for grouped heads": {"shared_kv": True, "kv_heads": 2},
}
every_model = pytest.mark.parametrize(
    "field, value",
    [*CASES, *GROUPS.items()],
    ids=[f"{field}={value}" for field, value in CASES] + [*GROUPS],
)


# ------------------------------------------------------------------------------------------------------ the table above


def test_every_field_has_values_that_are_not_the_default():
    for field in FIELDS:
        assert field in OPTIONS, f"OPTIONS has no entry for config.model.{field}: add a non-default value; {PAGE}"
        for value in OPTIONS[field]:
            assert value not in (default_model()[field], TOY.get(field)), f"{field}={value} is the default"
    assert set(OPTIONS) == set(FIELDS), f"OPTIONS names fields that ModelConfig lacks: {set(OPTIONS) - set(FIELDS)}"
    config_of(**all_at_once())  # raises where they do not fit together


@every_option
def test_an_option_changes_the_function_unless_it_says_otherwise(field, value):
    c, base = model_of(field, value), config_of().model
    tokens = some_tokens(base, 2, 24)
    logits, before = full(c, make(c), tokens), full(base, make(base), tokens)
    if field in HOW_ONLY:
        np.testing.assert_allclose(logits, before, atol=2e-5)
    else:
        assert logits.shape != before.shape or np.abs(logits - before).max() > 1e-3


@every_option
def test_every_array_reaches_the_logits(field, value):
    c = model_of(field, value)
    loss = lambda params: (full.__wrapped__(c, params, some_tokens(c, 2, 24)) ** 2).sum()
    gradients = jit(jax.grad(loss))(make(c))
    unused = [sharding.path_name(path) for path, g in jax.tree.leaves_with_path(gradients) if not np.any(g)]
    assert not unused, f"the logits do not depend on {unused}"


# ------------------------------------------------------------------------------------------------------------ the costs


@every_model
def test_the_costs_are_those_of_the_arrays(field, value):
    c = model_of(field, value)
    params, counts = abstract_params(c), costs.parameters(c)
    arrays = {
        "attention": count_under(params, ("blocks", "attention")),
        "mlp": count_under(params, ("blocks", "mlp")),
        "embedding": count_under(params, ("embed",)),
        "head": count_under(params, ("head",)),
        "norm": count_under(params, ("blocks", "attention_norm"), ("blocks", "mlp_norm"), ("norm",)),
        "total": count_under(params, ()),
    }
    assert counts == arrays, (
        f"model/costs.py `parameters` does not count what config.model.{field}={value} adds; {PAGE}"
    )
    cache = jax.tree.leaves(jax.eval_shape(lambda: decoder.empty_cache(c, 1, 1, jnp.float32)))
    assert costs.kv_bytes_per_token(c, 4)["latent"] == sum(4 * math.prod(x.shape) for x in cache)
    T, reference = 8, dataclasses.replace(c, attention="reference")  # which multiplies the whole square of T x T
    forward = lambda params: full.__wrapped__(reference, params, jnp.zeros((1, T), jnp.int32))
    traced = matmul_flops(jax.make_jaxpr(forward)(params).jaxpr) / T - c.layers * 2 * T * c.d
    assert 3 * traced == costs.train_flops_per_token(c, T)


# ------------------------------------------------------------------------------------------------------------- decoding

PROMPT, FOLLOWING = 32, 16


@functools.partial(jit, static_argnums=(0, 1))
def decoded(c: ModelConfig, read, w, tokens_BT) -> jax.Array:
    """Return logits [B, T, V] of a prompt of PROMPT tokens, read at once, and of FOLLOWING ones, read one by one."""
    B, starts_B = len(tokens_BT), jnp.zeros(len(tokens_BT), jnp.int32)
    logits = lambda x_BTD: decoder.logits(w, x_BTD.reshape(-1, c.d)).reshape(*x_BTD.shape[:2], -1)
    cache = decoder.empty_cache(c, B, decoder.BLOCK, jnp.float32)
    window = decoder.empty_window(c, B, PROMPT, jnp.float32)
    x_BTD, window = read(c, w, cache, window, tokens_BT[:, :PROMPT], decoder.Place(starts_B))
    cache = decoder.keep(cache, window, starts_B)

    def one(window, i):
        token_B1 = jax.lax.dynamic_slice_in_dim(tokens_BT, PROMPT + i, 1, 1)
        x_B1D, window = read(c, w, cache, window, token_B1, decoder.Place(starts_B + PROMPT, i))
        return window, logits(x_B1D)[:, 0]

    _, rest = jax.lax.scan(one, decoder.empty_window(c, B, FOLLOWING, jnp.float32), jnp.arange(FOLLOWING))
    return jnp.concatenate([logits(x_BTD), rest.swapaxes(0, 1)], axis=1)


@every_model
def test_cached_decoding_is_the_forward_pass(field, value):
    c = model_of(field, value)
    params, tokens = make(c), some_tokens(c, 2, PROMPT + FOLLOWING)
    expected = full(c, params, tokens)
    assert 0.3 < expected.std() < 3
    w = decoder.prepare(c, params, "fp32", jnp.float32)
    hint = f"inference/decoder.py does not compute config.model.{field}={value}; {PAGE}"
    np.testing.assert_allclose(decoded(c, decoder.read, w, tokens), expected, atol=3e-5, err_msg=hint)


@pytest.mark.slow
@every_option
def test_decoding_in_one_native_call_is_the_forward_pass(field, value):
    c = model_of(field, value)
    params = jax.device_put(make(c), sharding.whole(sharding.one_device()))
    tokens = some_tokens(c, 2, PROMPT + FOLLOWING)
    packed = cpu_decoder.pack(c, decoder.prepare(c, params, "fp32", jnp.float32))
    assert (packed is None) == ((field, value) in NOT_PACKED), f"add {field}={value} to NOT_PACKED if that is right"
    if packed:
        assert isinstance(packed.table, quantize.Panels) and decoder.absorbs(c, 1)
        hint = f"inference/cpu_decoder.py does not compute config.model.{field}={value}: refuse it in `pack`; {PAGE}"
        got = decoded(c, cpu_decoder.read, packed, tokens)
        np.testing.assert_allclose(got, full(c, params, tokens), atol=5e-5, err_msg=hint)


# -------------------------------------------------------------------------------------------------------------- exports


def exported(name: str, make, tok, folder, **changes) -> float:
    """Write a toy model in a format, and return the largest difference of its logits, or raise UsageError."""
    module, options, _ = FORMATS[name]
    model = exports.trained(make, tok, **default_model() | TOY | changes | {"vocab": tok.vocab_size})
    model = model._replace(progress=Progress(step=7, tokens=1234))
    return module.check(model, module.write(model, str(folder), **options), **options)


# An export takes seconds, so all options are in one model: what one of them changes shows beside the others too.
EXPORTS = [(name, "all at once") for name in FORMATS] + [
    (name, "dense") for name, (_, _, refused) in FORMATS.items() if ("rank", 0) not in refused
]


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", EXPORTS)
def test_an_export_computes_every_option_that_it_does_not_refuse(name, kind, make, tok, tmp_path):
    refused = [field for field, value in FORMATS[name][2] if value == OPTIONS[field][0]]
    changes = {"rank": 0} if kind == "dense" else all_at_once(without=refused)
    try:
        assert exported(name, make, tok, tmp_path / "out", **changes) <= 3e-5
    except (RunFailure, UsageError, TypeError, KeyError, RuntimeError) as e:
        pytest.fail(
            f"{name}: {e}. Compute each option in the export, or refuse it by name and say so in FORMATS; {PAGE}"
        )


REFUSED = [(name, field, value) for name, (_, _, refused) in FORMATS.items() for field, value in refused]


@pytest.mark.parametrize(
    "name, field, value", REFUSED, ids=[f"{name}: {field}={value}" for name, field, value in REFUSED]
)
def test_an_export_refuses_by_name(name, field, value, make, tok, tmp_path):
    with pytest.raises(UsageError, match=f"config.model.{field}") as e:
        exported(name, make, tok, tmp_path / "out", **{field: value})
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------- sharding


def intended(letters: str) -> tuple:
    """Return the mesh axes of an array's last dimensions, from what these are.

    A rank is never cut, so that latents are whole on every device. Weights are cut over `fsdp` along the model's width,
    and over `tensor` along heads, the MLP or the vocabulary. Beside a rank, that dimension is cut over both.
    """
    if len(letters) == 1:  # a gain is too small to cut
        return (None,)
    wide = (sharding.TENSOR, sharding.FSDP) if "R" in letters else sharding.TENSOR
    return tuple({"R": None, "D": sharding.FSDP}.get(letter, wide) for letter in letters)


@every_model
def test_every_array_is_cut_as_intended(field, value):
    c = model_of(field, value)
    mesh = AbstractMesh((1, 2, 2), sharding.AXES)
    params = abstract_params(c)
    layouts = jax.tree.leaves(sharding.of_tree(mesh, params))  # raises ValueError for a path that no rule matches
    sizes = {"D": c.d, "A": c.d, "G": c.kv_dim, "F": c.hidden, "V": c.vocab}
    for (path, x), layout in zip(jax.tree.leaves_with_path(params), layouts, strict=True):
        name = sharding.path_name(path)
        assert name in DIMENSIONS, f"DIMENSIONS does not say how {name} {x.shape} is meant to be cut; {PAGE}"
        letters = DIMENSIONS[name]
        assert sharding.axes_of(path, len(letters)) == intended(letters), f"machine/sharding.py: the rule for {name}"
        for size, letter in zip(x.shape[-len(letters) :], letters):
            assert size == sizes.get(letter, size) or (name.endswith("table") and size == c.embed_rank), name
        if len(letters) == 2 and math.prod(x.shape) > 512:
            assert math.prod(layout.shard_shape(x.shape)) < math.prod(x.shape), f"{name} is whole on every device"


# ------------------------------------------------------------------------------------------------------------- old runs


def test_a_field_makes_the_run_or_changes_how_it_is_computed():
    identity = {key.removeprefix("model.") for key in run_folder.IDENTITY if key.startswith("model.")}
    for field in FIELDS:
        assert (field in identity) != (field in HOW_ONLY), (
            f"config.model.{field} must be in run_folder.IDENTITY, or in HOW_ONLY of this test with a reason"
        )


@every_option
def test_a_run_with_an_option_is_read_back_and_not_resumed_with_another_value(field, value, tmp_path):
    config = config_of(**{field: value})
    run_folder.write_config(str(tmp_path), config)
    assert run_folder.read_config(str(tmp_path)) == config
    if field in HOW_ONLY:
        run_folder.check_same_run(str(tmp_path), config_of(), config)
    else:
        with pytest.raises(UsageError, match=f"its config.model.{field} is "):
            run_folder.check_same_run(str(tmp_path), config_of(), config)


@pytest.fixture
def old_run(tmp_path, tok):
    """Return a function that writes the folder of an old run and returns its config as it is read today."""
    values = run_config().to_dict() | {"model": OLD}
    (tmp_path / "config.json").write_text(json.dumps(values))
    tok.save(run_folder.tokenizer_folder(str(tmp_path)))

    def read():
        try:
            return run_folder.read_config(str(tmp_path))
        except UsageError as e:
            pytest.fail(f"{e}: give run_folder.LATER the value with which the model is what it was before; {PAGE}")

    return read


def test_a_config_without_later_fields_is_the_model_that_it_was(old_run):
    c = old_run().model
    assert not set(OLD) & set(run_folder.LATER), "run_folder.LATER has fields that every run has"
    arrays = {sharding.path_name(path): x.shape for path, x in jax.tree.leaves_with_path(abstract_params(c))}
    assert arrays == OLD_ARRAYS, f"run_folder.LATER makes old runs another model; {PAGE}"
    logits = full(c, make(c), some_tokens(c, 1, 12))[0, -1, :6]
    np.testing.assert_allclose(logits, OLD_LOGITS, atol=1e-4)


def test_a_checkpoint_of_an_old_run_opens(old_run, tmp_path):
    config = old_run()
    shapes = step.abstract_state(config, sharding.one_device())
    fill = lambda x: sharding.put(np.ones(x.shape, x.dtype), x.sharding)
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(jax.tree.map(fill, shapes), Progress(step=1))
    run = trained.open_run(str(tmp_path))
    arrays = {sharding.path_name(path): x.shape for path, x in jax.tree.leaves_with_path(run.params)}
    assert arrays == OLD_ARRAYS and run.config == config and network.head(run.config.model, run.params, jnp.ones(48))
