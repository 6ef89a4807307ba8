"""The plan and the learning rate, as properties of random phases and of every step of them."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from configs import default
from lowrank_jax.config import RunConfig, UsageError
from lowrank_jax.model import costs
from lowrank_jax.training import optim
from lowrank_jax.training.plan import divisor, milestones, stage_at, stages_of

MOST_STEPS = 60
many = settings(max_examples=150, deadline=None)


def run_config(pretrain: dict, sft: dict | None = None, **model) -> RunConfig:
    values = default.get_config().to_dict()
    values["model"].update({"vocab": 61, "d": 16, "layers": 1, "heads": 2, "rank": 2} | model)
    values["pretrain"].update(pretrain)
    values["sft"].update(sft or {})
    return RunConfig.from_dict(values)


@st.composite
def phases(draw, fewest_steps: int = 1) -> dict:
    plan = sorted(draw(st.sets(st.integers(1, 10), min_size=1, max_size=5)))
    warmup = draw(st.floats(0, 1))
    return {
        "auto_grow": draw(st.booleans()),
        "grow_plan": tuple(plan),
        "block": draw(st.integers(1, plan[0])),
        "grow_every_steps": draw(st.integers(1, 20)),
        "tokens_per_step": 2520 * draw(st.integers(1, 3)),  # a multiple of 1..10
        "microbatch_tokens": draw(st.sampled_from([0, 1, 7, 100, 1000, 10**6])),
        "steps": draw(st.integers(fewest_steps, MOST_STEPS)),
        "lr": draw(st.floats(1e-5, 1.0)),
        "schedule": draw(st.sampled_from(["wsd", "cosine", "linear"])),
        "warmup": warmup,
        "cooldown": draw(st.floats(0, 1 - warmup)),
        "lr_end": draw(st.sampled_from([0.0, 0.1, 1.0])),
    }


def rates(phase, stage) -> np.ndarray:
    """The rate of every step of the stage's phase (computed at one array shape, so that it compiles once)."""
    steps = stage.phase_start + jnp.arange(MOST_STEPS)
    return np.asarray(optim.learning_rate(phase, stage, steps))[: stage.phase_steps]


@many
@given(phases(), phases(fewest_steps=0))
def test_stages_tile_the_run_and_every_step_finds_its_own(pretrain, sft):
    plan = stages_of(run_config(pretrain, sft))
    starts = [0, *(s.end for s in plan)]
    assert [s.start for s in plan] == starts[:-1] and starts[-1] == pretrain["steps"] + sft["steps"]
    owner = [s for s in plan for _ in range(s.steps)]
    assert [stage_at(plan, step) for step in range(starts[-1])] == owner


@many
@given(phases(), phases(fewest_steps=0))
def test_plan_is_a_pure_function_of_the_config(pretrain, sft):
    config = run_config(pretrain, sft)
    again = RunConfig.from_dict(config.to_dict())
    assert stages_of(config) == stages_of(config) == stages_of(again)


@many
@given(phases(), phases())
def test_a_boundary_belongs_to_the_later_stage(pretrain, sft):
    plan = stages_of(run_config(pretrain, sft))
    for earlier, later in zip(plan, plan[1:]):
        assert stage_at(plan, earlier.end) == later
        assert stage_at(plan, earlier.end - 1) == earlier


@many
@given(phases(), phases())
def test_tokens_per_step_stay_constant_while_lengths_rise_within_a_phase(pretrain, sft):
    plan = stages_of(run_config(pretrain, sft))
    for phase, values in (("pretrain", pretrain), ("sft", sft)):
        own = [s for s in plan if s.phase == phase]
        assert {s.batch * s.seq_len for s in own} == {values["tokens_per_step"]}
        assert all(a.seq_len < b.seq_len for a, b in zip(own, own[1:]))
        assert {(s.phase_start, s.phase_steps) for s in own} == {(own[0].start, values["steps"])}
        assert own[0].seq_len == values["block"]


@many
@given(phases())
def test_a_length_lasts_grow_every_steps_and_the_last_one_keeps_the_rest(pretrain):
    pretrain["auto_grow"] = True
    plan = stages_of(run_config(pretrain))
    lengths = [pretrain["block"], *(n for n in pretrain["grow_plan"] if n > pretrain["block"])]
    assert [s.seq_len for s in plan] == lengths[: len(plan)]
    assert all(s.steps == pretrain["grow_every_steps"] for s in plan[:-1])
    assert plan[-1].seq_len == lengths[-1] or plan[-1].steps <= pretrain["grow_every_steps"]


@many
@given(phases())
def test_without_auto_grow_the_length_is_the_block(pretrain):
    (stage,) = stages_of(run_config(pretrain | {"auto_grow": False}))
    assert (stage.seq_len, stage.steps) == (pretrain["block"], pretrain["steps"])


@many
@given(phases())
def test_microbatch_is_the_largest_divisor_of_the_batch_within_its_tokens(pretrain):
    for s in stages_of(run_config(pretrain)):
        budget = pretrain["microbatch_tokens"] or s.batch * s.seq_len
        fitting = [r for r in range(1, s.batch + 1) if s.batch % r == 0 and r * s.seq_len <= budget]
        assert s.microbatch == max(fitting, default=1)


@many
@given(phases(), phases())
def test_every_learning_rate_is_above_zero_and_at_most_the_peak(pretrain, sft):
    config = run_config(pretrain, sft)
    for s in stages_of(config):
        phase = getattr(config, s.phase)
        all_rates = rates(phase, s)
        assert len(all_rates) == phase.steps
        assert (all_rates > 0).all() and (all_rates <= phase.lr * (1 + 1e-6)).all()


@many
@given(phases(), phases())
def test_the_schedule_does_not_notice_growth_or_the_phase_before(pretrain, sft):
    config = run_config(pretrain, sft)
    alone = run_config(sft | {"auto_grow": False})
    (reference,) = stages_of(alone)
    for s in stages_of(config):
        if s.phase == "sft":
            np.testing.assert_array_equal(rates(config.sft, s), rates(alone.pretrain, reference))


@many
@given(phases())
def test_warmup_rises_linearly_to_the_peak(pretrain):
    config = run_config(pretrain)
    warm = round(pretrain["warmup"] * pretrain["steps"])
    assume(warm + round(pretrain["cooldown"] * pretrain["steps"]) <= pretrain["steps"])
    first = rates(config.pretrain, stages_of(config)[0])[:warm]
    np.testing.assert_allclose(first, pretrain["lr"] * np.arange(1, warm + 1) / max(warm, 1), rtol=1e-5)


@many
@given(phases())
def test_wsd_holds_the_peak_and_then_falls_linearly_to_near_lr_end(pretrain):
    config = run_config(pretrain | {"schedule": "wsd"})
    steps, peak = pretrain["steps"], pretrain["lr"]
    warm, cool = round(pretrain["warmup"] * steps), round(pretrain["cooldown"] * steps)
    assume(warm + cool <= steps)
    all_rates = rates(config.pretrain, stages_of(config)[0])
    np.testing.assert_allclose(all_rates[warm : steps - cool], peak, rtol=1e-6)
    step_down = peak * (1 - pretrain["lr_end"]) / (cool + 1)
    end = pretrain["lr_end"] * peak + step_down * np.arange(cool, 0, -1)
    np.testing.assert_allclose(all_rates[steps - cool :], end, rtol=1e-4)


@many
@given(phases())
def test_cosine_and_linear_fall_from_the_peak_to_lr_end_one_step_after_the_last(pretrain):
    steps, peak, low = pretrain["steps"], pretrain["lr"], pretrain["lr_end"]
    warm = round(pretrain["warmup"] * steps)
    done = np.arange(steps - warm) / max(steps - warm, 1)  # 0 at the peak, 1 one step after the last
    for name, left in (("cosine", (1 + np.cos(np.pi * done)) / 2), ("linear", 1 - done)):
        config = run_config(pretrain | {"schedule": name})
        fall = rates(config.pretrain, stages_of(config)[0])[warm:]
        np.testing.assert_allclose(fall, peak * (low + (1 - low) * left), rtol=1e-4, atol=1e-6 * peak)


@pytest.mark.parametrize("shape", ["wsd", "cosine", "linear"])
def test_the_last_steps_of_a_long_phase_still_learn(shape):
    config = run_config({"steps": 1_000_000, "schedule": shape, "lr": 1e-2, "lr_end": 0.0})
    (stage,) = stages_of(config)
    last = np.asarray(optim.learning_rate(config.pretrain, stage, 1_000_000 + jnp.arange(-3, 0)))
    assert (last > 0).all() and (np.diff(last) < 0).all()


@many
@given(st.floats(5, 30), st.integers(1, 9))
def test_pretraining_without_steps_reads_tokens_per_param_tokens(tokens_per_param, scale):
    pretrain = {"steps": 0, "tokens_per_param": tokens_per_param, "tokens_per_step": 512 * scale, "block": 64}
    config = run_config(pretrain)
    (stage,) = stages_of(config)
    wanted = tokens_per_param * costs.parameters(config.model)["total"]
    assert abs(stage.steps * stage.tokens_per_step - wanted) <= stage.tokens_per_step / 2


def test_pretraining_has_at_least_one_step():
    (stage,) = stages_of(run_config({"steps": 0, "tokens_per_param": 1e-6}))
    assert stage.steps == 1


def test_more_steps_than_a_run_can_have_are_refused_with_the_key_that_gives_them():
    with pytest.raises(
        UsageError, match="^config.pretrain.tokens_per_param=1e[+]12 needs [0-9,]+ steps, more than 1,000"
    ):
        stages_of(run_config({"steps": -1, "tokens_per_param": 1e12}))


def test_sft_alone_has_the_stages_of_sft_from_step_0():
    values = run_config({}, {"steps": 4}).to_dict() | {"init_from": "runs/a"}
    values["pretrain"]["steps"] = 0
    (stage,) = stages_of(RunConfig.from_dict(values))
    assert (stage.phase, stage.start, stage.phase_start, stage.end) == ("sft", 0, 0, 4)
    due = milestones([stage], 9, 0)
    assert due == [("eval", "sft", 0)]


@many
@given(st.integers(1, 3000), st.integers(1, 4000), st.integers(1, 6))
def test_the_divisor_is_the_largest_that_fits(rows, most, of):
    batch = rows * of
    fitting = [n for n in range(of, min(batch, most) + 1, of) if batch % n == 0]
    assert divisor(batch, most, of) == max(fitting, default=of)


def test_the_divisor_of_a_huge_prime_is_found_at_once():
    assert divisor(2**31 - 1, 2**30) == 1


@many
@given(phases())
def test_sft_without_steps_has_no_stage(pretrain):
    assert {s.phase for s in stages_of(run_config(pretrain, {"steps": 0}))} == {"pretrain"}


def test_stage_names_are_unique_within_a_run():
    grow = {"auto_grow": True, "block": 2, "grow_plan": "2,4,8", "grow_every_steps": 2, "steps": 9}
    plan = stages_of(run_config(grow, grow))
    assert [s.name for s in plan] == [f"{p}-{n}" for p in ("pretrain", "sft") for n in (2, 4, 8)]


def test_an_evaluation_is_due_where_a_phase_starts_every_so_many_steps_and_where_it_ends():
    growth = {"auto_grow": True, "block": 4, "grow_plan": (4, 8, 16), "grow_every_steps": 3, "tokens_per_step": 64}
    plan = stages_of(run_config({"steps": 9} | growth, {"steps": 4}))
    assert [stage.end for stage in plan] == [3, 6, 9, 13]  # where the length alone changes, nothing is due
    due = {done: milestones(plan, 5, done) for done in range(14)}
    assert {done: kinds for done, kinds in due.items() if kinds} == {
        0: [("eval", "pretrain", 0)],
        5: [("eval", "pretrain", 5)],
        9: [("eval", "pretrain", 9), ("end", "pretrain", 9), ("eval", "sft", 9)],
        10: [("eval", "sft", 10)],
        13: [("eval", "sft", 13), ("eval", "pretrain", 13), ("end", "sft", 13)],
    }
    tasks = [m[:2] for done in range(14) for m in milestones(plan, 5, done, 6) if m[0] == "tasks"]
    assert tasks == [("tasks", "pretrain"), ("tasks", "pretrain"), ("tasks", "sft"), ("tasks", "sft")]


def test_the_average_begins_where_its_phase_does_and_not_where_the_length_grows():
    growth = {"auto_grow": True, "block": 4, "grow_plan": (4, 8), "grow_every_steps": 3, "tokens_per_step": 64}
    plan = stages_of(run_config({"steps": 9} | growth, {"steps": 4}))
    decays = [float(optim.average_decay(0.5, stage_at(plan, step), step)) for step in range(13)]
    ramp = [1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 9 / 18]
    np.testing.assert_allclose(decays, ramp + ramp[:4], rtol=1e-6)
