"""The shipped configs keep the promises of their docstrings, and YAML files have the same keys."""

import pytest

from lowrank_jax import cli, keys
from lowrank_jax.config import RunConfig, UsageError
from lowrank_jax.training import forecast
from lowrank_jax.training.plan import make


def described(name: str, *overrides: str) -> dict:
    config = forecast.resolve_vocab(cli.read_config([f"--config=configs/{name}", *overrides]))
    return forecast.describe(config, make(config))


def test_custom_grows_to_2048_and_has_75_percent_fewer_attention_parameters():
    config = cli.read_config(["--config=configs/custom.py"])
    m = config.model
    assert (m.d, m.layers, m.heads, m.rank) == (1024, 20, 32, 128)
    described_custom = described("custom.py")
    pretrain = [s for s in described_custom["stages"] if s["phase"] == "pretrain"]
    assert [s["seq_len"] for s in pretrain] == [256, 512, 768, 1024, 1536, 2048]
    assert [s["steps"] for s in pretrain] == [25_000] * 6
    assert described_custom["params"]["attention"] == 8 * 1024 * 128 * 20
    assert described_custom["params"]["attention_reduction"] == 0.75
    assert described_custom["stages"][-1]["phase"] == "sft"


@pytest.mark.parametrize(
    "name, d, layers", [("small", 512, 8), ("smallx2", 512, 16), ("base", 768, 12), ("base17", 768, 17)]
)
def test_presets_have_their_sizes(name, d, layers):
    m = cli.read_config([f"--config=configs/preset.py:{name}"]).model
    assert (m.d, m.layers, m.rank * 8, m.head_dim) == (d, layers, d, 32)


def test_the_quickstart_grows_through_three_lengths_and_then_tunes():
    stages = described("quickstart.py")["stages"]
    assert [s["phase"] for s in stages] == ["pretrain"] * 3 + ["sft"]
    assert len({s["seq_len"] for s in stages[:3]}) == 3


def test_the_command_line_of_the_design_grows_any_config():
    grow = [
        "block=256",
        "auto_grow=True",
        "grow_plan=256,512,768,1024,1536,2048",
        "grow_every_steps=25000",
        "steps=150000",
    ]
    stages = described("default.py", *[f"--config.pretrain.{setting}" for setting in grow])["stages"]
    assert [(s["seq_len"], s["steps"]) for s in stages] == [(n, 25_000) for n in (256, 512, 768, 1024, 1536, 2048)]
    assert len({s["seq_len"] * s["batch"] for s in stages}) == 1


@pytest.mark.parametrize(
    "name, file", [("quickstart", "quickstart.py"), ("preset:base", "preset.py:base"), ("default", "default.py")]
)
def test_a_shipped_config_has_a_name_in_every_folder(name, file, tmp_path, monkeypatch):
    by_path = cli.read_config([f"--config=configs/{file}"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / name.split(":")[0]).mkdir()  # a run may have the name, too
    assert cli.read_config([f"--config={name}"]) == by_path
    assert name.split(":")[0] in cli.shipped_configs()


def test_a_file_comes_before_a_shipped_config_and_may_start_from_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "from lowrank_jax.configs import default\ndef get_config(d='64'):\n    c = default.get_config()\n"
    (tmp_path / "custom").write_text(text + "    c.model.update(d=int(d), heads=2, rank=8)\n    return c\n")
    assert cli.read_config(["--config=custom"]).model.d == 64
    assert cli.read_config(["--config=./custom:32"]).model.d == 32
    (tmp_path / "my.yaml").write_text("steps: 1e3")
    assert cli.read_config(["--config=from_yaml:my.yaml"]).pretrain.steps == 1000


@pytest.mark.parametrize(
    "path, advice",
    [
        ("quickstrat", "did you mean --config=quickstart?"),
        ("configs/quickstart.py", "did you mean --config=quickstart?"),
        ("somewhere/preset.py:base", "did you mean --config=preset:base?"),
        ("zzz", "shipped: custom, default, from_yaml, preset, quickstart"),
    ],
)
def test_a_config_that_is_missing_is_answered_with_the_shipped_one(path, advice, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        cli.read_config([f"--config={path}"])
    assert str(caught.value) == f"--config={path}: no such file; {advice}"


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--config.pretrain.batch_size=8"],
            "unknown config key config.pretrain.batch_size; did you mean tokens_per_step?",
        ),
        (["--config.lr=1e-3"], "unknown config key config.lr; did you mean config.pretrain.lr?"),
        (["--config.pretain.lr=1"], "unknown config key config.pretain; did you mean pretrain?"),
        (["--learning_rate=1"], "unknown argument --learning_rate; did you mean --config.pretrain.lr?"),
        (["--sft.lr=1"], "unknown argument --sft.lr; did you mean --config.sft.lr?"),
        (["--topologi=cpu"], "unknown argument --topologi; did you mean --topology?"),
        (["--config.every.log=1.5"], "config.every.log='1.5' must be a whole number"),
        (["--config.every.log", "1.5"], "config.every.log='1.5' must be a whole number"),
    ],
)
def test_a_flag_that_is_wrong_is_answered_with_the_key_that_was_meant(flags, message):
    with pytest.raises(UsageError) as caught:
        cli.read_config(["--config=default", *flags], own_flags=["--json", "--topology"])
    assert str(caught.value) == message


def test_whole_numbers_on_the_command_line_may_have_an_exponent():
    flags = [
        "--config.every.log=1e3",
        "--config.every.eval",
        "2e3",
        "--config.pretrain.lr=1e-2",
        "--config.model.remat",
    ]
    config = cli.read_config(["--config=default", *flags])
    assert (config.every.log, config.every.eval, config.pretrain.lr, config.model.remat) == (1000, 2000, 0.01, True)


def test_the_list_of_keys_has_each_with_its_default_and_meaning(capsys):
    rows = cli.list_keys([])["keys"]
    assert [row["key"] for row in rows] == keys.paths(keys.tree(RunConfig)) and all(row["meaning"] for row in rows)
    text = capsys.readouterr().out
    assert "  --config.optim.clip=1.0\n      largest norm of the gradient; 0: no limit\n" in text
    assert (
        "  --config.sft.warmup=0.05\n      as config.pretrain.warmup\n" in text
        and max(map(len, text.split("\n"))) <= 100
    )
    assert [row["key"] for row in cli.list_keys(["config.sft.lr"])["keys"]][:2] == ["sft.lr", "sft.lr_core"]
    with pytest.raises(UsageError, match="did you mean config.pretrain.tokens_per_step"):
        cli.list_keys(["batch_size"])


FLAT = (
    "d: 96\nlayers: 2\nheads: 6\nrank: 20\nvocab_size: 521\nlr: 1e-3\nblock: 32\nauto_grow: true\ngrow_plan: [32, 64]\n"
)
NESTED = """
model: {d: 96, layers: 2, heads: 6, rank: 20}
tokenizer: {vocab_size: 521}
pretrain: {lr: 0.001, block: 32, auto_grow: true, grow_plan: "32,64"}
"""


def from_yaml(tmp_path, text: str):
    (tmp_path / "my.yaml").write_text(text)
    return cli.read_config([f"--config=configs/from_yaml.py:{tmp_path}/my.yaml"])


def test_yaml_keys_may_stand_with_or_without_their_group(tmp_path):
    flat = from_yaml(tmp_path, FLAT)
    assert flat == from_yaml(tmp_path, NESTED)
    assert (flat.model.d, flat.model.rank, flat.pretrain.grow_plan, flat.pretrain.lr) == (96, 20, (32, 64), 1e-3)


@pytest.mark.parametrize(
    "text, names",
    [("dd: 3", "dd"), ("pretrain: {stepz: 3}", "stepz"), ("d: [1", "YAML"), ("- a", "keys"), ("heads: 5", "heads=5")],
)
def test_bad_yaml_is_an_error_in_one_line(tmp_path, text, names):
    with pytest.raises(UsageError, match=names) as e:
        from_yaml(tmp_path, text)
    assert "\n" not in str(e.value)


def bomb(item: str) -> str:
    """Return YAML of 9 levels, each with 9 aliases of the one before: 387 million values in 500 characters."""
    levels = [f"a0: &a0 {item}"]
    for i in range(1, 9):
        aliases = "[" + ",".join([f"*a{i - 1}"] * 9) + "]"
        levels.append(f"a{i}: &a{i} " + (aliases if item == "[x]" else "{<<: " + aliases + "}"))
    return "\n".join([*levels, "d: *a8"])


BOMBS = {"lists": bomb("[x]"), "merged groups": bomb("{k: 1}"), "itself": "d: &a [*a]", "brackets": "d: " + "[" * 10**5}


@pytest.mark.parametrize("kind", BOMBS)
def test_yaml_beyond_any_config_is_refused_before_it_is_built(kind, tmp_path):
    with pytest.raises(UsageError, match="my.yaml (has more than|is not YAML)") as e:
        from_yaml(tmp_path, BOMBS[kind])
    assert len(str(e.value)) < 500


def test_yaml_aliases_are_read(tmp_path):
    text = "model: {heads: &heads 6, d: 96, rank: 20}\npretrain: {grow_plan: &plan [256, 512]}\nsft: {grow_plan: *plan}"
    config = from_yaml(tmp_path, text)
    assert config.sft.grow_plan == config.pretrain.grow_plan == (256, 512)
