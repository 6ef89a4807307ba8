"""The guard: refused updates, fp16's loss scale, and how a run reports them."""

import contextlib
import functools

import jax
import numpy as np
import pytest

from lowrank_jax.config import RunFailure
from lowrank_jax.training import guard, run_folder
from lowrank_jax.training.metrics import MOST_IN_A_ROW, Meter
from lowrank_jax.training.plan import Progress, stages_of, unchanged

judge = functools.partial(jax.jit, static_argnums=(3, 4))(guard.judge)


def after(losses, norms=None, sigmas=8.0, scaled=False, g=None):
    """Return (verdicts, the guard) after a sequence of losses and gradient norms (1 by default)."""
    g, verdicts = g or guard.start(scaled), []
    for loss, norm in zip(losses, norms or [1.0] * len(losses)):
        ok, g = judge(g, np.float32(loss), np.float32(norm), sigmas, scaled)
        verdicts.append(bool(ok))
    return verdicts, g


def noisy(n: int, seed: int = 0) -> list[float]:
    return (3 + 0.05 * np.random.default_rng(seed).standard_normal(n)).tolist()


def test_ordinary_noise_is_never_refused():
    norms = np.exp(0.2 * np.random.default_rng(1).standard_normal(2000)).tolist()
    verdicts, g = after(noisy(2000), norms)
    assert all(verdicts) and g.refused == 0 and g.count == 2000
    np.testing.assert_allclose(g.mean[0], 3, atol=0.03)
    np.testing.assert_allclose(np.sqrt(g.variance), [0.05, 0.2], rtol=0.4)


@pytest.mark.parametrize("loss, norm", [(9.0, 1.0), (3.0, 100.0)])
def test_a_spike_of_loss_or_gradient_is_refused_and_forgotten(loss, norm):
    _, g = after(noisy(200))
    verdicts, spiked = after([loss, *noisy(20, seed=2)], [norm, *[1.0] * 20], g=g)
    assert verdicts == [False] + [True] * 20
    assert spiked.refused == 1 and spiked.in_a_row == 0
    np.testing.assert_allclose(spiked.mean, g.mean, atol=0.1)


def settled(count: int = 100) -> guard.Guard:
    """Return the guard after `count` steps with a constant loss of 3 and gradient norm of 1."""
    return guard.start(False)._replace(mean=np.float32([3, 0]), count=np.int32(count))


def test_a_spike_enters_the_statistics_as_the_bound_that_it_broke():
    """The bound is 8 x 0.1 nats of the loss, or 8 x 0.25 of the log of the gradient norm; one step weighs 1/50."""
    for at, bound, spike in ((0, 0.8, [9.0, 1.0]), (1, 2.0, [3.0, 1e4])):
        (ok,), g = after(*[[x] for x in spike], g=settled())
        assert not ok and g.count == 101
        np.testing.assert_allclose(g.mean, [3 + 0.02 * bound, 0] if at == 0 else [3, 0.02 * bound], atol=1e-6)
        np.testing.assert_allclose(g.variance[at], 0.98 * 0.02 * bound**2, rtol=1e-3)
        assert g.variance[1 - at] < 1e-12
    (ok,), g = after([2.0], g=settled())
    np.testing.assert_allclose((g.mean[0], g.variance[0]), (3 - 0.02, 0.98 * 0.02), rtol=1e-5)


def test_spikes_are_refused_from_the_step_after_the_first_fifty():
    assert after([9.0], g=settled(49))[0] == [True] and after([9.0], g=settled(50))[0] == [False]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_and_teaches_nothing(bad):
    _, g = after(noisy(100))
    for loss, norm in ((bad, 1.0), (3.0, bad)):
        (ok,), refused = after([loss], [norm], g=g)
        assert not ok and refused.refused == 1 and refused.in_a_row == 1
        for name in ("mean", "variance", "count", "scale"):
            np.testing.assert_array_equal(getattr(refused, name), getattr(g, name))
    assert after([bad], sigmas=0.0)[0] == [False]  # also with the bound off, and at the first step
    assert after([3.0, 1e9, 3.0], sigmas=0.0)[0] == [True] * 3


def test_the_first_steps_and_a_falling_loss_are_not_spikes():
    assert all(after([9.0, 8.0, 11.0, 7.0] * 12)[0])
    assert all(after(np.linspace(9, 3, 500).tolist())[0])


def test_a_level_that_stays_is_accepted_within_a_few_steps():
    _, g = after(noisy(300))
    verdicts, _ = after([6.0] * 30, g=g)
    assert not verdicts[0] and all(verdicts[15:])


def test_the_loss_scale_halves_at_an_overflow_and_grows_after_many_steps_without():
    verdicts, g = after([np.inf, np.inf, 3.0], scaled=True)
    assert verdicts == [False, False, True] and g.scale == guard.FIRST_SCALE / 4
    assert g.refused == 2 and g.in_a_row == 0
    patient = g._replace(since_overflow=np.int32(guard.SCALE_PATIENCE - 1))
    _, grown = after([3.0], scaled=True, g=patient)
    assert grown.scale == guard.FIRST_SCALE / 2 and grown.since_overflow == 0


def test_an_overflow_that_no_scale_cures_counts():
    _, g = after([np.nan] * 20, scaled=True)
    assert g.scale == 1 and g.in_a_row == 20 - 15  # 2^15 is halved fifteen times


def test_without_fp16_the_scale_is_one_for_ever():
    assert after([np.inf, *noisy(5)])[1].scale == 1


# ---------------------------------------------------------------------------------------------------- reports of a run


@pytest.fixture
def report(make, tmp_path):
    """A function: a run's meter reads the metrics of its steps; each dict holds the unusual ones."""

    def read(*steps: dict, precision: str = "fp32") -> None:
        config = make.run_config(precision=precision, track="", every__log=1, every__fp8_check=5)
        (stage,) = stages_of(config)
        usual = {"loss": 3.0, "lr": 0.1, "grad_norm": 2.0, "ok": True, "scale": 1.0, "refused": 0, "in_a_row": 0}
        with contextlib.closing(Meter(config, str(tmp_path), len(steps), 0)) as meter:
            for number, unusual in enumerate(steps, 1):
                metrics = jax.tree.map(np.asarray, usual | unusual)
                meter.add(unchanged(stage), Progress(step=number, tokens=number * stage.tokens_per_step), metrics)
            meter.flush()

    return read


def test_every_refused_update_is_in_the_ledger_with_its_reason(report, tmp_path):
    report(
        {"ok": False, "loss": 9.0, "refused": 1, "in_a_row": 1},
        {"ok": False, "grad_norm": 80.0, "refused": 2, "in_a_row": 2},
        {"refused": 2},
        {"ok": False, "loss": np.nan, "refused": 3, "in_a_row": 1},
        {"ok": False, "grad_norm": np.inf, "refused": 4, "in_a_row": 2},
    )
    skips = run_folder.read_rows(str(tmp_path), "events.jsonl")
    assert {e["event"] for e in skips} == {"skip"}
    assert [(e["step"], e["reason"], e["loss"], e["grad_norm"], e["in_a_row"]) for e in skips] == [
        (1, "spike", 9.0, 2.0, 1), (2, "spike", 3.0, 80.0, 2),
        (4, "not finite", None, 2.0, 1), (5, "not finite", 3.0, None, 2),
    ]  # fmt: skip
    assert [row["skipped"] for row in run_folder.read_rows(str(tmp_path), "metrics.jsonl")] == [1, 2, 2, 3, 4]


@pytest.mark.parametrize("precision, most", [("fp32", MOST_IN_A_ROW), ("fp8", MOST_IN_A_ROW + 5)])
def test_a_run_ends_after_too_many_refused_updates_in_a_row(report, precision, most):
    """With fp8 the run ends only after the next comparison with bf16."""
    refused = lambda n: {"ok": False, "refused": n + 7, "in_a_row": n}
    report(refused(most - 1), precision=precision)
    with pytest.raises(RunFailure, match=f"{most} updates in a row were refused, up to step 2"):
        report(refused(most - 1), refused(most), precision=precision)
