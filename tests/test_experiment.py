"""Arms of scripts/studies are what they claim, their starts and window compute what they should, and results resume."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import runs

from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.model import attention, costs, network
from lowrank_jax.training.plan import Progress
from scripts.bench import dense_twin
from scripts.studies import arms, experiment, lengths, starts, tables

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
ARMS = [(study, arm) for study in arms.STUDIES for arm in arms.runnable(study)]


def sizes(study: str, arm: str) -> dict[str, float]:
    config = arms.config_of(study, arm).with_vocab(arms.VOCAB)
    counts = costs.parameters(config.model)
    return counts | {"parameters": counts["total"], "flops": experiment.flops_of(config)}


# --------------------------------------------------------------------------------------------------------------- arms


@pytest.mark.parametrize("study, arm", ARMS, ids=lambda x: x.replace(" ", "-"))
def test_every_arm_is_a_config_with_a_start_that_exists(study, arm):
    config = arms.config_of(study, arm)
    assert config.pretrain.steps > 0 and config.sft.steps == 0
    assert arms.changes(study, arm).get("start") in {None, "", *starts.STARTS}
    assert arms.STUDIES[study]["reference"] in arms.runnable(study)


def test_an_arm_of_an_older_version_names_its_commit():
    with pytest.raises(UsageError, match="git checkout 03e02b0b1b32"):
        experiment.command(["run", "--study=length", "--arms=rope"])


@pytest.mark.parametrize("study", arms.STUDIES)
def test_arms_keep_to_their_limits(study):
    for arm, than, *what in arms.STUDIES[study]["limits"]:
        ours, theirs = sizes(study, arm), sizes(study, than)
        for name in what:
            assert ours[name] <= 1.002 * theirs[name], (arm, than, name)


def test_arms_of_one_study_differ_in_what_they_are_called_after_alone():
    base, even = (arms.config_of("quality", arm) for arm in ("split norm", "even norm"))
    assert base.pretrain == even.pretrain and base.optim == even.optim
    assert sizes("quality", "split norm")["attention"] == sizes("quality", "even norm")["attention"]
    assert sizes("quality", "whole")["parameters"] <= 0.32 * sizes("quality", "dense")["parameters"]


# ------------------------------------------------------------------------------------------------------------- starts


def first_weights(make, name: str, **changes) -> tuple[dict, dict]:
    """Return (the product's own first weights of the blocks, those of another start)."""
    c = make.run_config(**{"model__d": 32, "model__heads": 4, "model__rank": 8} | changes).model
    params = network.init(c, jax.random.key(0))
    return params["blocks"], starts.apply(c, params, name)["blocks"]


def test_a_spectral_start_is_the_best_of_its_rank_and_balanced(make):
    _, blocks = first_weights(make, "spectral")
    a = blocks["attention"]
    down, up = a["v"]["down"][0], a["v"]["up"][0]
    np.testing.assert_allclose(down.T @ down, up @ up.T, atol=1e-5)
    assert not a["o"]["up"].any() and a["o"]["down"].any()


def test_a_start_of_half_the_size_is_half_the_products_own(make):
    own, half = first_weights(make, "half")
    for name, part in (("q", "down"), ("v", "up"), ("o", "up")):
        np.testing.assert_array_equal(half["attention"][name][part], own["attention"][name][part] / 2)
    np.testing.assert_array_equal(half["mlp"]["gate"]["kernel"], own["mlp"]["gate"]["kernel"])


@pytest.mark.parametrize("shared", [False, True])
def test_fan_in_starts_have_the_variance_of_a_dense_draw(make, shared):
    size = {"model__d": 256, "model__heads": 8, "model__rank": 32, "model__layers": 1, "model__shared_kv": shared}
    _, blocks = first_weights(make, "fan_in", **size)
    a = blocks["attention"]
    np.testing.assert_allclose(np.std(a["k"]["down"]), 256**-0.5, rtol=0.05)
    down = a["k" if shared else "v"]["down"]
    np.testing.assert_allclose(np.std(down[0] @ a["v"]["up"][0]), 256**-0.5, rtol=0.05)
    assert not a["o"]["up"].any() and a["o"]["down"].any()


# ------------------------------------------------------------------------------------------------------------- window


def test_a_window_sees_the_last_tokens_and_no_others():
    q, k, v = (jax.random.normal(key, (2, 48, 4, 8)) for key in jax.random.split(jax.random.key(0), 3))
    whole, windowed = attention.attend(q, k, v), lengths.attend(q, k, v, 8)
    np.testing.assert_allclose(windowed[:, :8], whole[:, :8], atol=1e-5)
    for position in (8, 15, 16, 47):
        last = [x[:, position - 7 : position + 1] for x in (q, k, v)]
        np.testing.assert_allclose(windowed[:, position], attention.attend(*last)[:, -1], atol=1e-5)
    np.testing.assert_allclose(lengths.attend(q, k, v, 64), whole, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rank": 0, "kv_heads": 1},
        {"latent_norm": True},
        {"shared_kv": True},
        {"rank_split": (0, 1, 3, 0)},
        {"mlp_rank": 8, "embed_rank": 16},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_the_network_with_a_wide_window_is_the_network(make, changes):
    sizes = {"model__d": 32, "model__heads": 4, "model__rank": 8, "model__vocab": 64}
    c = make.run_config(**sizes | {f"model__{key}": value for key, value in changes.items()}).model
    draw = lambda w: 0.2 * jax.random.normal(jax.random.key(w.size), w.shape)
    params = jax.tree.map(draw, jax.eval_shape(lambda: network.init(c, jax.random.key(1))))
    tokens = jax.random.randint(jax.random.key(2), (2, 20), 0, 64)
    whole, wide, narrow = (
        network.features(c, params, tokens),
        *(lengths.features(c, params, tokens, n) for n in (32, 4)),
    )
    np.testing.assert_allclose(wide, whole, atol=1e-4)
    assert np.abs(narrow - whole).max() > 1e-3


# -------------------------------------------------------------------------------------------------------------- lines


def line(arm, lr, seed, bits, **more) -> dict:
    row = {"arm": arm, "lr": lr, "seed": seed, "bits_per_byte": bits, "data_sha256": str(seed), "rows": [[1, 2, 3]]}
    row |= {"parameters": 10, "attention": 5, "flops": 1e12, "tokens": 1, "skipped": 0, "commit": "c0ffee"}
    return row | more


def test_differences_are_taken_within_a_seed_and_at_each_ones_best_learning_rate():
    rows = [line("dense", 0.1, seed, 2.0 + seed) for seed in (0, 1, 2)]
    rows += [line("dense", 0.2, seed, 2.5 + seed) for seed in (0, 1, 2)]
    rows += [line("split", 0.1, seed, 3.0 + seed) for seed in (0, 1, 2)]
    rows += [line("split", 0.2, seed, 1.9 + seed) for seed in (0, 1)]
    assert tables.best_lr(rows, "split") == 0.1  # two lucky seeds do not decide
    rows += [line("split", 0.2, 2, 1.8 + 2)]
    assert tables.best_lr(rows, "split") == 0.2
    np.testing.assert_allclose(tables.paired(rows, "split", "dense"), [-0.1, -0.1, -0.2])
    shown = tables.quality("quality", rows)
    assert "-0.1333 ± 0.1434" in shown and "| 3.0000 |" in shown  # t of 2 degrees is 4.303, and 4.303 / 3^0.5 x 0.0577
    assert [line.split("|")[6].strip() for line in shown.splitlines()] == ["cache", "-" * 5, "512", "64"]
    assert tables.paired(rows, "split", "even") == []


def test_an_arm_is_shown_beside_what_it_is_limited_by_with_the_seeds_it_is_ahead_in():
    ours = [line("split norm", 0.1, seed, bits, parameters=8) for seed, bits in ((0, 1.9), (1, 2.9), (2, 4.2))]
    [shown] = tables.beside("quality", ours + [line("dense small", 0.1, seed, 2.0 + seed) for seed in (0, 1, 2)])
    cells = [cell.strip() for cell in shown.splitlines()[2].split("|")[1:-1]]
    assert cells == ["split norm", "dense small", "0.80", "1.00", "1.00", "0.15", "+0.0000 ± 0.4303", "2 of 3"]
    assert tables.beside("quality", ours) == []


def test_other_data_is_not_compared_unless_its_rows_have_other_shapes():
    rows = [line("dense", 0.1, 0, 2.0), line("split", 0.1, 0, 2.1, data_sha256="other")]
    with pytest.raises(RunFailure, match="other data"):
        tables.paired(rows, "split", "dense")
    rows[1]["rows"] = [[2, 1, 3]]
    np.testing.assert_allclose(tables.paired(rows, "split", "dense"), [0.1])


def test_a_line_done_twice_counts_once_and_arms_come_in_the_studys_order(tmp_path):
    lines = [
        line("split", 0.1, 0, 9.0),
        line("dense", 0.1, 0, 2.0),
        line("split", 0.1, 0, 2.1),
        line("gone", 0.1, 0, 1),
    ]
    (tmp_path / "quality.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines) + '{"cut')
    rows = tables.read(str(tmp_path), "quality")
    assert [(row["arm"], row["bits_per_byte"]) for row in rows] == [("dense", 2.0), ("split", 2.1)]


def run(*args: str, faults: str = "") -> tuple[int, str]:
    script, env = (
        ROOT / "scripts" / "studies" / "experiment.py",
        os.environ | runs.ENVIRONMENT | {"LOWRANK_FAULTS": faults},
    )
    done = subprocess.run([sys.executable, script, *args], cwd=ROOT, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> list[str]:
    """The flags of a study that is done for two arms, after a process that was killed in the first one."""
    home = tmp_path_factory.mktemp("experiment")
    flags = ["--study=smoke", f"--folder={home / 'runs'}", f"--results={home / 'docs' / 'results'}", "--seeds=0"]
    code, out = run("run", *flags, "--arms=grown", faults="kill@step=3")
    assert code == 1 and "grown, lr 0.003, seed 0 ended" in out and not list((home / "docs" / "results").iterdir())
    code, out = run("run", *flags, "--arms=grown,dense,half start")
    assert code == 0, out
    return flags


@pytest.mark.study
def test_a_run_leaves_one_line_and_is_not_done_again(smoke):
    path = pathlib.Path(smoke[2].removeprefix("--results=")) / "smoke.jsonl"
    before = path.read_text()
    code, out = run("run", *smoke, "--arms=grown,dense,half start")
    assert code == 0 and path.read_text() == before and "stage" not in out
    grown, dense, half = (json.loads(text) for text in before.splitlines())
    config = arms.config_of("smoke", "dense").with_vocab(arms.VOCAB)
    assert dense["parameters"] == costs.parameters(config.model)["total"]
    assert dense["flops"] == experiment.flops_of(config)
    assert half["data_sha256"] == dense["data_sha256"] and half["bits_per_byte"] != dense["bits_per_byte"]
    assert dense["rows"] == [[4, 4, 32]] and grown["rows"] == [[2, 4, 32], [2, 2, 64]]
    assert dense["tokens"] == grown["tokens"] == 512 and dense["cpu_seconds"] > 1
    assert grown["cpu_seconds"] is None  # the second process knows only its own part
    assert [point["step"] for point in grown["curve"]] == [0, 2, 4]
    assert grown["curve"][-1]["flops"] == grown["flops"] > grown["curve"][1]["flops"] * 2
    assert dense["commit"] and dense["command"].endswith("--seeds=0")


@pytest.mark.study
def test_a_study_is_published_between_its_marks(smoke):
    results = pathlib.Path(smoke[2].removeprefix("--results="))
    (results.parent / "results.md").write_text("above\n<!-- smoke -->\nold\n<!-- /smoke -->\nbelow\n")
    tables.publish(str(results))
    page = (results.parent / "results.md").read_text()
    assert page.startswith("above\n<!-- smoke -->\n| arm") and page.endswith("<!-- /smoke -->\nbelow\n")
    assert "old" not in page and "| grown" in page and (results / "smoke.png").stat().st_size > 1000
    tables.publish(str(results))
    assert (results.parent / "results.md").read_text() == page


def test_mistakes_are_one_line():
    for args, name in ((("--arms=nothing",), "nothing"), (("--lrs=fast",), "lrs")):
        with pytest.raises(UsageError, match=name):
            experiment.command(["run", "--study=smoke", *args])


# ------------------------------------------------------------------------------------------------------------- lengths


def test_bits_by_position_add_up_and_longer_rows_share_their_beginnings(make, tok, monkeypatch):
    config = make.run_config(model__vocab=tok.vocab_size)
    draw = lambda w: 0.1 * jax.random.normal(jax.random.key(w.size), w.shape)  # a new model's blocks do nothing
    params = jax.tree.map(draw, jax.eval_shape(lambda: network.init(config.model, jax.random.key(3))))
    run = lengths.trained.Trained(config, tok, params, Progress())
    ids = lengths.blocks(tok, [make.prose(400, i) for i in range(3)] + ["short"], 64)
    assert ids.shape == (3, 65)
    monkeypatch.setattr(lengths, "EDGES", (0, 16, 64))
    whole, first, rest = lengths.bits(run, ids, 64)
    size = tok.byte_lengths()[ids[:, 1:]]
    np.testing.assert_allclose(whole * size.sum(), first * size[:, :16].sum() + rest * size[:, 16:].sum(), rtol=1e-5)
    short = lengths.bits(run, ids, 16)
    np.testing.assert_allclose(short[1], first, rtol=1e-5)
    assert abs(short[2] - rest) > 1e-6


# ---------------------------------------------------------------------------------------------------------------- cost


@pytest.mark.study
def test_a_twin_is_measured_alike_and_shown_beside(make, monkeypatch):
    rank = {"low rank": 4, "dense": 0}
    toy = lambda preset, which, **more: make.run_config(
        model__vocab=64,
        model__layers=1,
        model__rank=rank[which],
        **{key.replace(".", "__"): value for key, value in more.items()},
    )
    monkeypatch.setattr(dense_twin, "config_of", toy)
    for name, value in (("LENGTH", 32), ("VOCAB", 64), ("CONTEXT", 64), ("BEFORE", (8,))):
        monkeypatch.setattr(dense_twin, name, value)
    rows = []
    for which in dense_twin.MODELS:
        facts = {"preset": "toy", "model": which, "commit": "c0ffee"}
        rows += [facts | {"what": "train"} | dense_twin.train("toy", which, steps=1)]
    low, dense = rows
    assert low["parameters"] - dense["parameters"] == low["attention"] - dense["attention"] < 0
    assert 0 < low["state_bytes"] < dense["state_bytes"] and low["cpu_seconds"] > 0
    decoded = dense_twin.decode("toy", "low rank", new=5)
    assert decoded["cache_bytes_per_token"] == 8 * 4 and decoded["tokens_per_s_8"] > 0  # 2 latents of 4 in fp32
    assert decoded["cache_bytes"] >= dense_twin.CONTEXT * decoded["cache_bytes_per_token"]
    assert "| toy    | training on a CPU: parameters, M" in tables.cost(rows)
