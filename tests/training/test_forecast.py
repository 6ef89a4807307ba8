"""A plan's prices and advice, as functions of its figures, and its default vocabulary."""

import pytest
from conftest import run_config

from lowrank_jax import cli, plan
from lowrank_jax.config import UsageError
from lowrank_jax.training import forecast
from lowrank_jax.training.plan import make

GIB = 2**30


def planned(config, count: int = 8, peak: float = 1.2, limit: float = 50, kind: str = "NVIDIA H100") -> dict:
    """Return the plan as if each stage were compiled for `count` devices and a step took 0.5 s at the peaks."""
    described = forecast.describe(config, make(config)) | {"devices": count, "device_kind": kind}
    for s in described["stages"]:
        s |= {"fits": peak <= limit, "peak_bytes_per_device": peak * GIB, "device_bytes": limit * GIB}
        s |= {"est_step_seconds": 0.5, "est_stage_seconds": 0.5 * s["steps"]}
    return described


def test_the_price_is_that_of_all_devices_for_all_stages():
    config = run_config(
        pretrain__steps=7200, sft__steps=7200, pretrain__tokens_per_step=2048, sft__tokens_per_step=6144
    )
    facts = forecast.price(planned(config), 2.5)
    assert facts["est_seconds"] == 7200 and facts["est_device_hours"] == 16 and facts["est_cost"] == 40
    assert facts["est_cost_per_million_tokens"] == pytest.approx(40 / (7200 * 8192 / 1e6))
    unpriced = forecast.price(planned(config))
    assert unpriced["est_device_hours"] == 16 and unpriced["est_cost"] is unpriced["price_per_device_hour"] is None
    unknown = forecast.price(forecast.describe(config, make(config)), 2.5)
    assert unknown["price_per_device_hour"] == 2.5 and {unknown[key] for key in unknown if "est" in key} == {None}


@pytest.mark.parametrize("price", ["-1", "nan", "inf", "x", "2.5"])
def test_a_price_that_is_none_or_has_no_time_is_one_line(price):
    with pytest.raises(UsageError, match="--price"):
        plan.command(["--config=configs/quickstart.py", f"--price={price}"])


def test_rematerialisation_that_is_not_needed_is_named_with_its_memory_and_time():
    config = run_config(model__remat=True)
    described = planned(config)
    assert forecast.advice(config, described) == []
    name = described["stages"][0]["name"]
    described["without_remat"] = {"stage": name, "peak_bytes_per_device": 4 * GIB, "est_step_seconds": 0.375}
    (line,) = forecast.advice(config, described)
    assert line == (
        f"config.model.remat=False: {name} then needs 4.00 of 50.0 GiB and a step takes 375.0 instead of 500.0 ms"
    )


def test_a_microbatch_that_leaves_most_of_the_memory_unused_is_named_except_on_a_cpu():
    config = run_config(pretrain__tokens_per_step=8192, pretrain__microbatch_tokens=2048)
    (line,) = forecast.advice(config, planned(config, peak=10))
    assert (
        line == "config.pretrain.microbatch_tokens=2048 fills 20% of the memory; 0 computes as many rows at once as fit"
    )
    for other in (planned(config, peak=30), planned(config, peak=60), planned(config, peak=10, kind="cpu")):
        assert forecast.advice(config, other) == []
    whole = run_config(pretrain__tokens_per_step=8192)
    assert forecast.advice(whole, planned(whole, peak=10)) == []


def test_a_plan_of_sources_that_are_not_here_yet_has_32000_pieces_and_says_so(capsys):
    config = forecast.resolve_vocab(run_config(model__vocab=0, pretrain__sources="text:/nowhere/*.txt"))
    assert config.model.vocab == 32_000
    err = capsys.readouterr().err
    assert "32,000 pieces" in err and "/nowhere/*.txt: no such file" in err and err.count("\n") == 1


def test_shipped_configs_of_a_published_size_keep_their_vocabulary():
    for name in ("custom.py", "preset.py:1b", "preset.py:7b"):
        assert cli.read_config([f"--config=configs/{name}"]).tokenizer.vocab_size == 32_000
    assert cli.read_config(["--config=configs/quickstart.py"]).tokenizer.vocab_size == 2048
    assert cli.read_config(["--config=configs/preset.py:small"]).tokenizer.vocab_size == 0
