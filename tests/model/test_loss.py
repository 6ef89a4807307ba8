"""The head's loss in parts has the values and gradients of the formula, and no part has too many tokens."""

import math

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.model import loss

OPTIONS = [(0.0, 0.0), (0.2, 0.03)]  # (label smoothing, z-loss)
SCALE, PULL = 0.37, 3.0  # factors of the objective, and of its cotangent


def draw(rows: int, length: int, width: int, vocab: int) -> tuple[np.ndarray, ...]:
    """Return (table, x, targets, weights) with logits of several nats and weights from 0 to 2."""
    rng = np.random.default_rng(rows * length + width)
    table, x = rng.standard_normal((vocab, width), np.float32), rng.standard_normal((rows, length, width), np.float32)
    weights = (2 * rng.random((rows, length)) * (rng.random((rows, length)) < 0.8)).astype(np.float32)
    return table, x, rng.integers(0, vocab, (rows, length)).astype(np.int32), weights


def by_formula(table, x, targets, weights, smoothing: float, z_loss: float) -> tuple:
    """Return (objective, cross-entropy, the objective's gradients for the table and for x) from all logits at once."""
    table, x, weights = (a.astype(np.float64) for a in (table, x, weights))
    vocab, logits = len(table), x @ table.T
    log_z = np.log(np.exp(logits).sum(-1, keepdims=True))
    smooth = (1 - smoothing) * np.eye(vocab)[targets] + smoothing / vocab
    per_token = -(smooth * (logits - log_z)).sum(-1) + z_loss * log_z[..., 0] ** 2
    nats = -np.take_along_axis(logits - log_z, targets[..., None], -1)[..., 0]
    of_logits = np.exp(logits - log_z) * (1 + 2 * z_loss * log_z) - smooth
    of_logits *= weights[..., None]
    of_table, of_x = np.einsum("btv,bte->ve", of_logits, x), np.einsum("btv,ve->bte", of_logits, table)
    return (per_token * weights).sum(), (nats * weights).sum(), of_table, of_x


def by_parts(table, x, targets, weights, smoothing: float, z_loss: float) -> tuple:
    """Return the same from `through_head`, with PULL x SCALE in the gradients."""

    def pulled(table, x):
        objective, nats = loss.through_head(table, x, targets, weights, SCALE, smoothing, z_loss)
        return PULL * objective + 5 * nats, (objective, nats)  # the cross-entropy alone trains nothing

    (_, values), grads = jax.value_and_grad(pulled, argnums=(0, 1), has_aux=True)(table, x)
    return *values, *grads


def errors(arrays, results, smoothing: float, z_loss: float) -> list[float]:
    """Return the relative errors of `by_parts`' results for these arrays."""
    factors = (SCALE, 1.0, SCALE * PULL, SCALE * PULL)
    exact = [factor * a for factor, a in zip(factors, by_formula(*arrays, smoothing, z_loss))]
    return [float(np.abs(np.asarray(a) - b).max() / np.abs(b).max()) for a, b in zip(results, exact, strict=True)]


class Parts(list):
    """A list of the shapes of all logits in a traced program; it replaces `loss.objective_sum`."""

    def __init__(self, tokens: int, patch):
        self.objective_sum = loss.objective_sum
        patch.setattr(loss, "objective_sum", self.record)
        patch.setattr(loss, "TOKENS", tokens)

    def record(self, logits_BTV, *args):
        self.append(logits_BTV.shape)
        return self.objective_sum(logits_BTV, *args)

    @property
    def tokens(self) -> int:
        return max(math.prod(shape[:-1]) for shape in self)


@pytest.mark.parametrize("smoothing, z_loss", OPTIONS)
def test_several_parts_have_the_values_and_gradients_of_all_logits_at_once(monkeypatch, smoothing, z_loss):
    """3 rows of 12 tokens in parts of at most 17 tokens: three parts, as 5 does not divide 12."""
    parts, arrays = Parts(17, monkeypatch), draw(3, 12, 5, 7)
    results = jax.jit(by_parts, static_argnums=(4, 5))(*arrays, smoothing, z_loss)
    assert set(parts) == {(3, 4, 7)}
    assert max(errors(arrays, results, smoothing, z_loss)) < 1e-5
    alone = loss.through_head(*arrays, SCALE, smoothing, z_loss)  # without gradients
    assert set(parts) == {(3, 4, 7)}
    np.testing.assert_allclose(alone, results[:2], rtol=1e-5)


def test_logits_are_fp32_where_everything_else_is_bf16(monkeypatch):
    Parts(8, monkeypatch)
    table, x, *rest = draw(2, 16, 64, 7)  # logits of 8 and more, whose steps in bf16 are 1/32
    half = table.astype(jnp.bfloat16), x.astype(jnp.bfloat16), *rest
    results = by_parts(*half, 0.0, 0.0)
    assert [g.dtype for g in results[2:]] == [jnp.bfloat16] * 2
    as_given = [np.asarray(a, np.float32) for a in half[:2]]
    *of_values, of_table, of_x = errors((*as_given, *rest), results, 0.0, 0.0)
    assert max(of_values) < 1e-5 and max(of_table, of_x) < 0.01


@pytest.mark.parametrize("rows, length", [(1, 65536), (4, 3000), (2048, 6)])
def test_at_most_2048_tokens_have_logits_at_once(monkeypatch, rows, length):
    parts = Parts(loss.TOKENS, monkeypatch)
    shapes = [(9, 4), (rows, length, 4), (rows, length), (rows, length)]
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, (*"ff", *"if"))]
    jax.eval_shape(lambda *arrays: by_parts(*arrays, 0.0, 0.0), *arrays)
    jax.eval_shape(loss.through_head, *arrays)
    assert 1024 < parts.tokens <= 2048 and {shape[0] for shape in parts} == {rows}


@pytest.mark.parametrize("pick", [loss._take, loss._compare], ids=["cpu", "others"])
def test_both_ways_to_pick_a_targets_logit_have_one_gradient(pick):
    logits, targets = jax.random.normal(jax.random.key(0), (2, 5, 7)), jnp.arange(10).reshape(2, 5) % 7
    picked, pull = jax.vjp(lambda logits: pick(logits, targets), logits)
    g = jnp.arange(1.0, 11.0).reshape(2, 5)
    np.testing.assert_array_equal(
        picked, np.take_along_axis(np.asarray(logits), np.asarray(targets)[..., None], -1)[..., 0]
    )
    np.testing.assert_array_equal(pull(g)[0], np.eye(7)[np.asarray(targets)] * np.asarray(g)[..., None])


@pytest.mark.parametrize("platform, scatters", [("cpu", True), ("cuda", False), ("tpu", False)])
def test_the_gradient_scatters_into_all_logits_on_a_cpu_alone(platform, scatters):
    gradient = jax.jit(jax.grad(lambda *arrays: loss.through_head(*arrays)[0], (0, 1)))
    lowered = jax.export.export(gradient, platforms=[platform])(*draw(2, 8, 4, 16))
    assert ("stablehlo.scatter" in lowered.mlir_module()) == scatters
