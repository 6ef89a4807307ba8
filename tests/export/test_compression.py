"""Compression to low rank: exact at full rank, optimal below it, and the result is a run that can be trained."""

import dataclasses

import exports
import jax
import numpy as np
import pytest
import runs
import scipy.linalg

from lowrank_jax.config import UsageError
from lowrank_jax.export import compression
from lowrank_jax.machine import sharding
from lowrank_jax.model import network
from lowrank_jax.training import run_folder
from lowrank_jax.training.trained import open_run

pytestmark = pytest.mark.slow


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def correlated(rows: int, width: int, seed: int = 1) -> np.ndarray:
    """Inputs that are large in some directions and small in others."""
    return random(rows, width, seed=seed) * 0.7 ** np.arange(width) @ np.linalg.qr(random(width, width, seed=9))[0]


def test_at_full_rank_the_product_is_the_matrix():
    w, x, y = random(24, 16), correlated(200, 24), correlated(200, 16, 2)
    for metric in (None, y.T @ y):
        down, up = compression.factors(w, x.T @ x, 16, metric)
        np.testing.assert_allclose(down.astype(float) @ up, w, atol=2e-6)
    np.testing.assert_allclose(np.sum(down.astype(float) ** 2, 0), np.sum(up.astype(float) ** 2, 1), rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_no_other_product_has_less_error(rank):
    w, x, y = random(24, 16), correlated(500, 24), correlated(300, 16, 2)
    cost = lambda product: np.linalg.norm(x @ (w - product))
    through = lambda product: np.linalg.norm(x @ (w - product) @ y.T)
    plain = np.linalg.svd(w, full_matrices=False)
    plain = (plain[0][:, :rank] * plain[1][:rank]) @ plain[2][:rank]
    best = np.matmul(*compression.factors(w, x.T @ x, rank))
    best_through = np.matmul(*compression.factors(w, x.T @ x, rank, y.T @ y))
    expected = np.linalg.svd(x @ w, compute_uv=False)[rank:]  # Eckart and Young: no rank does better
    assert cost(best) == pytest.approx(np.sum(expected**2) ** 0.5, rel=1e-3)
    expected = np.linalg.svd(x @ w @ y.T, compute_uv=False)[rank:16]
    assert through(best_through) == pytest.approx(np.sum(expected**2) ** 0.5, rel=1e-3)
    assert cost(best) < 0.95 * cost(plain) and through(best_through) < 0.95 * through(best)
    assert compression.error(w, best, x.T @ x) == pytest.approx(cost(best) / np.linalg.norm(x @ w))


def test_directions_without_input_are_no_obstacle():
    x = np.pad(random(50, 6), ((0, 0), (0, 6)))
    down, up = compression.factors(random(12, 8), x.T @ x, 6)
    assert np.isfinite(down).all() and compression.error(random(12, 8), down @ up, x.T @ x) < 1e-3


@pytest.fixture(scope="module")
def dense(make, tok, tmp_path_factory):
    model = exports.trained(make, tok, rank=0)
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    path.write_text("\n\n".join(make.prose(60, seed) for seed in range(60)))
    phase = make.phase(f"text:{path}", eval_fraction=0.2, block=48, tokens_per_step=480, eval_tokens=480)
    return model._replace(
        config=dataclasses.replace(model.config, pretrain=phase),
        params=jax.device_put(model.params, sharding.whole(sharding.one_device())),
    )


def features(config, params, batch) -> np.ndarray:
    return np.asarray(network.features(config.model, params, batch["tokens"], batch["segments"]))


@pytest.mark.parametrize("mlp_rank", [0, 32])
def test_a_model_of_full_rank_computes_the_same(dense, mlp_rank):
    text, held_out = compression.texts(dense, "", 960)
    config, params = compression.compress(dense, 32, (1, 1, 1, 1), mlp_rank, text)
    assert config.model.ranks == (32,) * 4 and not config.model.latent_norm and config.model.mlp_rank == mlp_rank
    shapes = jax.eval_shape(lambda: network.init(config.model, jax.random.key(0)))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, shapes)
    for batch in held_out:
        np.testing.assert_allclose(
            features(config, params, batch), features(dense.config, dense.params, batch), atol=2e-4
        )


def test_more_rank_is_less_error(dense):
    text, held_out = compression.texts(dense, "", 960)
    errors = []
    for rank in (4, 16):
        config, params = compression.compress(dense, rank, (1, 1, 3, 3), 2 * rank, text)
        errors.append(compression.errors(dense.config.model, dense.params, params, held_out))
    assert all(0 < high[name] < low[name] < 1 for low, high in zip(*errors) for name in low)
    assert [set(row) for row in errors[0]] == [set("qkvo") | {"gate", "up", "out"}] * 2


def normed(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * gain


def row_inputs(c, params: dict, tokens_T: np.ndarray, segments_T: np.ndarray) -> list[dict]:
    """Return the inputs of every layer's matrices for one row of text, with keys and queries: loops in float64."""
    T, rows = len(tokens_T), []
    x = params["embed"]["table"][tokens_T]
    for i in range(c.layers):
        block = jax.tree.map(lambda w, i=i: w[i], params["blocks"])
        w = {name: block[group][name]["kernel"] for group, names in compression.MATRICES.items() for name in names}
        h = normed(x, block["attention_norm"]["gain"])
        q, k, v = ((h @ w[name]).reshape(T, c.heads, c.head_dim) for name in "qkv")
        o = np.zeros((T, c.heads, c.head_dim))
        for t in range(T):
            past = np.array([s for s in range(t + 1) if segments_T[s] == segments_T[t]])
            for head in range(c.heads):  # of 8, whose slopes are 1/2, 1/4, ...
                e = np.exp(k[past, head] @ q[t, head] / c.head_dim**0.5 - 0.5 ** (head + 1) * (t - past))
                o[t, head] = e / e.sum() @ v[past, head]
        o = o.reshape(T, c.d)
        x = x + o @ w["o"]
        m = normed(x, block["mlp_norm"]["gain"])
        gate = m @ w["gate"]
        out = gate / (1 + np.exp(-gate)) * (m @ w["up"])
        x = x + out @ w["out"]
        rows.append(dict.fromkeys("qkv", h) | {"o": o, "gate": m, "up": m, "out": out, "keys": k, "queries": q})
    return rows


def test_moments_are_those_of_an_explicit_forward_pass(dense):
    """Covers all layers and batches, and texts that do not see each other; factors and errors follow the moments."""
    c = dense.config.model
    tokens = np.random.default_rng(0).integers(0, c.vocab, (4, 24)).astype(np.int32)
    segments = np.array([[1] * n + [2] * (24 - n) for n in (5, 24, 17, 12)], np.int32)
    batches = [{"tokens": tokens[rows], "segments": segments[rows]} for rows in (slice(0, 2), slice(2, 4))]
    params = jax.tree.map(lambda w: np.asarray(w, np.float64), dense.params)
    rows = [row_inputs(c, params, *row) for row in zip(tokens, segments)]
    seen = [moments for _, moments in compression.activations(c, dense.params, batches)]
    _, low = compression.compress(dense, 16, (1, 1, 1, 1), 16, batches)
    errors = compression.errors(c, dense.params, low, batches)
    assert len(seen) == len(errors) == c.layers == 2
    for i in range(c.layers):
        inputs = {name: np.concatenate([row[i][name] for row in rows]) for name in rows[0][i]}
        moments = {name: np.einsum("n...i,n...j->...ij", x, x) for name, x in inputs.items()}
        assert set(seen[i]) == set(moments)
        for name, expected in moments.items():
            np.testing.assert_allclose(seen[i][name], expected, atol=1e-4 * np.abs(expected).max())
        # The keys of its head weigh the error of a query, the columns of O that of a value.
        metrics = {name: scipy.linalg.block_diag(*moments[other]) for name, other in (("q", "keys"), ("k", "queries"))}
        o = params["blocks"]["attention"]["o"]["kernel"][i]
        metrics["v"] = o @ o.T
        for group, name in ((group, name) for group, names in compression.MATRICES.items() for name in names):
            w, factors = params["blocks"][group][name]["kernel"][i], low["blocks"][group][name]
            best = np.matmul(*compression.factors(w, moments[name], 16, metrics.get(name)))
            np.testing.assert_allclose(factors["down"][i] @ factors["up"][i], best, atol=1e-3 * np.abs(w).max())
            share = np.linalg.norm(inputs[name] @ (w - best)) / np.linalg.norm(inputs[name] @ w)
            assert errors[i][name] == pytest.approx(share, rel=1e-3)


def test_equal_matrices_keep_their_own_inputs(dense):
    """As in a model whose Q and K share a tensor, or whose matrices are still zero."""
    attention = dict(dense.params["blocks"]["attention"])
    for name in "kvo":
        attention[name] = attention["q"]
    params = dense.params | {"blocks": dense.params["blocks"] | {"attention": attention}}
    batch = {"tokens": np.arange(48, dtype=np.int32)[None], "segments": np.ones((1, 48), np.int32)}
    row = row_inputs(dense.config.model, jax.tree.map(np.float64, params), batch["tokens"][0], batch["segments"][0])[0]
    _, moments = next(compression.activations(dense.config.model, params, [batch]))
    for name in "qkvo":
        np.testing.assert_allclose(moments[name], row[name].T @ row[name], rtol=1e-3, atol=1e-3)
    assert {"keys", "queries"} < set(moments)


def test_weights_that_fp32_cannot_multiply_are_refused(dense):
    text, held_out = compression.texts(dense, "", 960)
    huge = dense._replace(params=dense.params | {"blocks": jax.tree.map(lambda w: w * 1e20, dense.params["blocks"])})
    with pytest.raises(UsageError, match="the inputs of .* in layer 0 are not finite"):
        compression.compress(huge, 16, (1, 1, 1, 1), 0, text)
    with pytest.raises(UsageError, match="the loss on the text is not finite"):
        compression.report([{}], float("nan"), 1.0)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "dense"
    code, _, err = runs.train(data, folder, model__rank=0, sft__steps=0)
    assert code == 0, err
    return folder


def test_a_run_is_compressed_and_trained_further(run, data, tmp_path):
    out = tmp_path / "low"
    code, said, err = runs.run("compress", f"--from={run}", "--rank=4", f"--out={out}", "--tokens=2000", "--json")
    assert code == 0, err
    facts = runs.last_json(said)
    assert facts["ranks"] == [2, 2, 6, 6] and len(facts["errors"]) == 2 and "bits per byte" in said
    assert facts["parameters_after"] < facts["parameters_before"]
    low = open_run(str(out))
    assert low.config.model.rank == 4 and not low.config.model.latent_norm and low.progress.step == 0
    changes = {"model__latent_norm": False, "sft__steps": 0}
    code, said, err = runs.train(data, out, **changes)
    assert code == 0, err
    first = [row for row in runs.rows(out, "metrics.jsonl") if "split" in row][0]
    assert first["step"] == 0 and first["bits_per_byte"] == pytest.approx(facts["bits_per_byte_after"], abs=0.2)
    assert run_folder.newest_checkpoint(str(out)) == 9


def test_mistakes_get_one_line_and_leave_nothing(run, dense, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    runs.assert_one_line(*runs.run("compress", f"--from={run}", "--rank=4", f"--out={tmp_path}/full")[::2], 2, "full")
    runs.assert_one_line(*runs.run("compress", f"--from={run}", "--rank=33", f"--out={tmp_path}/x")[::2], 2, "rank=33")
    low, grouped = (
        dataclasses.replace(dense.config, model=dataclasses.replace(dense.config.model, **more))
        for more in ({"rank": 4}, {"kv_heads": 1})
    )
    for config, args, name in (
        (low, (4, (1, 1, 3, 3), 0), "rank=4"),
        (grouped, (4, (1, 1, 3, 3), 0), "kv_heads=1"),
        (dense.config, (32, (1, 1, 3, 3), 0), "rank_split=1,1,3,3"),
        (dense.config, (8, (1, 1, 1, 1), 33), "mlp_rank=33"),
    ):
        with pytest.raises(UsageError, match=name):
            compression.low_rank(config, *args)
    for text in ("1,1,1", "a,b,c,d", "1,1,0,1"):
        with pytest.raises(UsageError, match="rank_split"):
            compression.read_split(text)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]
