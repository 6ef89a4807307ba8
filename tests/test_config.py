"""The config: accepted values come back unchanged, and every mistake is one line that names its key."""

import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import default
from lowrank_jax import keys
from lowrank_jax.config import RunConfig, SourceConfig, UsageError, local_path

KEYS = keys.tree(RunConfig)
DEFAULTS = default.get_config().to_dict()
GROW = {"pretrain.auto_grow": True, "pretrain.block": 256, "pretrain.tokens_per_step": 49_152}
ONE_SFT_STEP = {"sft.steps": 1}


def changed(changes: dict) -> dict:
    values = copy.deepcopy(DEFAULTS)
    for dotted, value in changes.items():
        *groups, key = dotted.split(".")
        group = values
        for name in groups:
            group = group[name]
        group[key] = value
    return values


def built(**model) -> RunConfig:
    return RunConfig.from_dict(changed({f"model.{key}": value for key, value in model.items()}))


def leaves(values: dict, prefix: str = "") -> list[str]:
    nested = [leaves(v, f"{prefix}{k}.") if isinstance(v, dict) else [prefix + k] for k, v in values.items()]
    return sum(nested, [])


def rejection(changes: dict) -> str:
    with pytest.raises(UsageError) as caught:
        RunConfig.from_dict(changed(changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_default_config_round_trips_through_dict_and_json():
    config = RunConfig.from_dict(DEFAULTS)
    assert RunConfig.from_dict(config.to_dict()) == config
    again = RunConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config)


def test_values_from_the_command_line_equal_values_from_python():
    plan = {"pretrain.grow_plan": "256,512, 768"}
    as_text = RunConfig.from_dict(changed(GROW | plan | {"model.rank_split": "(1, 1, 3, 3)", "pretrain.lr": "1e-2"}))
    assert as_text.pretrain.grow_plan == (256, 512, 768)
    assert as_text == RunConfig.from_dict(changed(GROW | {"pretrain.grow_plan": [256, 512, 768], "pretrain.lr": 0.01}))


def test_sources_may_be_one_string_or_a_list_of_dicts():
    sources = RunConfig.from_dict(changed({"pretrain.sources": "text:a.txt, json:b.jsonl"})).pretrain.sources
    assert [(s.spec, s.weight) for s in sources] == [("text:a.txt", ((0, 1.0),)), ("json:b.jsonl", ((0, 1.0),))]
    mixed = ["text:a.txt", {"spec": "json:b.jsonl", "weight": 3, "text_key": "body"}]
    sources = RunConfig.from_dict(changed({"pretrain.sources": mixed})).pretrain.sources
    facts = [(s.spec, s.weight[0][1], s.text_key, s.split) for s in sources]
    assert facts == [("text:a.txt", 1, "text", "train"), ("json:b.jsonl", 3, "body", "train")]
    assert RunConfig.from_dict(changed({"pretrain.sources": json.dumps(mixed)})).pretrain.sources == sources


@pytest.mark.parametrize(
    "weight", ["0:0.7/100:0.3", {0: 0.7, 100: 0.3}, [[0, 0.7], [100, 0.3]], ((0, "0.7"), ("100", 0.3))]
)
def test_a_weight_may_change_with_the_step(weight):
    (source,) = RunConfig.from_dict(
        changed({"pretrain.sources": [{"spec": "text:a", "weight": weight}]})
    ).pretrain.sources
    assert source.weight == ((0, 0.7), (100, 0.3))
    if isinstance(weight, str):
        assert RunConfig.from_dict(changed({"pretrain.sources": f"text:a@{weight}"})).pretrain.sources == (source,)


WEIGHTS = {
    "0": "above 0",
    "-1": "at least 0",
    "10:1": "rise from 0",
    "0:1/0:2": "rise from 0",
    "0:1/5:1/3:1": "rise from 0",
}
WEIGHTS |= {"0:0/9:0": "above 0", "0:x": "a number", "0:1:2": "pairs of a step and a number", "x:1": "a whole number"}


@pytest.mark.parametrize("weight", WEIGHTS)
def test_an_impossible_weight_is_an_error(weight):
    sources = [{"spec": "text:a", "weight": weight}, "text:b"]
    assert WEIGHTS[weight] in rejection({"pretrain.sources": sources})


def test_weights_that_are_all_zero_at_some_step_are_an_error():
    sources = "text:a@0:1/50:0, text:b@0:0/20:1/70:0"
    assert "config.pretrain.sources: every weight is 0 from step 70 on" in rejection({"pretrain.sources": sources})


def test_readers_must_divide_the_rows_of_every_length():
    assert "config.pretrain.readers=5 must divide the 48 rows of 1024 tokens" in rejection({"pretrain.readers": 5})


def test_an_unused_growth_plan_is_not_checked():
    assert not RunConfig.from_dict(changed({"pretrain.grow_plan": "512,256"})).pretrain.auto_grow


def test_an_sft_phase_without_steps_is_not_checked():
    broken = {"sft.sources": "", "sft.block": 1000, "sft.lr": 0.0}
    assert RunConfig.from_dict(changed(broken)).sft.steps == 0
    assert "config.sft.sources" in rejection(broken | ONE_SFT_STEP)


@pytest.mark.parametrize("heads, d, rank", [(6, 48, 20), (1, 7, 3), (12, 60, 60), (5, 25, 1)])
def test_odd_sizes_are_accepted(heads, d, rank):
    m = built(heads=heads, d=d, rank=rank, rank_split=(1, 1, 1, 1)).model
    assert m.head_dim * heads == d
    assert m.ranks == (rank,) * 4
    assert m.hidden % 64 == 0 and m.hidden >= 8 * d / 3


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"model.layers": "two"}, "config.model.layers='two'"),
        ({"model.layers": 2.5}, "config.model.layers=2.5"),
        ({"model.layers": True}, "config.model.layers=True"),
        ({"model.layers": None}, "config.model.layers=None"),
        ({"model.layers": [8]}, "config.model.layers=[8]"),
        ({"model.layers": math.inf}, "config.model.layers=inf"),
        ({"model.shared_kv": 1}, "config.model.shared_kv=1"),
        ({"model.shared_kv": "yes"}, "config.model.shared_kv='yes'"),
        ({"model.rank_split": 4}, "config.model.rank_split=4"),
        ({"model.rank_split": "1,1,x,1"}, "config.model.rank_split='x'"),
        ({"model.rank_split": (1, 1, math.inf, 1)}, "config.model.rank_split=inf"),
        ({"model": 3}, "config.model must be a group"),
        ({"precision": 16}, "config.precision=16"),
        ({"pretrain.lr": "fast"}, "config.pretrain.lr='fast'"),
        ({"pretrain.lr": math.nan}, "config.pretrain.lr=nan"),
        ({"pretrain.tokens_per_param": math.inf}, "config.pretrain.tokens_per_param=inf"),
        ({"pretrain.grow_plan": "256,long"}, "config.pretrain.grow_plan='long'"),
        ({"pretrain.sources": 3}, "config.pretrain.sources=3"),
        ({"pretrain.sources": [3]}, "config.pretrain.sources[0]"),
        ({"pretrain.sources": [{"spec": 3}]}, "config.pretrain.sources[0].spec=3"),
        ({"pretrain.sources": [{"weight": 1.0}]}, "config.pretrain.sources[0].spec is missing"),
    ],
)
def test_a_wrong_type_is_named(changes, named):
    assert named in rejection(changes)


@pytest.mark.parametrize(
    "changes, named, near",
    [
        ({"model.rnk": 8}, "config.model.rnk", "rank"),
        ({"sft.stesp": 8}, "config.sft.stesp", "steps"),
        ({"pretain": {}}, "config.pretain", "pretrain"),
        ({"pretrain.sources": [{"spec": "text:a", "wieght": 2}]}, "config.pretrain.sources[0].wieght", "weight"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(changes, named, near):
    assert rejection(changes) == f"unknown config key {named}; did you mean {near}?"


@pytest.mark.parametrize(
    "dotted, meant",
    [
        ("pretrain.batch_size", "tokens_per_step"),
        ("sft.learning_rate", "lr"),
        ("sft.max-steps", "steps"),
        ("model.hidden_size", "d"),
        ("every.save_every", "save"),
        ("lr", "config.pretrain.lr"),
        ("batch_size", "config.pretrain.tokens_per_step"),
        ("model.vocab_size", "config.tokenizer.vocab_size"),
        ("model.optimizer", "config.optim.name"),
        ("pretrain.bach_size", "tokens_per_step"),
        ("pretrain.dataset", "sources"),
    ],
)
def test_a_key_of_another_group_or_of_another_trainer_is_answered_with_ours(dotted, meant):
    message = f"unknown config key config.{dotted}; did you mean {meant}?"
    assert keys.lookup(dotted, KEYS)[1] == message
    *group, key = dotted.split(".")
    group = changed({})[group[0]] if group else changed({})
    group[key] = 3
    with pytest.raises(UsageError) as caught:
        RunConfig.from_dict(changed({dotted.split(".")[0]: group} if "." in dotted else {dotted: 3}))
    assert str(caught.value) == message


def test_every_synonym_means_a_key_and_is_none():
    source = [field.name for field in dataclasses.fields(SourceConfig)]
    paths = keys.paths(KEYS)
    names = {path.split(".")[-1] for path in paths}
    for key, words in keys.SYNONYMS.items():
        assert key in paths or key in names or key in source, key
        for word in words.split():
            group = "config.pretrain.sources[0]" if key in source else "config"
            siblings, root = (source, {}) if key in source else (KEYS, KEYS)
            assert keys.meant(word, group, siblings, root).split(".")[-1] == key.split(".")[-1], word


@pytest.mark.parametrize("text, number", [("1e3", 1000), ("3.0", 3), ("1_000", 1000), ("0x10", 16), ("2.5e1", 25)])
def test_a_whole_number_may_be_written_with_an_exponent(text, number):
    assert RunConfig.from_dict(changed({"pretrain.steps": text})).pretrain.steps == number


@pytest.mark.parametrize("text", ["1.5", "1e-1", "nan", "inf", "1e999999999", "snan", "", "ten"])
def test_any_other_number_is_no_whole_number(text):
    assert rejection({"pretrain.steps": text}) == f"config.pretrain.steps={text!r} must be a whole number"


def test_every_key_has_a_meaning_beside_its_default():
    meanings = keys.meanings(pathlib.Path(default.__file__).read_text())
    assert not [path for path in keys.paths(KEYS) if not meanings.get(path)]
    assert meanings["every.log"] == "steps between two logged losses"
    assert meanings["model.heads"] == "must divide d"
    assert meanings["pretrain.schedule"] == "wsd (warm-up, stable, linear decay) | cosine | linear"
    assert meanings["mesh"].startswith("Devices along each axis; their product")


def test_a_missing_key_is_named():
    values = changed({})
    del values["model"]["rank"]
    with pytest.raises(UsageError, match=r"^config key config\.model\.rank is missing; see configs/default\.py$"):
        RunConfig.from_dict(values)


@pytest.mark.parametrize(
    "changes, named",
    [
        (GROW | {"pretrain.grow_plan": "512,256"}, "config.pretrain.grow_plan=512,256 must rise"),
        (GROW | {"pretrain.grow_plan": "256,512,512"}, "config.pretrain.grow_plan=256,512,512 must rise"),
        (GROW | {"pretrain.grow_plan": ""}, "config.pretrain.grow_plan is empty"),
        (GROW | {"pretrain.grow_plan": "128,256"}, "starts below config.pretrain.block=256"),
        (GROW | {"pretrain.grow_plan": "256,512", "pretrain.grow_every_steps": 0}, "pretrain.grow_every_steps=0"),
        ({"model.heads": 15}, "config.model.heads=15 does not divide config.model.d=512; use 16"),
        ({"model.heads": 0}, "config.model.heads=0"),
        ({"model.rank": 513}, "config.model.rank=513 must not exceed config.model.d=512"),
        ({"model.rank": -1}, "config.model.rank=-1"),
        ({"model.rank": 1, "model.rank_split": (1, 1, 50, 50)}, "config.model.rank=1"),
        ({"model.rank_split": (1, 1, 1)}, "config.model.rank_split="),
        ({"model.rank_split": (1, 0, 1, 1)}, "config.model.rank_split="),
        ({"model.rank_split": (1, 1, 0, 1)}, "config.model.rank_split="),
        ({"model.rank": 1, "model.rank_split": (0, 1, 50, 0)}, "config.model.rank=1"),
        ({"model.kv_heads": 3}, "config.model.kv_heads=3 does not divide config.model.heads; use 1"),
        ({"model.kv_heads": 32}, "config.model.kv_heads=32 does not divide config.model.heads; use 1"),
        ({"model.rank_split": (1, -1, 1, 1)}, "config.model.rank_split="),
        ({"model.rank_split": ()}, "config.model.rank_split="),
        ({"model.vocab": -1}, "config.model.vocab=-1"),
        ({"model.attention": "flash"}, "config.model.attention='flash'"),
        ({"pretrain.tokens_per_step": 1000, "pretrain.block": 128}, "config.pretrain.tokens_per_step=1000"),
        (GROW | {"pretrain.grow_plan": "256,500"}, "config.pretrain.tokens_per_step=49152"),
        (ONE_SFT_STEP | {"sft.tokens_per_step": 1000, "sft.block": 128}, "config.sft.tokens_per_step=1000"),
        ({"pretrain.sources": ""}, "config.pretrain.sources is empty"),
        ({"pretrain.sources": []}, "config.pretrain.sources is empty"),
        ({"pretrain.sources": "plays.txt"}, "config.pretrain.sources[0]='plays.txt'"),
        ({"pretrain.sources": "text:a.txt,text:"}, "config.pretrain.sources[1]='text:'"),
        ({"pretrain.sources": [{"spec": "text:a", "weight": 0}]}, "config.pretrain.sources[0].weight=0"),
        ({"pretrain.steps": -2}, "config.pretrain.steps=-2"),
        ({"pretrain.tokens_per_param": 0}, "config.pretrain.tokens_per_param"),
        ({"pretrain.block": 0}, "config.pretrain.block=0"),
        ({"pretrain.lr": 0}, "config.pretrain.lr=0"),
        ({"pretrain.warmup": 0.8}, "config.pretrain.warmup=0.8 + config.pretrain.cooldown"),
        ({"pretrain.lr_end": 1.5}, "config.pretrain.lr_end=1.5"),
        ({"pretrain.schedule": "steps"}, "config.pretrain.schedule='steps'"),
        ({"pretrain.eval_fraction": 0.9}, "config.pretrain.eval_fraction=0.9"),
        ({"precision": "int4"}, "config.precision='int4'"),
        ({"optim.name": "sgd"}, "config.optim.name='sgd'"),
        ({"optim.beta2": 1.0}, "config.optim.beta2=1.0"),
        ({"optim.clip": -1.0}, "config.optim.clip"),
        ({"tokenizer.vocab_size": -1}, "config.tokenizer"),
        ({"every.save": 0}, "config.every.save=0"),
        ({"seed": -1}, "config.seed=-1"),
    ],
)
def test_an_impossible_value_is_named(changes, named):
    assert named in rejection(changes)


# Keys with the last value that is allowed and the first that is not; those of a phase for pretraining and SFT.
EDGES = [("tokenizer.vocab_size model.vocab model.rank model.mlp model.mlp_rank model.embed_rank seed profile", 0, -1)]
EDGES += [("mesh.data mesh.fsdp mesh.tensor", 0, -1)]
EDGES += [("model.d model.layers model.heads tokenizer.train_bytes", 1, 0)]
EDGES += [("every.log every.eval every.save every.keep every.fp8_check", 1, 0)]
EDGES += [("memory_gb every.save_minutes optim.weight_decay optim.clip optim.z_loss optim.skip_sigma", 0.0, -1e-9)]
EDGES += [("optim.beta1 optim.beta2 optim.label_smoothing optim.ema", *ends) for ends in ((0.0, -1e-9), (0.999, 1.0))]
EDGES += [("model.rank", 512, 513)]
PHASE = [
    ("steps", -1, -2),
    ("microbatch_tokens max_skipped readers", 0, -1),
    ("block eval_tokens", 1, 0),
    ("lr", 1e-9, 0.0),
]
PHASE += [("lr_core lr_head tokens_per_param", 0.0, -1e-9), ("tokens_per_step", 1024, 0)]
PHASE += [("warmup cooldown lr_end eval_fraction", 0.0, -1e-9)]
PHASE += [("warmup cooldown lr_end", 1.0, 1.001), ("eval_fraction", 0.5, 0.501)]
EDGES = [(key, *ends) for keys, *ends in EDGES for key in keys.split()]
PHASE = [(key, *ends) for keys, *ends in PHASE for key in keys.split()]
EDGES += [(f"{phase}.{key}", *ends) for phase in ("pretrain", "sft") for key, *ends in PHASE]
# Other keys that must change along with a key.
WITH = {"model.rank": {"model.rank_split": (1, 1, 1, 1)}}
WITH |= {"model.d": {"model.heads": 1, "model.rank": 1, "model.rank_split": (1, 1, 1, 1)}}
WITH |= {f"{phase}.warmup": {f"{phase}.cooldown": 0.0} for phase in ("pretrain", "sft")}
WITH |= {f"{phase}.cooldown": {f"{phase}.warmup": 0.0} for phase in ("pretrain", "sft")}
WITH |= {"pretrain.tokens_per_param": {"pretrain.steps": 1}}


@pytest.mark.parametrize("key, last, beyond", EDGES)
def test_a_key_takes_its_last_allowed_value_and_not_the_next(key, last, beyond):
    others = ONE_SFT_STEP | WITH.get(key, {})
    assert RunConfig.from_dict(changed(others | {key: last}))
    assert f"config.{key}" in rejection(others | {key: beyond})


CHOICES = {"precision": "auto fp32 bf16 fp16 fp8", "optim.name": "muon adamw", "track": "tensorboard wandb mlflow"}
CHOICES |= {"model.attention": "auto reference chunked cudnn splash native"}
CHOICES |= {"pretrain.schedule": "wsd cosine linear", "sft.schedule": "wsd cosine linear"}


@pytest.mark.parametrize("key", CHOICES)
def test_a_choice_takes_each_of_its_words_and_an_error_lists_them(key):
    for word in CHOICES[key].split():
        assert RunConfig.from_dict(changed(ONE_SFT_STEP | {key: word}))
    message = rejection(ONE_SFT_STEP | {key: "other"})
    assert message == f"config.{key}='other' must be one of {', '.join(CHOICES[key].split())}"


TOGETHER = [
    (
        {"pretrain.warmup": 0.6, "pretrain.cooldown": 0.5},
        "config.pretrain.warmup=0.6 + config.pretrain.cooldown=0.5",
    ),
    (
        ONE_SFT_STEP | {"sft.warmup": 0.6, "sft.cooldown": 0.5},
        "config.sft.warmup=0.6 + config.sft.cooldown=0.5",
    ),
    ({"pretrain.steps": 0, "pretrain.tokens_per_param": 0.0}, "config.pretrain.steps and config.pretrain.tokens_per_"),
    ({"model.rank": 0, "model.shared_kv": True}, "config.model.shared_kv needs latents"),
    ({"pretrain.freeze": "(embed"}, "config.pretrain.freeze='(embed' is not a regular expression"),
    ({"pretrain.freeze": "(" * 10**4}, "config.pretrain.freeze='((("),
    ({"pretrain.freeze": "a{99999999999}"}, "config.pretrain.freeze='a{"),
    (ONE_SFT_STEP | {"sft.freeze": "(embed"}, "config.sft.freeze='(embed' is not a regular expression"),
]


@pytest.mark.parametrize("changes, named", TOGETHER)
def test_values_that_contradict_each_other_are_named(changes, named):
    assert named in rejection(changes)


def take_advice(changes: dict) -> list[str]:
    """Set what the errors advise until the config is accepted; return the keys. No key is advised twice."""
    taken = []
    while True:
        try:
            RunConfig.from_dict(changed(changes))
            return taken
        except UsageError as e:
            key, value = re.fullmatch(r"config\.([\w.]+)=.*; use (-?\d+)(?: \(.*\))?", str(e)).groups()
            assert key not in taken, e
            taken.append(key)
            changes = changes | {key: int(value)}


GROW_ODDLY = {"pretrain.auto_grow": True, "pretrain.block": 32, "pretrain.grow_plan": "32,48"}
ADVISED = [
    ({"pretrain.tokens_per_step": 1000, "pretrain.block": 128}, "pretrain.tokens_per_step"),
    (GROW_ODDLY | {"pretrain.tokens_per_step": 1024}, "pretrain.tokens_per_step"),
    ({"pretrain.tokens_per_step": 24, "pretrain.block": 16, "pretrain.readers": 2}, "pretrain.tokens_per_step"),
    ({"pretrain.readers": 5}, "pretrain.readers"),
    ({"pretrain.readers": 4096}, "pretrain.readers"),
    (ONE_SFT_STEP | {"sft.tokens_per_step": 1000}, "sft.tokens_per_step"),
    ({"model.heads": 15}, "model.heads"),
    ({"model.heads": 10**9}, "model.heads"),
]  # fmt: skip


@pytest.mark.parametrize("changes, key", ADVISED)
def test_the_advised_value_is_accepted(changes, key):
    assert take_advice(changes)[:1] == [key]


lengths = st.lists(st.integers(1, 60), min_size=1, max_size=3, unique=True).map(sorted)


@settings(max_examples=100)
@given(lengths, st.integers(1, 5000), st.integers(0, 64), st.integers(1, 60), st.integers(1, 60))
def test_advice_on_tokens_readers_and_heads_leads_to_a_config(lengths, tokens, readers, d, heads):
    changes = {"block": lengths[0], "auto_grow": True, "grow_plan": lengths, "tokens_per_step": tokens}
    changes = {f"pretrain.{key}": value for key, value in (changes | {"readers": readers}).items()}
    changes |= {"model.d": d, "model.heads": heads, "model.rank": 0}
    assert len(take_advice(changes)) <= 3


REMEDIES = [  # changes that are refused, words of the remedy, and the remedy
    (GROW | {"pretrain.grow_plan": "128,256"}, "lower the block", {"pretrain.block": 128}),
    (GROW | {"pretrain.grow_plan": "128,512"}, "start the plan with it", {"pretrain.grow_plan": "256,512"}),
    (GROW | {"pretrain.grow_plan": ""}, "set config.pretrain.auto_grow=False", {"pretrain.auto_grow": False}),
    ({"model.rank": 0, "model.shared_kv": True}, "set config.model.rank above 0", {"model.rank": 1}),
    ({"model.rank": 1, "model.rank_split": (1, 1, 50, 50)}, "raise it", {"model.rank": 64}),
    ({"model.rank": 1, "model.rank_split": (1, 1, 50, 50)}, "even out config", {"model.rank_split": (1, 1, 1, 1)}),
    ({"pretrain.tokens_per_param": 0}, "set one", {"pretrain.steps": 1}),
    ({"pretrain.tokens_per_param": 0}, "set one", {"pretrain.tokens_per_param": 1}),
]  # fmt: skip


@pytest.mark.parametrize("changes, words, remedy", REMEDIES)
def test_a_remedy_in_words_is_accepted(changes, words, remedy):
    assert words in rejection(changes)
    assert RunConfig.from_dict(changed(changes | remedy))


def test_without_a_common_multiple_in_reach_other_lengths_are_advised():
    lengths = [997, 1009, 1013, 1019]
    changes = {"pretrain.auto_grow": True, "pretrain.block": 997, "pretrain.grow_plan": lengths}
    assert rejection(changes).endswith("; use lengths with a smaller common multiple")


def test_steps_of_minus_1_are_from_tokens_per_param_and_0_is_no_phase():
    """Before -1, a pretraining of 0 steps was one of tokens_per_param; it still is without weights to start from."""
    assert changed({})["pretrain"]["steps"] == -1
    steps_of = lambda **keys: RunConfig.from_dict(changed({key.replace("__", "."): x for key, x in keys.items()}))
    alone = steps_of(init_from="runs/a", pretrain__steps=0, sft__steps=3)
    assert list(alone.phases) == ["sft"] and RunConfig.from_dict(alone.to_dict()) == alone
    assert list(steps_of(pretrain__steps=0, sft__steps=3).phases) == ["pretrain", "sft"]
    assert steps_of(pretrain__steps=0).pretrain.steps == steps_of(pretrain__steps="0").pretrain.steps == -1
    assert list(steps_of(init_from="runs/a").phases) == ["pretrain"]
    nothing = {"init_from": "runs/a", "pretrain.steps": 0}
    assert "config.pretrain.steps=0 and config.sft.steps=0 leave nothing to train" in rejection(nothing)
    assert RunConfig.from_dict(changed(nothing | {"pretrain.steps": -1}))  # its advice


def test_a_phase_without_steps_is_not_checked():
    broken = {"init_from": "runs/a", "pretrain.sources": "", "pretrain.block": 1000, "pretrain.steps": 0}
    assert RunConfig.from_dict(changed(broken | ONE_SFT_STEP))


BOMB = functools.reduce(lambda inner, _: [inner] * 10, range(40), [1])
DEEP = functools.reduce(lambda inner, _: [inner], range(5000), 1)
SIZES = [10**12, 10**30, 10**5000, -(10**30), "1" * 5000, 1e300, -math.inf, math.nan, "x" * 10**6, BOMB, DEEP]
SIZES += [list(range(10**5)), dict.fromkeys(range(10**5)), "[" * 10**5, "(" * 10**5, "a@1:" * 10**5, None]
SIZED = "model.d model.layers model.vocab model.heads model.rank model.mlp model.embed_rank pretrain.block"
SIZED += " pretrain.tokens_per_step pretrain.steps pretrain.readers tokenizer.vocab_size pretrain.warmup precision"
SIZED += " pretrain.grow_plan pretrain.sources model.rank_split model every"


@pytest.mark.parametrize("key", SIZED.split())
def test_a_size_that_no_machine_holds_is_one_short_line_at_once(key):
    for size in SIZES:
        started = time.process_time()
        message = rejection({"pretrain.auto_grow": True, key: size})
        assert time.process_time() - started < 1 and len(message) < 600 and f"config.{key}" in message


@pytest.mark.parametrize("key", ["init_from", "tokenizer.path", "track", "pretrain.sample", "every.keep", "seed"])
def test_any_other_size_is_accepted_or_one_short_line_at_once(key):
    for size in SIZES:
        started = time.process_time()
        with contextlib.suppress(UsageError):
            RunConfig.from_dict(changed({key: size}))
        assert time.process_time() - started < 1


LARGEST = {"model.d": 2**17, "model.layers": 2**10, "pretrain.steps": 10**9, "every.keep": 10**15, "seed": 2**63 - 1}
LARGEST |= {"model.vocab": 2**24, "pretrain.microbatch_tokens": 10**15, "memory_gb": 1e15, "optim.clip": 1e15}


@pytest.mark.parametrize("key", LARGEST)
def test_the_largest_value_is_accepted_and_the_next_is_not(key):
    assert RunConfig.from_dict(changed({key: LARGEST[key]}))
    assert re.search(rf"config\.{key}=\S+ must be (at most|below) ", rejection({key: LARGEST[key] * 1.25}))


@pytest.mark.parametrize(
    "sources",
    [
        ["text:a"] * 10**5,
        ",".join(["text:a"] * 10**5),
        [{"spec": "text:a", "weight": [[i, 1] for i in range(200_000)]}],
        "text:a@" + "/".join(f"{i}:1" for i in range(200_000)),
        [{"spec": "text:a", "weight": [[i, 1] for i in range(1000)]}] * 1000,
    ],
)
def test_a_list_of_sources_or_weights_has_a_bound(sources):
    started = time.process_time()
    assert "has more than 1,000 items" in rejection({"pretrain.sources": sources})
    assert time.process_time() - started < 1


def test_a_negative_zero_is_zero():
    config = RunConfig.from_dict(changed({"memory_gb": -0.0, "pretrain.lr_core": "-0.0", "optim.clip": -0.0}))
    assert [math.copysign(1, x) for x in (config.memory_gb, config.pretrain.lr_core, config.optim.clip)] == [1, 1, 1]


def test_the_tokenizers_size_fills_a_vocab_of_0_and_must_equal_any_other():
    assert built(vocab=0).with_vocab(257).model.vocab == 257
    assert built(vocab=257).with_vocab(257).model.vocab == 257
    with pytest.raises(UsageError, match=r"config\.model\.vocab=300"):
        built(vocab=300).with_vocab(257)


SCHEMES = [
    "s3://bucket/x",
    "gs://b",
    "memory://x",
    "file:///tmp/x",
    "hf://o/n",
    "HTTPS://host/x",
    "s3:/bucket/x",
    " gs://b",
]


@pytest.mark.parametrize("text", [*SCHEMES, "~nobody-of-that-name/x", "a\0b"])
def test_only_local_paths_are_taken(text):
    with pytest.raises(UsageError, match="^--flag=[^\n]+$"):
        local_path(text, "--flag")
    assert rejection({"tokenizer.path": text}).startswith("config.tokenizer.path=")
    if text != "s3://bucket/x":  # which may hold a run
        assert rejection({"init_from": text}).startswith("config.init_from=")


def test_a_home_folder_is_expanded_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert [local_path(text, "x") for text in ("~", "~/a b")] == ["/home/me", "/home/me/a b"]
    for text in ("/a/~", "./~/x", "org/name", "", "from_yaml.py:/a.yaml"):
        assert local_path(text, "x") == text
    assert local_path("~root/x", "x") == os.path.expanduser("~root/x") != "~root/x"
    config = RunConfig.from_dict(changed({"init_from": "~/runs/a", "tokenizer.path": "~/t"}))
    assert (config.init_from, config.tokenizer.path) == ("/home/me/runs/a", "/home/me/t")


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3000),
    st.sampled_from([math.nan, math.inf, -math.inf, 0.5, -0.5, 2.5]),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(-2, 9), st.text(max_size=2), st.none()), max_size=4),
    st.dictionaries(st.sampled_from(["spec", "weight", "x"]), st.integers(-2, 9), max_size=2),
)


@settings(max_examples=600, deadline=None)
@given(st.sampled_from([*leaves(DEFAULTS), "model", "sft", "pretrain.sources", "model.rank_split"]), junk)
def test_any_value_of_any_key_is_accepted_or_rejected_in_one_line(key, value):
    try:
        config = RunConfig.from_dict(changed(ONE_SFT_STEP | {key: value}))
    except UsageError as e:
        assert "\n" not in str(e) and f"config.{key.split('.')[0]}" in str(e)
    else:
        assert RunConfig.from_dict(config.to_dict()) == config


shares = st.tuples(*[st.floats(0.05, 8)] * 4)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 512), shares)
def test_ranks_add_up_to_four_times_rank_or_the_split_is_rejected(rank, split):
    try:
        ranks = built(rank=rank, rank_split=split).model.ranks
    except UsageError as e:
        assert min(split) / sum(split) * 4 * rank < 1 and "config.model.rank=" in str(e)
    else:
        assert sum(ranks) == 4 * rank
        assert min(ranks) >= 1
        assert all(abs(r - 4 * rank * s / sum(split)) < 1 + 1e-6 for r, s in zip(ranks, split))


def test_a_share_of_0_keeps_q_or_o_dense_and_the_others_ranks_may_stay_as_they_were():
    assert built(rank=32).model.ranks == (16, 16, 48, 48)
    assert built(rank=20, rank_split=(1, 1, 3, 0)).model.ranks == (16, 16, 48, 0)
    assert built(rank=16, rank_split=(0, 1, 3, 0)).model.ranks == (0, 16, 48, 0)


@settings(max_examples=200, deadline=None)
@given(st.integers(80, 512), shares)
def test_shared_kv_gives_keys_and_values_the_mean_of_their_ranks(rank, split):
    q, k, v, o = built(rank=rank, rank_split=split).model.ranks
    shared = built(rank=rank, rank_split=split, shared_kv=True).model.ranks
    assert (shared[0], shared[3]) == (q, o)
    assert shared[1] == shared[2] and abs(shared[1] - (k + v) / 2) <= 0.5
