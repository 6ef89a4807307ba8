"""The network: cached decode equals the full forward pass, ALiBi acts at every step, low rank equals dense numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import default
from lowrank_jax.config import ModelConfig, RunConfig
from lowrank_jax.inference import decoder
from lowrank_jax.model import attention, network

TOY = {"vocab": 61, "d": 48, "layers": 2, "heads": 6, "rank": 10, "latent_norm": True, "mlp": 40}
EIGHT_HEADS = {"d": 64, "heads": 8}
FACTORED = {"d": 96, "rank": 24, "vocab": 512, "mlp_rank": 16, "embed_rank": 12, "layers": 4}
ONE_LAYER = {"layers": 1, "latent_norm": False}

# These tests mostly compile, which takes a fifth (init) to a half of the time without LLVM's passes.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def toy(**changes) -> ModelConfig:
    values = default.get_config().to_dict()
    values["model"].update(TOY | changes)
    return RunConfig.from_dict(values).model


def make(c: ModelConfig) -> dict:
    """Return random parameters for logits of about 1, also for the factors that start at zero."""
    rng = np.random.default_rng(0)

    def draw(path, w):
        noise = rng.standard_normal(w.shape, np.float32)
        if path[-1].key == "gain":
            return 1 + 0.2 * noise
        return noise * (c.d**-0.5 if path[-1].key == "table" else w.shape[-2] ** -0.5)

    return jax.tree.map_with_path(draw, jax.eval_shape(lambda: network.init(c, jax.random.key(0))))


def some_tokens(c: ModelConfig, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, c.vocab, shape).astype(np.int32)


def forward(c: ModelConfig, params: dict, tokens, segments=None, dtype=jnp.float32) -> jax.Array:
    return network.logits(c, params, network.features(c, params, tokens, segments, dtype))


full = jit(forward, static_argnums=(0, 4))
init = jit(network.init, static_argnums=0)


@functools.partial(jit, static_argnums=(0, 5))
def cached(c: ModelConfig, params: dict, prompts, lengths, following, dtype=jnp.float32) -> jax.Array:
    """Return the logits [B, 1 + steps, V] after each row's prompt and after each of its following tokens [B, steps]."""
    (B, T), steps = prompts.shape, following.shape[1]
    w = decoder.prepare(c, params, "fp32", dtype)
    cache = decoder.empty_cache(c, B, -(-(T + steps) // decoder.BLOCK) * decoder.BLOCK, dtype)
    starts_B = jnp.zeros(B, jnp.int32)
    x_BTD, window = decoder.read(c, w, cache, decoder.empty_window(c, B, T, dtype), prompts, decoder.Place(starts_B))
    cache = decoder.keep(cache, window, starts_B)
    first = decoder.logits(w, jnp.take_along_axis(x_BTD, (lengths - 1)[:, None, None], axis=1)[:, 0])

    def step(window, new):
        i, tokens = new
        x_B1D, window = decoder.read(c, w, cache, window, tokens[:, None], decoder.Place(lengths, i))
        return window, decoder.logits(w, x_B1D[:, 0])

    _, rest = jax.lax.scan(step, decoder.empty_window(c, B, steps, dtype), (jnp.arange(steps), following.T))
    return jnp.concatenate([first[None], rest]).swapaxes(0, 1)


def cut(tokens: np.ndarray, lengths: list[int], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each row's prompt, right-padded with other tokens, and the `steps` tokens that follow it."""
    prompts = np.full((len(lengths), max(lengths)), 7, np.int32)
    for row, tokens_T, n in zip(prompts, tokens, lengths):
        row[:n] = tokens_T[:n]
    return prompts, np.stack([t[n : n + steps] for t, n in zip(tokens, lengths)])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shared_kv": True},
        {"latent_norm": False, "scan": False},
        EIGHT_HEADS | {"shared_kv": True, "latent_norm": False},
        EIGHT_HEADS | {"scan": False},
        {"heads": 8, "shared_kv": True, "mlp_rank": 5, "embed_rank": 24, "remat": True},
        EIGHT_HEADS | {"tied": False, "embed_rank": 12},
    ],
    ids=str,
)
def test_cached_decode_equals_full_forward_far_beyond_the_prompt(changes):
    c, lengths, steps = toy(**changes), [16, 5, 1], 134
    params, tokens = make(c), some_tokens(c, 3, 150)
    expected = np.asarray(full(c, params, tokens))
    prompts, following = cut(tokens, lengths, steps)
    decoded = np.asarray(cached(c, params, prompts, np.asarray(lengths), following))
    assert 0.3 < expected.std() < 3
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(decoded[row], expected[row, n - 1 : n + steps], atol=2e-5)


def test_cached_decode_stays_close_to_full_forward_in_bfloat16():
    c = toy(layers=1)
    params, tokens = make(c), some_tokens(c, 2, 40)
    expected = full(c, params, tokens, None, jnp.bfloat16)
    decoded = cached(c, params, tokens[:, :20], np.full(2, 20), tokens[:, 20:], jnp.bfloat16)
    assert decoded.dtype == expected.dtype == jnp.float32
    np.testing.assert_allclose(decoded, expected[:, 19:], atol=0.1)


def softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def normed(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)


def dense_forward(c: ModelConfig, params: dict, tokens_T: np.ndarray) -> np.ndarray:
    """Return the logits of the textbook model: dense matrices (products of the factors), loops, float64."""
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    slopes_H = attention.alibi_slopes(c.heads).astype(np.float64)
    product = lambda linear: linear["down"] @ linear["up"]
    T = len(tokens_T)
    x = p["embed"]["table"][tokens_T]
    for layer in range(c.layers):
        b = jax.tree.map(lambda w, n=layer: w[n], p["blocks"])
        h = normed(x) * b["attention_norm"]["gain"]
        q, k, v = ((h @ product(b["attention"][name])).reshape(T, c.heads, -1) for name in "qkv")
        out = np.zeros((T, c.heads, c.head_dim))
        for i in range(T):
            for head, slope in enumerate(slopes_H):
                scores = k[: i + 1, head] @ q[i, head] / np.sqrt(c.head_dim) - slope * (i - np.arange(i + 1))
                out[i, head] = softmax(scores) @ v[: i + 1, head]
        x = x + out.reshape(T, c.d) @ product(b["attention"]["o"])
        h = normed(x) * b["mlp_norm"]["gain"]
        gate = h @ b["mlp"]["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ b["mlp"]["up"]["kernel"])) @ b["mlp"]["out"]["kernel"]
    return normed(x) * p["norm"]["gain"] @ p["embed" if c.tied else "head"]["table"].T


@pytest.mark.parametrize("rank, tied", [(48, True), (5, False)], ids=["full rank", "low rank, untied"])
def test_low_rank_model_equals_the_dense_model_of_the_product_matrices(rank, tied):
    c = toy(latent_norm=False, rank=rank, rank_split=(1, 1, 1, 1), tied=tied)
    params, tokens = make(c), some_tokens(c, 2, 21)
    expected = np.stack([dense_forward(c, params, row) for row in tokens])
    np.testing.assert_allclose(full(c, params, tokens), expected, atol=5e-5)


def test_full_rank_represents_any_dense_matrix():
    c = toy(latent_norm=False, rank=48, rank_split=(1, 1, 1, 1))
    params, tokens = make(c), some_tokens(c, 1, 12)
    factored = jax.tree.map(np.copy, params)
    for name, linear in factored["blocks"]["attention"].items():
        dense = params["blocks"]["attention"][name]
        linear["down"], linear["up"] = dense["down"] @ dense["up"], np.stack([np.eye(48, dtype=np.float32)] * c.layers)
    np.testing.assert_allclose(full(c, factored, tokens), full(c, params, tokens), atol=5e-5)


def without_queries(c: ModelConfig) -> dict:
    """Return parameters whose queries and MLP are zero, so attention depends on the bias alone."""
    params = make(c)
    params["blocks"]["attention"]["q"]["up"] *= 0
    params["blocks"]["mlp"]["out"]["kernel"] *= 0
    return params


def bias_only_layer(c: ModelConfig, params: dict, tokens_T: np.ndarray) -> np.ndarray:
    """Return a layer's logits from numpy: each head averages the value latents by softmax(-m (i - j)) over j <= i."""
    b = jax.tree.map(lambda w: np.asarray(w[0], np.float64), params["blocks"])
    table = np.asarray(params["embed"]["table"], np.float64)
    x_TD = table[tokens_T]
    latent_TR = normed(normed(x_TD) * b["attention_norm"]["gain"] @ b["attention"]["v"]["down"])
    heads_RHK = b["attention"]["v"]["up"].reshape(-1, c.heads, c.head_dim)
    slopes = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]  # as published for 6 heads
    out = []
    for i in range(len(tokens_T)):
        means_HR = [softmax(-m * (i - np.arange(i + 1.0))) @ latent_TR[: i + 1] for m in slopes]
        out.append(np.concatenate([mean @ heads_RHK[:, h] for h, mean in enumerate(means_HR)]))
    x_TD = x_TD + np.stack(out) @ b["attention"]["o"]["down"] @ b["attention"]["o"]["up"]
    return normed(x_TD) * np.asarray(params["norm"]["gain"]) @ table.T


def test_bias_alone_weighs_the_latents_at_every_decode_step():
    c, lengths, steps = toy(layers=1), [4, 9], 60
    params, tokens = without_queries(c), some_tokens(c, 2, 69)
    prompts, following = cut(tokens, lengths, steps)
    expected = np.stack([bias_only_layer(c, params, row) for row in tokens])
    in_full = full(toy(layers=1, attention="reference"), params, tokens)
    np.testing.assert_allclose(in_full, expected, atol=2e-5)
    decoded = cached(c, params, prompts, np.asarray(lengths), following)
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(decoded[row], expected[row, n - 1 : n + steps], atol=2e-5)


def last_logits_of_two_prefix_orders(c: ModelConfig, by_decode: bool) -> np.ndarray:
    """Return the last logits [2, V] of a sequence, and of one with the tokens before its last permuted."""
    params, tokens = make(c), some_tokens(c, 2, 14)
    tokens[1] = [*np.random.default_rng(3).permutation(tokens[0, :-1]), tokens[0, -1]]

    def run(params):
        if not by_decode:
            return forward(c, params, tokens)[:, -1]
        return cached.__wrapped__(c, params, tokens[:, :-1], jnp.full(2, 13), tokens[:, -1:])[:, 1]

    return np.asarray(jit(run)(params))


@pytest.mark.parametrize("by_decode", [False, True], ids=["full", "decode"])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_order_of_the_prefix_reaches_one_layer_through_the_slopes_alone(backend, by_decode, monkeypatch):
    c = toy(**ONE_LAYER, attention=backend)
    ordered, permuted = last_logits_of_two_prefix_orders(c, by_decode)
    assert np.abs(ordered - permuted).max() > 0.05
    monkeypatch.setattr(attention, "alibi_slopes", lambda heads: np.zeros(heads, np.float32))
    ordered, permuted = last_logits_of_two_prefix_orders(c, by_decode)
    np.testing.assert_allclose(ordered, permuted, atol=1e-5)


def test_padding_after_a_prompt_changes_no_logits():
    c, lengths = toy(), np.asarray([9, 9])
    params, tokens = make(c), some_tokens(c, 2, 20)
    tokens[1, :9], tokens[1, 12:] = tokens[0, :9], tokens[0, 12:]
    assert (tokens[0, 9:12] != tokens[1, 9:12]).any()
    logits = cached(c, params, tokens[:, :12], lengths, tokens[:, 12:])
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-6)


@functools.cache
def compiled_gradients(scan: bool, remat: bool):
    c = toy(scan=scan, remat=remat)
    loss = lambda params, tokens: jax.nn.logsumexp(forward(c, params, tokens)).sum()
    return jit(jax.value_and_grad(loss)).lower(make(c), some_tokens(c, 2, 128)).compile()


@pytest.mark.parametrize("scan, remat", [(False, False), (True, True)])
def test_unrolled_and_remat_have_the_loss_and_gradients_of_scan(scan, remat):
    params, tokens = make(toy()), some_tokens(toy(), 2, 128)
    loss, grads = compiled_gradients(True, False)(params, tokens)
    other_loss, other_grads = compiled_gradients(scan, remat)(params, tokens)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), other_grads, grads)


def test_remat_keeps_fewer_activations_for_the_backward_pass():
    temporary = lambda remat: compiled_gradients(True, remat).memory_analysis().temp_size_in_bytes
    assert temporary(True) < 0.8 * temporary(False)


@pytest.mark.parametrize("changes", [{}, FACTORED, FACTORED | {"tied": False}], ids=["plain", "factored", "untied"])
def test_blocks_are_the_identity_and_predictions_nearly_uniform_at_init(changes):
    c = toy(**changes)
    params, tokens = init(c, jax.random.key(0)), some_tokens(c, 1, 9)
    x = params["embed"]["table"][tokens]
    x = x @ params["embed"]["up"] if c.embed_rank else x
    untouched = normed(np.asarray(x))
    weights = params["embed" if c.tied else "head"]
    head = weights["table"].T
    head = weights["up"].T @ head if c.embed_rank else head
    assert c.tied or np.abs(np.corrcoef(weights["table"].ravel(), params["embed"]["table"].ravel())[0, 1]) < 0.1
    logits = full(c, params, tokens)
    np.testing.assert_allclose(logits, untouched @ head, atol=1e-5)
    assert -jax.nn.log_softmax(logits).mean() < np.log(c.vocab) + 1


def test_every_matrix_starts_with_the_variance_of_its_docstring():
    c = toy(**FACTORED)
    params = init(c, jax.random.key(0))
    projection, mlp = params["blocks"]["attention"]["v"], params["blocks"]["mlp"]
    rank_v = c.ranks[2]
    assert projection["down"].shape == (4, 96, rank_v) and mlp["out"]["down"].shape == (4, 40, 16)
    s = lambda d_in, d_out: 0.9 * (1 + (d_out / d_in) ** 0.5)
    expected = [(projection["down"], s(96, 96) / 96), (projection["up"], s(96, 96) / 96)]
    expected += [(mlp["gate"]["down"], s(96, 40) / 96), (mlp["up"]["up"], s(96, 40) / 40)]
    expected += [(mlp["out"]["down"], s(40, 96) / 40)]
    expected += [(params["embed"]["table"], (4 / c.d) ** 2), (params["embed"]["up"], 1 / 12)]
    for w, variance in expected:
        np.testing.assert_allclose(np.std(w), variance**0.5, rtol=0.1)
    layers = np.asarray(projection["down"]).reshape(4, -1)
    assert np.abs(np.corrcoef(layers) - np.eye(4)).max() < 0.2  # the layers differ
    assert not np.any(params["blocks"]["attention"]["o"]["up"]) and not np.any(mlp["out"]["up"])


@pytest.mark.parametrize("d_in, d_out", [(256, 256), (256, 704), (704, 256)])
def test_factors_start_as_large_as_the_svds_of_a_dense_matrix(d_in, d_out):
    u, s, vt = np.linalg.svd(np.random.default_rng(0).standard_normal((d_in, d_out)) / d_in**0.5, full_matrices=False)
    linear = network.Linear(None, nnx.Rngs(0), d_in, d_out, 32)
    np.testing.assert_allclose(np.std(linear.down[...]), np.std(u[:, :32] * s[:32] ** 0.5), rtol=0.1)
    np.testing.assert_allclose(np.std(linear.up[...]), np.std(s[:32, None] ** 0.5 * vt[:32]), rtol=0.1)


def test_a_vocabulary_of_257_works_in_forward_prefill_and_decode():
    c = toy(vocab=257, layers=1)
    params, tokens = make(c), some_tokens(c, 2, 8)
    tokens[:, -1] = 256
    expected = full(c, params, tokens)
    assert expected.shape == (2, 8, 257)
    decoded = cached(c, params, tokens[:, :4], np.full(2, 4), tokens[:, 4:])
    np.testing.assert_allclose(decoded, expected[:, 3:], atol=2e-5)


def test_packed_segments_equal_separate_documents():
    c = toy()
    params, documents = make(c), some_tokens(c, 3, 11)
    packed = full(c, params, documents.reshape(1, -1), np.repeat([1, 2, 5], 11)[None])
    np.testing.assert_allclose(packed.reshape(3, 11, -1), full(c, params, documents), atol=2e-5)


def test_later_tokens_do_not_change_earlier_logits():
    c = toy()
    params, tokens = make(c), some_tokens(c, 2, 32)
    tokens[1, :17] = tokens[0, :17]
    logits = np.asarray(full(c, params, tokens))
    np.testing.assert_allclose(logits[0, :17], logits[1, :17], atol=1e-6)
    assert np.abs(logits[0, 17] - logits[1, 17]).max() > 0.05


def test_the_gradient_of_swiglu_is_that_of_its_definition():
    gate, up, g = 3 * np.random.default_rng(0).standard_normal((3, 500)).astype(np.float32)
    definition = lambda gate, up: gate / (1 + jnp.exp(-gate)) * up
    (ours, pull), (exact, exact_pull) = jax.vjp(network.swiglu, gate, up), jax.vjp(definition, gate, up)
    for a, b in zip((ours, *pull(g)), (exact, *exact_pull(g)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_dense_model_has_no_latents_to_normalise():
    plain, normed = (toy(rank=0, latent_norm=latent_norm) for latent_norm in (False, True))
    params, tokens = make(plain), some_tokens(plain, 1, 9)
    np.testing.assert_array_equal(full(plain, params, tokens), full(normed, params, tokens))
