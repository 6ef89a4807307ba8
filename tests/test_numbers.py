"""Numbers that users see or set, each checked by an independent count: speed, stalls, and the effect of each beta."""

import functools
import json
import types

import jax
import numpy as np
import pytest

from lowrank_jax.training import metrics as meter
from lowrank_jax.training import optim
from lowrank_jax.training.memory import Fit
from lowrank_jax.training.plan import FittedStage, Progress, stages_of, unchanged

# --------------------------------------------------------------------------------------------------------- the meter


class Clock:
    """A clock that a test moves by hand."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(meter, "time", clock)
    return clock


@pytest.fixture
def start(make, tmp_path, clock):
    """A function: a meter of a run of 9 steps that grows from 16 tokens to 32, and its two stages."""

    def start(done: int = 0, **every):
        growth = {"pretrain__block": 16, "pretrain__grow_plan": "16,32", "pretrain__grow_every_steps": 4}
        size = {"pretrain__steps": 9, "pretrain__tokens_per_step": 256, "pretrain__auto_grow": True, "sft__steps": 0}
        config = make.run_config(**size, **growth, track="", **{f"every__{key}": n for key, n in every.items()})
        return meter.Meter(config, str(tmp_path), 9, done), [unchanged(stage) for stage in stages_of(config)]

    return start


def metrics(**changes) -> dict:
    return {"loss": 2.0, "lr": 0.5, "grad_norm": 1.0, "ok": 1.0, "scale": 1.0, "refused": 0, "in_a_row": 0} | changes


def at(step: int) -> Progress:
    return Progress(step=step, tokens=256 * step)


def fit_of(fitted: FittedStage, seconds: float) -> Fit:
    return Fit(fitted, peak_bytes=1, limit_bytes=1, seconds=seconds, program=None)


def rows(folder, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


class Failed:
    """A metric of a step that runs out of memory on the device, after it was dispatched."""

    def __float__(self):
        raise RuntimeError("RESOURCE_EXHAUSTED")


def test_a_step_that_fails_on_the_device_is_not_counted_as_done(start, clock):
    m, (short, _) = start()
    for step, loss in ((1, 2.0), (2, Failed())):
        m.add(short, at(step), metrics(loss=loss))
    with pytest.raises(RuntimeError):
        m.flush()
    assert m.step == 1


def test_tokens_per_second_are_those_since_the_row_before_without_what_was_not_training(start, clock, tmp_path):
    m, (short, long) = start(log=2)
    seconds = [3.0, 5.0, 1.0, 1.0, 0.5, 1.5, 2.0, 6.0, 4.0]
    for step, took in enumerate(seconds, 1):
        m.add(short if step <= 4 else long, at(step), metrics())
        clock.now += took
        if step == 4:  # an evaluation, say: what is pending is read before it, and its time is nobody's
            m.flush()
            clock.now += 100
            m.restart_clock()
    m.flush()
    m.close()
    logged = {row["step"]: row["tokens_per_s"] for row in rows(tmp_path)}
    assert logged == {2: 64.0, 4: 256.0, 6: 256.0, 8: 64.0, 9: 64.0}  # 512 tokens, and 256 in the last row
    assert {row["mfu"] for row in rows(tmp_path)} == {None}  # the peak of a CPU is not known


def test_mfu_is_the_models_flops_over_what_all_devices_could_have_done(start, clock, tmp_path, monkeypatch):
    monkeypatch.setattr(meter.devices, "chip", lambda device: types.SimpleNamespace(peak_flops=1e6))
    monkeypatch.setattr(meter.jax, "device_count", lambda: 4)
    monkeypatch.setattr(meter.outlook.costs, "train_flops_per_token", lambda model, length: 100.0 * length)
    m, (short, long) = start(log=1)
    for step, stage, took in ((1, short, 2.0), (2, long, 1.0)):
        m.add(stage, at(step), metrics())
        clock.now += took
        m.flush()
    # 256 tokens of 1,600 FLOPs in 2 s, and of 3,200 in 1 s, of 4 million a second.
    assert [row["mfu"] for row in rows(tmp_path)] == pytest.approx([0.0512, 0.2048])


def test_a_stall_is_what_the_first_step_took_longer_than_an_ordinary_one(start, clock, tmp_path):
    m, (short, long) = start(log=100)
    m.begin_switch()
    clock.now += 7.0
    m.restart_clock()
    m.add(short, at(1), metrics())
    clock.now += 2.0
    m.end_switch(fit_of(short, 1.25))
    for step in (2, 3, 4):
        m.add(short, at(step), metrics())
        clock.now += 2.0
    m.begin_switch()
    clock.now += 5.0  # compiling
    m.restart_clock()
    m.add(long, at(5), metrics())
    clock.now += 3.0
    m.end_switch(fit_of(long, 4.5))
    first, second = (event for event in rows(tmp_path, "events.jsonl") if event["event"] == "stage")
    facts = ("step", "stage", "compile_seconds", "stall_seconds", "stall_steps")
    assert [first[key] for key in facts] == [0, "pretrain-16", 1.25, 9.0, None]  # before it there is no ordinary step
    assert [second[key] for key in facts] == [4, "pretrain-32", 4.5, 6.0, 3.0]  # 8 s, of which a step takes 2


def test_a_row_has_the_numbers_of_its_own_step_and_none_for_what_is_not_finite(start, tmp_path):
    m, (short, _) = start(log=1)
    m.add(short, at(1), metrics(loss=1.5, lr=0.25, grad_norm=4.0))
    m.add(short, at(2), metrics(loss=float("nan"), grad_norm=float("inf"), ok=0.0, refused=1, in_a_row=1))
    m.add(short, at(3), metrics(loss=90.0, grad_norm=80.0, ok=0.0, refused=2, in_a_row=2))
    m.flush()
    keys = ("step", "tokens", "loss", "lr", "grad_norm", "skipped", "batch", "seq_len")
    assert [[row[key] for key in keys] for row in rows(tmp_path)] == [
        [1, 256, 1.5, 0.25, 4.0, 0, 16, 16], [2, 512, None, 0.5, None, 1, 16, 16], [3, 768, 90.0, 0.5, 80.0, 2, 16, 16]
    ]  # fmt: skip
    skips = [[event[key] for key in ("step", "reason", "loss", "in_a_row")] for event in rows(tmp_path, "events.jsonl")]
    assert skips == [[2, "not finite", None, 1], [3, "spike", 90.0, 2]]


# ------------------------------------------------------------------------------------------------------- the optimizer

SLOW, FAST = 0.9, 0.6  # so far apart that no one of them passes for the other


def weights(seed: int) -> dict:
    """Return arrays that the optimizer treats differently: wide and tall matrices of two layers, and an embedding."""
    draw = np.random.default_rng(seed)
    drawn = lambda *shape: draw.standard_normal(shape).astype(np.float32)
    matrices = {"up": {"kernel": drawn(2, 4, 6)}, "out": {"kernel": drawn(2, 6, 4)}}
    return {"blocks": {"mlp": matrices}, "embed": {"table": drawn(5, 4)}}


def last_update(config, gradients: list[dict]) -> dict:
    """Return the optimizer's update for the last of some gradients, at a rate of 1."""
    rule = optim.make(config.optim)

    def run(gradients, params):
        state = rule.init(params)
        for gradient in gradients:
            updates, state = rule.update(gradient, state, params)
        return updates

    return jax.jit(run)(gradients, weights(9))


def average(gradients: list[np.ndarray], beta: float) -> np.ndarray:
    """Return the moving average, which starts at zero."""
    return functools.reduce(lambda mean, g: beta * mean + (1 - beta) * g, gradients, np.zeros_like(gradients[0]))


def momentum(gradients: list[np.ndarray], beta: float) -> np.ndarray:
    """Return Nesterov's momentum: the average if the last gradient came once more, each part bias-corrected."""
    n = len(gradients)
    ahead = beta * average(gradients, beta) / (1 - beta ** (n + 1))
    return ahead + (1 - beta) * gradients[-1] / (1 - beta**n)


def assert_is_adam(update, gradients: list[np.ndarray], first: np.ndarray, beta2: float) -> None:
    second = average([g**2 for g in gradients], beta2) / (1 - beta2 ** len(gradients))
    np.testing.assert_allclose(update, -first / np.sqrt(second), rtol=1e-4)


def assert_is_muon(update, momentum: np.ndarray) -> None:
    """Check that the matrix has the momentum's singular vectors, with singular values of about 1."""
    u, _, vt = np.linalg.svd(momentum, full_matrices=False)
    turned = -u.T @ update @ vt.T / (0.2 * max(momentum.shape) ** 0.5)
    singular = np.diag(turned)
    assert 0.6 < singular.min() and singular.max() < 1.3
    np.testing.assert_allclose(turned, np.diag(singular), atol=1e-4)


@pytest.mark.parametrize("beta1, beta2", [(SLOW, FAST), (FAST, SLOW)])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_beta1_averages_the_gradients_and_beta2_their_squares(make, name, beta1, beta2):
    """AdamW uses Adam for every array; Muon uses Nesterov's momentum, made orthogonal for matrices."""
    settings = {"name": name, "beta1": beta1, "beta2": beta2, "clip": 0.0, "weight_decay": 0.0}
    config = make.run_config(**{f"optim__{key}": value for key, value in settings.items()})
    gradients = [weights(seed) for seed in range(3)]
    updates = last_update(config, gradients)
    for path, update in jax.tree.leaves_with_path(updates):
        g = [functools.reduce(lambda tree, key: tree[key.key], path, gradient) for gradient in gradients]
        first = momentum(g, beta1) if name == "muon" else average(g, beta1) / (1 - beta1**3)
        if name == "adamw" or path[0].key == "embed":
            assert_is_adam(update, g, first, beta2)
        else:
            for layer in range(2):
                assert_is_muon(np.asarray(update)[layer], first[layer])
