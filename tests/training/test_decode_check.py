"""Before training shows a sample, it compares cached decoding with the forward pass, and warns if they differ."""

import jax
import jax.numpy as jnp
import pytest
from conftest import run_config
from test_network import make as random_params

from lowrank_jax.inference import engine, session
from lowrank_jax.machine import sharding
from lowrank_jax.training import phase, run_folder
from lowrank_jax.training.plan import Plan, Progress, stages_of
from lowrank_jax.training.start import Run

WIDTHS = {"model__d": 96, "model__heads": 6, "model__rank": 32, "model__mlp": 40, "model__latent_norm": False}


@pytest.fixture
def end_phase(tok, tmp_path, monkeypatch, capfd):
    """Return a function that ends pretraining, and returns what it says and the run's events by name."""
    monkeypatch.setattr(phase.stream, "summary", lambda cursor: [])

    def end(precision: str, **changes) -> tuple[list[str], dict]:
        settings = WIDTHS | {"model__vocab": tok.vocab_size, "pretrain__sample": "Bace di"} | changes
        config = run_config(precision=precision, **settings)
        params = jax.device_put(random_params(config.model), sharding.whole(sharding.one_device()))
        plan = Plan(stages_of(config), sharding.one_device())
        r = Run(config, tok, str(tmp_path), plan, None, None, None, None)
        phase.end(r, plan.stages[0], params, Progress(step=3, cursor={}))
        lines = capfd.readouterr().err.splitlines()
        return lines, {row["event"]: row for row in run_folder.read_rows(str(tmp_path), "events.jsonl")}

    return end


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
def test_a_healthy_run_gets_no_warning(precision, end_phase):
    lines, events = end_phase(precision)
    assert not [line for line in lines if "warning" in line] and set(events) == {"sample", "data"}
    assert lines[0] == "step 3: a sample after pretrain" and events["sample"]["text"]


def without_gains(params: dict) -> dict:
    """Return the parameters with every gain of the blocks 1, as a decoder has them that does not know the gains."""
    is_gain = lambda path: path[0].key == "blocks" and path[-1].key == "gain"
    return jax.tree.map_with_path(lambda path, w: jnp.ones_like(w) if is_gain(path) else w, params)


def test_a_decoder_that_ignores_a_part_of_the_network_gets_one_warning_and_an_event(end_phase, monkeypatch):
    monkeypatch.setattr(session, "prepare", lambda c, params, kind: engine.prepare(c, without_gains(params), kind))
    lines, events = end_phase("fp32")
    (warning,) = (line for line in lines if "warning" in line)
    event = events["decode_differs"]
    assert (event["step"], event["phase"]) == (3, "pretrain") and event["difference"] > session.DECODE_TOLERANCE
    assert f"differs from the forward pass by {event['difference']:.2g} nats per token" in warning
    assert "sample" in events and lines.index(warning) < lines.index("step 3: a sample after pretrain")


def test_a_decoder_that_gives_no_numbers_gets_the_warning_too(end_phase, monkeypatch):
    broken = lambda params: jax.tree.map(lambda w: w * jnp.nan, params)
    monkeypatch.setattr(session, "prepare", lambda c, params, kind: engine.prepare(c, broken(params), kind))
    lines, events = end_phase("fp32")
    assert "forward pass by nan nats per token" in " ".join(lines) and events["decode_differs"]["difference"] is None
