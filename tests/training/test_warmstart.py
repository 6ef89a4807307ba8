"""First weights from another run: arrays that fit are taken, others are listed, a deeper model computes the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_jax.config import ModelConfig, UsageError
from lowrank_jax.model import network
from lowrank_jax.training import warmstart

pytestmark = pytest.mark.slow

TOY = {
    "vocab": 61,
    "d": 24,
    "layers": 2,
    "heads": 2,
    "kv_heads": 0,
    "rank": 5,
    "rank_split": (1.0, 1.0, 1.0, 1.0),
    "shared_kv": False,
    "latent_norm": True,
    "mlp": 20,
    "mlp_rank": 0,
    "embed_rank": 0,
    "tied": True,
    "attention": "auto",
    "scan": True,
    "remat": False,
}
ODD = {"heads": 6, "d": 48, "rank": 10, "vocab": 257, "rank_split": (1.0, 1.0, 3.0, 3.0)}
FACTORED = {"mlp_rank": 7, "embed_rank": 9}

# Compiling is nearly all that these tests do, and takes half the time without LLVM's passes.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def toy(**changes) -> ModelConfig:
    return ModelConfig(**TOY | changes)


def trained(c: ModelConfig, seed: int = 0) -> dict:
    """Return random weights, also where a new model has zeros, that make logits of about 1."""
    rng = np.random.default_rng(seed)

    def draw(path, w):
        noise = rng.standard_normal(w.shape, np.float32)
        if path[-1].key == "gain":
            return 1 + 0.2 * noise
        return noise * (c.d**-0.5 if path[-1].key == "table" else w.shape[-2] ** -0.5)

    return jax.tree.map_with_path(draw, jax.eval_shape(lambda: network.init(c, jax.random.key(0))))


def fresh(c: ModelConfig) -> dict:
    """Return weights to be replaced. Most tests need no particular ones, and these compile nothing."""
    return trained(c, seed=1)


def forward(c: ModelConfig, params: dict, tokens_BT) -> jax.Array:
    return network.logits(c, params, network.features(c, params, tokens_BT))


logits = jit(forward, static_argnums=0)


@functools.partial(jit, static_argnums=0)
def logits_and_gradient(c: ModelConfig, params: dict, tokens_BT) -> tuple[jax.Array, dict]:
    def loss(params):
        logits_BTV = forward(c, params, tokens_BT)
        following = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV[:, :-1]), tokens_BT[:, 1:, None], axis=-1)
        return -following.mean(), logits_BTV

    gradient, logits_BTV = jax.grad(loss, has_aux=True)(params)
    return logits_BTV, gradient


def some_tokens(c: ModelConfig) -> np.ndarray:
    return np.random.default_rng(3).integers(0, c.vocab, (2, 19)).astype(np.int32)


def by_name(params: dict) -> dict[str, np.ndarray]:
    name = lambda path: "/".join(key.key for key in path)
    return {name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}


def reasons(taken: warmstart.Taken) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in taken.left)


def outputs(c: ModelConfig, params: dict) -> list[np.ndarray]:
    """Return the last factors of attention and MLP, [layers, in, D] each."""
    attention, mlp = params["blocks"]["attention"]["o"], params["blocks"]["mlp"]["out"]
    return [attention["up" if c.rank else "kernel"], mlp["up" if c.mlp_rank else "kernel"]]


# ------------------------------------------------------------------------------------------------- deeper models


@pytest.mark.parametrize(
    "layers, changes",
    [
        (4, {}),
        (5, {}),
        (3, {"layers": 1, "latent_norm": False}),
        (4, ODD),
        (5, {"shared_kv": True, "scan": False}),
        (3, {"mlp_rank": 7, "embed_rank": 9}),
        (3, {"tied": False, "rank": 0}),
    ],
    ids=str,
)
def test_a_deeper_model_computes_the_same_and_all_its_layers_learn(layers, changes):
    shallow, deep = toy(**changes), toy(**changes | {"layers": layers})
    source, tokens = trained(shallow), some_tokens(shallow)
    taken = warmstart.take(fresh(deep), source, same_tokens=True)
    assert taken.left == () and set(taken.taken) == set(by_name(source))
    expected = np.asarray(logits(shallow, source, tokens))
    assert 0.3 < expected.std() < 3
    got, gradient = logits_and_gradient(deep, taken.params, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-6, rtol=0)
    for factor, slope in zip(outputs(deep, taken.params), outputs(deep, gradient)):
        added = (np.asarray(factor) == 0).all(axis=(1, 2))
        assert added.sum() == layers - shallow.layers and not added[0]
        assert (np.abs(slope).max(axis=(1, 2)) > 1e-3).all()


def stack(layers: int, value: float) -> dict:
    """Return a minimal model with layers: in layer i, every weight is `value` + i."""
    weight = lambda: np.tile(np.arange(layers, dtype=np.float32)[:, None, None] + value, (1, 2, 3))
    attention, mlp = {"o": {"down": weight(), "up": weight()}}, {"out": {"kernel": weight()}, "up": {"up": weight()}}
    return {"blocks": {"attention": attention, "mlp": mlp}, "norm": {"gain": np.ones(3, np.float32)}}


@given(st.integers(1, 40), st.integers(0, 60))
def test_every_layer_is_there_once_in_order_and_all_others_are_identities(n, more):
    taken = warmstart.take(stack(n + more, 900), stack(n, 1), same_tokens=True)
    got = {name: x[:, 0, 0] for name, x in by_name(taken.params).items() if name.startswith("blocks")}
    assert all((x.min(axis=(1, 2)) == x.max(axis=(1, 2))).all() for x in by_name(taken.params["blocks"]).values())
    old = got["blocks/attention/o/up"] != 0
    for name in ("blocks/attention/o/up", "blocks/mlp/out/kernel"):
        np.testing.assert_array_equal(got[name][old], np.arange(n) + 1)
        assert (got[name][~old] == 0).all() and (~old).sum() == more
    for name in ("blocks/attention/o/down", "blocks/mlp/up/up"):  # a copy is of the layer before it
        np.testing.assert_array_equal(got[name], np.cumsum(old))


@given(st.integers(1, 40), st.integers(0, 60))
def test_added_layers_are_spread_evenly(n, more):
    layers = warmstart.layer_map(n, n + more)
    copies = np.bincount(layers, minlength=n)
    assert len(layers) == n + more and len(copies) == n and layers == sorted(layers)
    assert copies.min() >= 1
    for length in range(1, n + 1):  # any so many neighbours get as many added layers as any others, give or take one
        runs = np.convolve(copies, np.ones(length, int), "valid")
        assert runs.max() - runs.min() <= 1


def test_a_copy_comes_on_top_of_its_group_as_in_the_paper():
    assert warmstart.layer_map(32, 40) == [i for i in range(32) for _ in range(2 if i % 4 == 3 else 1)]
    assert warmstart.layer_map(8, 16) == [i // 2 for i in range(16)]
    assert warmstart.layer_map(3, 3) == [0, 1, 2]


@pytest.mark.parametrize(
    "old, new, note",
    [
        (8, 8, ""),
        (8, 16, "8 layers became 16: each is followed by a copy that starts as the identity"),
        (12, 17, "12 layers became 17: 5 of them added, as copies that start as the identity"),
        (8, 4, "8 layers do not fit into 4: the blocks keep their random weights"),
    ],
)
def test_the_note_says_how_layers_were_added(old, new, note):
    taken = warmstart.take(stack(new, 0), stack(old, 0), same_tokens=True)
    assert taken.note == note
    assert warmstart.describe(taken).splitlines()[-1].endswith(note)


def test_of_a_deeper_model_no_block_is_taken():
    params = fresh(toy(layers=1))
    taken = warmstart.take(params, trained(toy()), same_tokens=True)
    assert set(taken.taken) == {"embed/table", "norm/gain"}
    assert reasons(taken)["blocks/attention/q/down"] == "[2, 24, 5] in that run, [1, 24, 5] in this one"
    assert jax.tree.all(jax.tree.map(np.array_equal, taken.params["blocks"], params["blocks"]))


# ---------------------------------------------------------------------------------------------------- what fits


def test_a_model_of_the_same_shape_is_taken_whole():
    c = toy(**FACTORED)
    source = trained(c)
    taken = warmstart.take(fresh(c), source, same_tokens=True)
    assert jax.tree.structure(taken.params) == jax.tree.structure(source)
    assert jax.tree.all(jax.tree.map(np.array_equal, taken.params, source))
    assert taken.left == () and taken.note == ""
    count = sum(x.size for x in jax.tree.leaves(source))
    assert warmstart.describe(taken) == f"took 19 of 19 arrays, {count:,} of {count:,} parameters"


@pytest.mark.parametrize("layers", [2, 4])
def test_arrays_that_do_not_fit_stay_new_and_are_listed(layers):
    """V and O have other ranks and stay new; in a deeper model the other arrays are still spread over its layers."""
    params = fresh(toy(layers=layers, rank_split=(1.0, 1.0, 3.0, 3.0), rank=10))
    source = trained(toy())
    taken = warmstart.take(params, source, same_tokens=True)
    assert set(reasons(taken)) == {f"blocks/attention/{x}/{y}" for x in "vo" for y in ("down", "up")}
    assert reasons(taken)["blocks/attention/o/up"] == f"[2, 5, 24] in that run, [{layers}, 15, 24] in this one"
    got, old, new = by_name(taken.params), by_name(source), by_name(params)
    for name in reasons(taken):
        np.testing.assert_array_equal(got[name], new[name])
    for name in ("blocks/attention/q/down", "blocks/mlp_norm/gain", "blocks/mlp/gate/kernel"):
        np.testing.assert_array_equal(got[name], np.repeat(old[name], layers // 2, axis=0))
    text = warmstart.describe(taken)
    taken_size = sum(got[name].size for name in taken.taken)
    assert text.startswith(f"took {len(taken.taken)} of {len(got)} arrays, {taken_size:,} of ")
    assert all(f"\n  not taken: {line}" in text for line in taken.left)
    assert taken.note.endswith("not all of a block fits, so it computes something else") == (layers == 4)


def test_added_layers_are_identities_also_where_not_all_of_a_block_fits():
    """The outputs that do not fit stay those of a new model, which are zero."""
    other_ranks = {"rank": 10, "rank_split": (1.0, 1.0, 3.0, 3.0)}
    shallow, deep = toy(**other_ranks), toy(**other_ranks, layers=4)
    params = jit(network.init, static_argnums=0)(deep, jax.random.key(0))
    taken = warmstart.take(params, trained(toy()), same_tokens=True).params
    without = taken | {"blocks": jax.tree.map(lambda w: w[::2], taken["blocks"])}
    tokens = some_tokens(shallow)
    np.testing.assert_allclose(logits(deep, taken, tokens), logits(shallow, without, tokens), atol=1e-6, rtol=0)


@pytest.mark.parametrize("layers", [2, 3])
def test_arrays_that_only_one_of_the_two_has_are_listed(layers):
    taken = warmstart.take(fresh(toy(shared_kv=True, layers=layers)), trained(toy()), same_tokens=True)
    assert taken.left == ("blocks/attention/v/down: only in that run",)
    assert "computes something else" in taken.note or layers == 2
    taken = warmstart.take(fresh(toy(mlp_rank=7)), trained(toy()), same_tokens=True)
    assert {line for line in taken.left if "/out/" in line} == {
        "blocks/mlp/out/down: only in this run",
        "blocks/mlp/out/up: only in this run",
        "blocks/mlp/out/kernel: only in that run",
    }


def test_the_table_of_another_tokenizer_stays_new():
    c = toy(embed_rank=9)
    params, source = fresh(c), trained(c)
    taken = warmstart.take(params, source, same_tokens=False)
    assert taken.left == ("embed/table: its rows are those of another tokenizer",)
    np.testing.assert_array_equal(taken.params["embed"]["table"], params["embed"]["table"])
    np.testing.assert_array_equal(taken.params["embed"]["up"], source["embed"]["up"])


@pytest.mark.parametrize("changes", [{}, {"embed_rank": 9}], ids=str)
def test_a_head_of_its_own_starts_as_the_embedding_that_was_the_head(changes):
    tied, untied = toy(**changes), toy(**changes, tied=False)
    source, tokens = trained(tied), some_tokens(tied)
    taken = warmstart.take(fresh(untied), source, same_tokens=True)
    assert taken.left == () and not np.shares_memory(taken.params["head"]["table"], taken.params["embed"]["table"])
    np.testing.assert_array_equal(logits(untied, taken.params, tokens), logits(tied, source, tokens))
    new = warmstart.take(fresh(untied), source, same_tokens=False)
    assert sorted(reasons(new)) == ["embed/table", "head/table"]


def test_a_head_is_left_where_there_is_none():
    assert warmstart.take(fresh(toy()), trained(toy(tied=False)), True).left == ("head/table: only in that run",)


@pytest.mark.parametrize(
    "same_tokens, reason", [(True, "[61, 24] in that run, [67, 24] in this one"), (False, "another tokenizer")]
)
def test_a_table_of_another_size_stays_new(same_tokens, reason):
    params = fresh(toy(vocab=67, layers=4))
    taken = warmstart.take(params, trained(toy()), same_tokens)
    assert list(reasons(taken)) == ["embed/table"] and reason in taken.left[0]
    np.testing.assert_array_equal(taken.params["embed"]["table"], params["embed"]["table"])
    assert taken.note == "2 layers became 4: each is followed by a copy that starts as the identity"


def test_nothing_that_fits_is_one_line():
    with pytest.raises(UsageError) as e:
        warmstart.take(fresh(toy(d=48)), trained(toy()), same_tokens=True)
    assert str(e.value) == (
        "config.init_from: none of that run's weights fits this model (blocks/attention/k/down: [2, 24, 5] in "
        "that run, [2, 48, 5] in this one and 14 more); use its config.model"
    )


@pytest.mark.parametrize("layers", [2, 4])
def test_taken_arrays_have_the_dtype_of_the_model_and_memory_of_their_own(layers):
    source = jax.tree.map(lambda w: np.asarray(w, np.float64), trained(toy()))
    before = jax.tree.map(np.copy, source)
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), fresh(toy(layers=layers)))
    taken = warmstart.take(params, source, same_tokens=True)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(taken.params))
    on_host = trained(toy(layers=layers))
    taken = warmstart.take(on_host, jax.tree.map(np.float32, source), same_tokens=True)
    taken = warmstart.take(taken.params, jax.tree.map(jnp.asarray, taken.params), same_tokens=True)
    for x in jax.tree.leaves(taken.params):
        x += 1  # of device arrays, numpy's view is read-only: this is a copy
    assert jax.tree.all(jax.tree.map(np.array_equal, source, before))
