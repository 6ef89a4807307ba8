"""The memory gate: a stage's need by the compiler, the rows that fit, and the cap after running out of memory."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import pytest
from conftest import run_config
from hypothesis import given
from hypothesis import strategies as st
from test_run_folder import FREE, IDENTITY, with_plan

from lowrank_jax.config import UsageError
from lowrank_jax.machine import faults, sharding
from lowrank_jax.training import memory, programs, step
from lowrank_jax.training.memory import Cap
from lowrank_jax.training.plan import Plan, divisor, stages_of, unchanged

pytestmark = pytest.mark.slow

CPU = sharding.one_device()


def config_of(limit_bytes: int = 0, **changes):
    sizes = {"model__d": 32, "model__layers": 2, "model__vocab": 300, "model__heads": 4, "optim__name": "adamw"}
    sizes |= {"pretrain__tokens_per_step": 4 * 64, "pretrain__block": 64, "pretrain__steps": 5}
    return run_config(**sizes | changes, memory_gb=limit_bytes / 2**30)


def stage_of(config):
    return unchanged(stages_of(config)[0])


@functools.cache
def test_weights_beyond_all_memory_are_refused_before_anything_is_compiled():
    config = config_of(2**20, model__d=2**10, pretrain__steps=1)
    with pytest.raises(
        UsageError, match=r"^the model's [0-9,]+ weights need 0[.]0644 GiB per device, which may use 0[.]000977 GiB; "
    ):
        memory.check_weights(config, CPU)
    memory.check_weights(dataclasses.replace(config, memory_gb=1.0), CPU)


def fit_in(limit_bytes: int = 0) -> memory.Fit:
    config = config_of(limit_bytes)
    return memory.fit(config, stage_of(config), CPU, memory.limit_bytes(config, CPU))


@functools.cache
def need(rows: int, remat: bool = False) -> int:
    config = config_of()
    stage = dataclasses.replace(stage_of(config), microbatch=rows, remat=remat)
    return memory.fit(config, stage, CPU, memory.limit_bytes(config, CPU)).peak_bytes


def test_a_stage_that_fits_keeps_the_settings_of_the_config():
    assert fit_in().fits and (fit_in().fitted.microbatch, fit_in().fitted.remat) == (4, False)
    assert fit_in().limit_bytes == pytest.approx(0.9 * memory.devices.memory_bytes(jax.devices("cpu")[0]))
    sizes = [leaf.size * 4 for leaf in jax.tree.leaves(step.abstract_state(config_of()))]
    assert need(4) > need(2) > need(1) > sum(sizes) and need(1) > need(1, remat=True)


@pytest.mark.parametrize("rows", [2, 1])
def test_the_most_rows_that_fit_are_taken(rows):
    at_limit, below = fit_in(need(rows)), fit_in(need(rows) - 1)
    assert at_limit.fits and at_limit.fitted.microbatch == rows and not at_limit.fitted.remat
    assert below.fitted.microbatch < rows or below.fitted.remat
    assert at_limit.stage.batch == 4 and at_limit.program is not None


def test_rematerialisation_comes_only_where_one_row_does_not_fit():
    tight = fit_in(need(1) - 1)
    assert tight.fits and tight.fitted.remat
    fitting = [rows for rows in (4, 2, 1) if need(rows, remat=True) < need(1)]
    assert tight.fitted.microbatch == max(fitting)


def test_a_stage_that_cannot_fit_is_refused_by_name_need_and_limit():
    hopeless = fit_in(need(1, remat=True) - 1)
    assert not hopeless.fits and hopeless.fitted.remat and hopeless.fitted.microbatch == 1
    line = memory.refusal(hopeless)
    assert "pretrain-64" in line and "one row of 64 tokens" in line and line.count("GiB") == 2
    config = config_of(need(1, remat=True) - 1)
    with pytest.raises(UsageError, match="^stage pretrain-64 needs"):
        programs.Programs(config, Plan(stages_of(config), CPU), [], lambda: False).fit_all(0)


def test_a_checkpoint_beyond_the_plan_ends_no_start_before_it_is_read():
    """It may be a copy under another number, or the config may have fewer steps now: its restore says which."""
    config = config_of()
    every_stage = programs.Programs(config, Plan(stages_of(config), CPU), [], lambda: False).fit_all(10**6)
    assert [fit.stage for fit in every_stage] == list(stages_of(config))


@given(
    batch=st.integers(1, 60),
    length=st.integers(1, 64),
    most=st.integers(1, 60),
    shards=st.integers(1, 6),
    halvings=st.integers(0, 12),
)
def test_shrinking_ends_with_one_rematerialised_row_and_never_changes_the_batch(batch, length, most, shards, halvings):
    stage = dataclasses.replace(stages_of(config_of())[0], batch=batch * shards, seq_len=length)
    fitted = unchanged(dataclasses.replace(stage, microbatch=divisor(batch * shards, most, shards)))
    for _ in range(halvings):
        smaller = memory.shrink(fitted, fitted.microbatch // 2, shards)
        if smaller is None:
            assert fitted.microbatch == shards and fitted.remat
            break
        assert smaller.stage == fitted.stage and stage.batch % smaller.microbatch == 0
        assert smaller.microbatch % shards == 0  # every device has as many rows
        assert smaller.microbatch <= max(fitted.microbatch // 2, shards) and smaller.remat >= fitted.remat
        cap = Cap(smaller.microbatch // shards * length, smaller.remat)
        assert memory.cap_below(fitted, shards) == cap
        again = memory.restrict(fitted, cap, shards)
        assert again.microbatch == smaller.microbatch and again.remat == smaller.remat  # on resume, from the ledger
        twice = dataclasses.replace(fitted, stage=dataclasses.replace(fitted.stage, seq_len=2 * length))
        longer = memory.restrict(twice, cap, shards)
        assert longer.microbatch // shards * 2 * length <= max(cap.microbatch_tokens, 2 * length)
        fitted = smaller


def test_the_ledger_holds_the_lowest_cap_of_each_kind_of_device():
    oom = lambda tokens, remat, device="cpu": {
        "event": "oom", "device": device, "microbatch_tokens": tokens, "remat": remat
    }  # fmt: skip
    assert memory.cap_from_ledger([], CPU) == memory.NO_CAP
    assert memory.cap_from_ledger(
        [oom(512, False), {"event": "save"}, oom(256, True), oom(8, True, "TPU v4")], CPU
    ) == (
        256,
        True,
    )
    assert memory.cap_from_ledger([oom(8, True, "TPU v4"), {"event": "oom", "device": "cpu"}], CPU) == memory.NO_CAP


def test_a_program_that_asks_for_more_than_there_is_has_no_memory_and_loses_what_it_was_given(monkeypatch):
    """The runtime's own error: the program compiles, and its need is known before it runs."""
    greedy = lambda x: (x + 1, jnp.cumsum(jnp.broadcast_to(x, (2**46,)))[:: 2**30])
    x = jnp.ones(())
    program = jax.jit(greedy, donate_argnums=0).lower(x).compile()
    assert program.memory_analysis().temp_size_in_bytes >= 2**48
    with pytest.raises(jax.errors.JaxRuntimeError) as e:
        jax.block_until_ready(program(x))
    assert memory.is_out_of_memory(e.value) and x.is_deleted()
    monkeypatch.setenv(faults.VARIABLE, "oom@step=2")
    state = {"weights": jnp.ones(4), "step": jnp.zeros((), jnp.int32), "average": ()}
    faults.run_out_of_memory(1, state)
    with pytest.raises(jax.errors.JaxRuntimeError) as e:
        faults.run_out_of_memory(2, state)
    assert memory.is_out_of_memory(e.value)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))


def test_an_error_of_another_kind_is_not_a_lack_of_memory():
    assert not memory.is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: something else"))
    assert not memory.is_out_of_memory(MemoryError("RESOURCE_EXHAUSTED"))


def test_all_processes_do_what_the_least_of_them_can():
    assert memory.lowest([Cap(512, False), Cap(256, False)]) == Cap(256, False)
    assert memory.lowest([Cap(64, True), Cap(512, False)]) == Cap(64, True)
    assert memory.lowest([None, Cap(9, True)]) is None


def test_a_fit_of_other_devices_or_meshes_in_the_ledger_is_not_used():
    config, events = config_of(), []
    stages, limit = stages_of(config), memory.limit_bytes(config, CPU)
    events.append({"event": "compile"} | memory.fit_facts(fit_in()) | memory.fit_conditions(config, CPU, limit))
    assert memory.fits_from_ledger(events, config, stages, CPU, limit)[stages[0]].fitted == fit_in().fitted
    assert memory.fits_from_ledger(events, config, stages, CPU, limit - 1) == {}
    for change in ({"mesh": [1, 8, 1]}, {"device": "TPU v4"}, {"config": "another"}):
        assert memory.fits_from_ledger([events[0] | change], config, stages, CPU, limit) == {}


@pytest.mark.parametrize("key", IDENTITY | FREE)
def test_what_the_ledger_has_of_another_config_is_asked_again(key):
    """Any key may change a step's need of memory, so the ledger's hash covers all of them."""
    config, changed = with_plan(), with_plan(**{key: (IDENTITY | FREE)[key]})
    stages = stages_of(config)
    fitted = dataclasses.replace(unchanged(stages[0]), precision="fp32", attention="chunked")
    known_fit = memory.Fit(fitted, 9, 99, 0.0, None)
    events = [{"event": "compile"} | memory.fit_facts(known_fit) | memory.fit_conditions(config, CPU, 99)]
    as_read = json.loads(json.dumps(events))
    assert memory.fits_from_ledger(as_read, with_plan(), stages, CPU, 99) == {stages[0]: known_fit}
    assert memory.fits_from_ledger(events, changed, stages, CPU, 99) == {}


def test_a_kernel_that_a_device_refuses_is_replaced_and_noted(monkeypatch):
    config = config_of(pretrain__block=128, pretrain__tokens_per_step=4 * 128)
    resolve = memory.attention.resolve
    as_on_a_tpu = lambda backend, *rest: ("splash", "") if backend == "auto" else resolve(backend, *rest)
    monkeypatch.setattr(memory.attention, "resolve", as_on_a_tpu)  # a kernel that does not compile for a CPU
    fit = memory.fit(config, stage_of(config), CPU, memory.limit_bytes(config, CPU))
    assert fit.fits and fit.fitted.attention == "chunked" and fit.note.startswith("splash: ")


@pytest.mark.parametrize("kernel", ["reference", "chunked", "auto"])
def test_a_bound_holds_and_is_used_only_far_from_the_limit(kernel):
    config = config_of(model__attention=kernel)
    stage = stages_of(config)[0]
    longer = dataclasses.replace(stage, seq_len=8 * stage.seq_len, batch=2, microbatch=2)
    known, real = (memory.fit(config, unchanged(s), CPU, memory.limit_bytes(config, CPU)) for s in (stage, longer))
    bound = memory.by_bound(known, config, longer, CPU)
    assert bound.is_bound and bound.program is None and bound.seconds == 0
    assert real.peak_bytes <= bound.peak_bytes and bound.fitted == real.fitted
    assert memory.by_bound(known._replace(limit_bytes=2 * bound.peak_bytes - 1), config, longer, CPU) is None
    assert memory.by_bound(known, config, dataclasses.replace(longer, precision="bf16"), CPU) is None
    assert memory.by_bound(known, config, dataclasses.replace(longer, remat=True), CPU) is None
