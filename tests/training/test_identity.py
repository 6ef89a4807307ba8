"""The identity of a run: its tokenizer by the hash of its files, its precision, and its own config.json."""

import dataclasses
import functools
import json
import re

import pytest
from conftest import run_config

from lowrank_jax import cli
from lowrank_jax.config import UsageError
from lowrank_jax.data import tokenizer
from lowrank_jax.machine import sharding
from lowrank_jax.training import identity, run_folder, trained

OWN = "config.json"


@pytest.fixture
def run(tok, tmp_path):
    """A function: write a run's config and tokenizer, without weights, and return its folder."""

    def write(name: str = "run", **changes) -> str:
        folder = str(tmp_path / name)
        tok.save(run_folder.tokenizer_folder(folder))
        run_folder.write_config(folder, run_config(model__vocab=tok.vocab_size, **changes), tok.files_sha256)
        return folder

    return write


def edit(folder: str, change) -> None:
    path = f"{folder}/{OWN}"
    with open(path, encoding="utf-8") as f:
        values = json.load(f)
    change(values)
    with open(path, "w", encoding="utf-8") as f:
        json.dump(values, f)


def refusal(action, *arguments) -> str:
    with pytest.raises(UsageError) as e:
        action(*arguments)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_a_tokenizer_with_any_other_byte_is_noticed_and_named(run, tok):
    folder = run()
    assert identity.open_config(folder)[1].files_sha256 == tok.files_sha256
    for name, content in tok.files.items():
        path = f"{run_folder.tokenizer_folder(folder)}/{name}"
        for at in (0, len(content) // 2, len(content) - 1):
            with open(path, "wb") as f:
                f.write(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
            resume = functools.partial(identity.resume, run_config(model__vocab=tok.vocab_size))
            for opens in (identity.open_config, trained.open_run, resume):
                line = refusal(opens, folder)
                assert line.startswith(f"{folder}/tokenizer is damaged: its files are not those that {folder} was ")
            line = refusal(identity.first_tokenizer, run_config(init_from=folder))
            assert "is damaged" in line
        with open(path, "wb") as f:
            f.write(content)
    edit(folder, lambda values: values.pop("tokenizer_sha256"))  # the remedy that the line names
    identity.open_config(folder)


def test_a_config_without_a_size_of_the_vocabulary_keeps_that_of_its_run(run, tok):
    for size in (32_000, 1088):  # as the default was, and one that followed from the data
        folder = run(f"run{size}", tokenizer__vocab_size=size)
        config, old, _ = identity.resume(run_config(model__vocab=0), folder)
        assert config.tokenizer == old.tokenizer and config.tokenizer.vocab_size == size
    assert "vocab_size" in refusal(identity.resume, run_config(model__vocab=0, tokenizer__vocab_size=99), folder)


def test_the_vocabulary_of_a_new_run_follows_its_corpus_where_the_config_names_no_size(make, tmp_path):
    for name, size in (("a", 700_000), ("b", 500_000)):
        (tmp_path / f"{name}.txt").write_bytes(b"word " * (size // 5))
    sources = {"pretrain__sources": f"text:{tmp_path}/*.txt", "sft__sources": f"text:{tmp_path}/b.txt"}
    config_of = lambda **changes: identity.with_tokenizer(run_config(model__vocab=0, **sources | changes))[0]
    assert config_of().model.vocab == config_of().tokenizer.vocab_size == 1088
    assert config_of(tokenizer__vocab_size=700).model.vocab == 700
    assert config_of(sft__steps=5).model.vocab == 1280  # both phases
    refused = lambda: config_of(pretrain__sources=f"text:{tmp_path}/none.txt")
    assert "none.txt: no such file" in refusal(refused)


def test_the_same_tokenizer_at_another_path_is_the_same_run(run, tok, make, tmp_path):
    folder, same, other = run(), tmp_path / "same", tmp_path / "other"
    tok.save(same)
    tokenizer.train([make.prose(500)], tok.vocab_size).save(other)
    config_with = lambda **changes: run_config(model__vocab=0, **changes)
    config, old, _ = identity.resume(config_with(tokenizer__path=str(same), tokenizer__vocab_size=9), folder)
    assert config.model.vocab == old.model.vocab == tok.vocab_size and config.tokenizer.path == str(same)
    line = refusal(identity.resume, config_with(tokenizer__path=str(other)), folder)
    assert line.startswith(f"{folder} holds a different run: its config.tokenizer.path is , not {other}")
    assert "no such file" in refusal(identity.resume, config_with(tokenizer__path=f"{same}/none.model"), folder)
    moved = run("moved", tokenizer__path="/gone/before")
    identity.resume(config_with(tokenizer__path=str(same)), moved)
    identity.resume(config_with(tokenizer__path="/gone/before"), moved)  # its own copy is what counts
    assert "config.tokenizer.path" in refusal(identity.resume, config_with(), moved)


def test_a_mistake_in_a_runs_own_config_names_its_file_and_key(run):
    folder = run()
    for change, named in (
        (lambda values: values["model"].update(d=10**12), "config.model.d=1000000000000 must be at most"),
        (lambda values: values["model"].update(later=1), "unknown config key config.model.later"),
        (lambda values: values.pop("seed"), "config key config.seed is missing"),
        (lambda values: values.update(pretrain=[]), "config.pretrain must be a group of keys"),
    ):
        own = run()
        edit(own, change)
        line = refusal(run_folder.read_config, own)
        assert line.startswith(f"{own}/{OWN}: {named}") and "--config" not in line
    for text in ("", "[", "[" * 10**5, "7", "null", '{"seed": 1', "\ud800"):
        with open(f"{folder}/{OWN}", "w", encoding="utf-8", errors="surrogatepass") as f:
            f.write(text)
        assert refusal(run_folder.read_config, folder).startswith(f"{folder}/{OWN}")


def test_a_run_that_init_from_names_is_told_by_that_key(tmp_path):
    for opens in (identity.open_config, lambda folder, flag: trained.open_run(folder, None, flag)):
        line = refusal(opens, str(tmp_path), "config.init_from")
        assert line.startswith(f"config.init_from={tmp_path} holds no run")
    assert refusal(identity.first_tokenizer, run_config(init_from=str(tmp_path))) == line


def test_a_pretraining_of_0_steps_in_an_older_run_was_one_of_tokens_per_param(run):
    folder = run(init_from="runs/a", pretrain__steps=0, sft__steps=3)
    assert list(run_folder.read_config(folder).phases) == ["sft"]
    edit(folder, lambda values: values.pop("tokenizer_sha256"))
    assert run_folder.read_config(folder).pretrain.steps == -1


def test_no_pretraining_without_weights_to_start_from_is_told(capsys):
    flags = ["--config=configs/default.py", "--config.pretrain.steps=0"]
    assert cli.read_config(flags).pretrain.steps == -1
    assert "config.pretrain.steps=0 without config.init_from means -1" in capsys.readouterr().err
    assert cli.read_config([*flags, "--config.init_from=runs/a", "--config.sft.steps=3"]).pretrain.steps == 0
    assert cli.read_config(flags[:1]).pretrain.steps == -1
    assert capsys.readouterr().err == ""


def test_auto_keeps_the_precision_of_the_run_and_says_so(run, capsys):
    """Tests run on a CPU, where auto is fp32."""
    folder, auto = run(), run_config(model__vocab=0)
    assert identity.resume(auto, folder)[0].precision == "auto"
    run_folder.log_event(folder, "start", 0, precision="bf16")  # as on a GPU
    assert identity.resume(auto, folder)[0].precision == "bf16"
    identity.announce(*identity.resume(auto, folder)[:2], sharding.one_device())
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first.endswith("precision bf16 (as the run had it; auto is fp32 on this device)")
    assert second == "config.precision was 'auto', is 'bf16'"
    same = dataclasses.replace(auto, precision="bf16")
    assert identity.resume(same, folder)[0] == identity.resume(auto, folder)[0]
    line = refusal(identity.resume, dataclasses.replace(auto, precision="fp32"), folder)
    advised = re.search(r"use (\w+), or (\w+)$", line)
    for value in advised.groups():
        assert identity.resume(dataclasses.replace(auto, precision=value), folder)
    fixed = run("fixed", precision="fp16")
    assert identity.resume(auto, fixed)[0].precision == "fp16"
    assert "its config.precision is fp16, not bf16" in refusal(identity.resume, same, fixed)
    assert identity.resume(auto, run("same", precision="fp32"))[0].precision == "auto"  # the same on this device


def test_the_start_says_devices_precision_and_every_change_on_a_line_of_its_own(capsys):
    old = run_config(pretrain__sources="text:a.txt@2", every__log=10)
    new = run_config(pretrain__sources="text:a.txt@0:1/50:0,json:b*.jsonl", every__log=5, pretrain__sample="x" * 10**4)
    facts = identity.announce(new, old, sharding.one_device())
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training on 1 x cpu (mesh data 1, fsdp 1, tensor 1), precision fp32 (auto)"
    shown = "'text:a.txt@0:1/50:0(text,messages,train) json:b*.jsonl@0:1(text,messages,train)'"
    assert f"config.pretrain.sources was 'text:a.txt@0:2(text,messages,train)', is {shown}" in lines
    assert "config.every.log was 10, is 5" in lines and len(lines) == 4 and max(map(len, lines)) < 300
    assert facts["precision"] == "fp32" and "every.log: 10 -> 5" in facts["changed"] and facts["devices"] == 1
    identity.announce(new, None, sharding.one_device())
    assert len(capsys.readouterr().err.splitlines()) == 1
