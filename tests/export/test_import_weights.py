"""Imports of exports: the same weights bit for bit, the same tokenizer, and training continues from them."""

import json
import os
import pathlib
import shutil

import exports
import jax
import numpy as np
import pytest
import runs
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_jax import cli, importer
from lowrank_jax.config import ModelConfig, UsageError
from lowrank_jax.data import tokenizer
from lowrank_jax.export import __main__ as export
from lowrank_jax.export import hf, import_weights, weights
from lowrank_jax.export import torch as plain
from lowrank_jax.training import run_folder, trained
from lowrank_jax.training.checkpoint import tree_sha256

pytestmark = pytest.mark.slow

MODELS = exports.MODELS | {
    "uneven ranks, one latent": {"rank_split": (1, 2, 5, 3), "rank": 5, "shared_kv": True},
    "given width of the MLP": {"mlp": 33},
    "usual width of the MLP": {"mlp": 0},
}


def command(module, capsys, *args) -> tuple[int, dict, str]:
    status = 0
    try:
        cli.main(module.command, [*map(str, args), "--json"])
    except SystemExit as e:
        status = e.code
    out, err = capsys.readouterr()
    return status, json.loads(out.splitlines()[-1]) if status == 0 else {}, err


class Code:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def refused(result, *names: str) -> None:
    exports.refused(result, 2, *names)


@pytest.fixture(scope="module")
def model(make, tok):
    return exports.trained(make, tok)


@pytest.fixture(scope="module")
def as_hf(model, tmp_path_factory) -> pathlib.Path:
    return pathlib.Path(hf.write(model, str(tmp_path_factory.mktemp("hf") / "out")))


@pytest.fixture(scope="module")
def as_torch(model, tmp_path_factory) -> pathlib.Path:
    return pathlib.Path(plain.write(model, str(tmp_path_factory.mktemp("torch") / "out")))


@pytest.mark.parametrize("name", MODELS)
def test_names_and_sizes_come_back_as_they_were(name, make, tok):
    model = exports.trained(make, tok, **MODELS[name])
    c = model.config.model
    again = ModelConfig(**{**make.run_config(model__rank_split="2,1,1,4").model.__dict__, **keys_of(c)})
    assert weights.sizes(again) == weights.sizes(c) and again.ranks == c.ranks and again.hidden == c.hidden
    params = weights.params(again, weights.tensors(model.params))
    jax.tree.map(np.testing.assert_array_equal, params, model.params)
    assert tree_sha256(params) == tree_sha256(model.params)


def keys_of(c: ModelConfig) -> dict:
    keys = weights.model_keys({"model_type": weights.TYPE, "rms_norm_eps": 1e-6, **weights.sizes(c)})
    return keys | ({"rank_split": tuple(keys["rank_split"])} if "rank_split" in keys else {})


@pytest.fixture(scope="module", params=["hf", "torch"])
def again(request, reference, tmp_path_factory) -> pathlib.Path:
    """Return a run that ended with SFT, after export and import."""
    folder = tmp_path_factory.mktemp(request.param)
    facts = export.command([f"--workdir={reference}", f"--format={request.param}", f"--out={folder}/out"])
    assert facts["verified"]
    facts = importer.command([f"--from={folder}/out", f"--workdir={folder}/run"])
    assert facts["params_sha256"] == runs.rows(reference, "events.jsonl")[-1]["params_sha256"]
    return folder / "run"


def test_a_run_that_was_exported_is_a_run_again(again, reference, tmp_path):
    """Compares parameters, tokenizer and config; as the import counts as finished, it can be exported again."""
    before, after = trained.open_run(str(reference)), trained.open_run(str(again))
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    assert after.tokenizer.sha256 == before.tokenizer.sha256
    assert after.tokenizer.chat_template == before.tokenizer.chat_template
    changed = {key for key, *_ in run_folder.differences(before.config, after.config)}
    assert changed <= {"pretrain.sources", "sft.sources"}
    assert export.command([f"--workdir={again}", "--format=torch", f"--out={tmp_path}/out"])["verified"]
    expected = weights.tensors(before.params)
    for name, w in load_file(tmp_path / "out" / "model.safetensors").items():
        known = name if name in expected else f"model.{name}"
        np.testing.assert_array_equal(w.numpy(), expected.pop(known))
    assert not expected


def test_a_run_without_its_tokenizer_is_not_exported(reference, tmp_path):
    shutil.copytree(reference, tmp_path / "run", ignore=shutil.ignore_patterns("tokenizer"))
    with pytest.raises(UsageError, match="run has no tokenizer: .*tokenizer is missing"):
        export.command([f"--workdir={tmp_path}/run", "--format=torch", f"--out={tmp_path}/out"])
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("again", ["hf"], indirect=True)
def test_training_continues_and_other_commands_open_the_run(again, reference, data, tmp_path):
    """It continues with SFT alone, whose first evaluation is the last one of the run that was exported."""
    more = {"init_from": again, "pretrain__steps": 0, "sft__steps": 1}
    code, _, err = runs.train(data, tmp_path / "more", **more)
    assert code == 0 and "first weights from step 0" in err and "not taken" not in err, err
    losses = lambda folder: [
        row["eval_loss"] for row in runs.rows(folder, "metrics.jsonl") if row.get("split") == "sft"
    ]
    assert losses(tmp_path / "more")[0] == pytest.approx(losses(reference)[-1], rel=1e-5)
    trained_phases = {row["phase"] for row in runs.rows(tmp_path / "more", "metrics.jsonl")}
    assert trained_phases == {"sft"} and runs.rows(tmp_path / "more", "events.jsonl")[-1]["step"] == 1
    code, out, err = runs.run("evaluate", f"--workdir={tmp_path}/more", "--json")
    assert code == 0 and runs.last_json(out)["results"][0]["loss"] == pytest.approx(losses(tmp_path / "more")[-1]), err
    code, out, err = runs.run("generate", f"--workdir={again}", "--prompt=The cat", "--max_tokens=3", "--json")
    assert code == 0 and len(runs.last_json(out)["tokens"]) <= 3, err


@pytest.mark.parametrize("how", ["fp32", "bf16", "5 shards", "tokenizer saved too"])
def test_folders_saved_by_transformers_are_read(how, as_hf, model, tmp_path):
    dtype = torch.bfloat16 if how == "bf16" else torch.float32
    net = AutoModelForCausalLM.from_pretrained(as_hf, trust_remote_code=True, dtype=dtype)
    size = sum(p.numel() * p.element_size() for p in net.parameters())
    net.save_pretrained(tmp_path / "saved", max_shard_size=size // 9 if how == "5 shards" else "1GB")
    shards = [name for name in os.listdir(tmp_path / "saved") if name.endswith(".safetensors")]
    assert len(shards) >= 5 if how == "5 shards" else len(shards) == 1
    if how == "tokenizer saved too":
        AutoTokenizer.from_pretrained(as_hf, trust_remote_code=False).save_pretrained(tmp_path / "saved")
    else:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(as_hf / name, tmp_path / "saved")
    shutil.copy(as_hf / "lowrank_jax.json", tmp_path / "saved")
    imported = import_weights.open_export(str(tmp_path / "saved"))
    rounded = lambda w: np.asarray(jax.numpy.asarray(w).astype(jax.numpy.bfloat16), np.float32) if how == "bf16" else w
    jax.tree.map(lambda w, old: np.testing.assert_array_equal(w, rounded(old)), imported.params, model.params)
    assert imported.progress.tokens == 1234
    for text in ("Bace di, fo.", "<|im_end|> \u2581 \U0001f600"):
        assert imported.tokenizer.encode(text) == model.tokenizer.encode(text)


def test_a_resized_model_is_read_with_a_tokenizer_of_its_size(as_hf, model, tmp_path, capsys):
    net = AutoModelForCausalLM.from_pretrained(as_hf, trust_remote_code=True)
    tok = AutoTokenizer.from_pretrained(as_hf, trust_remote_code=False)
    tok.add_special_tokens({"additional_special_tokens": ["<|tool|>", "<|end_tool|>"]})
    for size in (len(tok), 528):
        net.resize_token_embeddings(size)
        net.save_pretrained(tmp_path / str(size))
        tok.save_pretrained(tmp_path / str(size))
        shutil.copy(as_hf / "lowrank_jax.json", tmp_path / str(size))
    imported = import_weights.open_export(str(tmp_path / "523"))
    np.testing.assert_array_equal(imported.params["embed"]["table"][:521], model.params["embed"]["table"])
    assert imported.tokenizer.vocab_size == imported.config.model.vocab == 523
    assert imported.tokenizer.special("<|tool|>") == 521
    run = command(importer, capsys, f"--from={tmp_path}/528", f"--workdir={tmp_path}/run")
    refused(run, "the weights have 528 pieces, but the tokenizer has 523")


def test_state_dicts_are_read(as_hf, as_torch, model, tmp_path):
    state = AutoModelForCausalLM.from_pretrained(as_hf, trust_remote_code=True).state_dict()
    assert "lm_head.weight" in state  # the embedding once more
    shutil.copytree(as_torch, tmp_path, dirs_exist_ok=True)
    torch.save(state, tmp_path / "hf.pt")
    torch.save(load_file(as_torch / "model.safetensors"), tmp_path / "plain.bin")
    for source in ("hf.pt", "plain.bin", "model.safetensors"):
        imported = import_weights.open_export(str(tmp_path / source))
        jax.tree.map(np.testing.assert_array_equal, imported.params, model.params)


def test_a_tokenizer_of_another_size_is_refused(as_torch, make, tmp_path, capsys):
    tokenizer.train([make.prose(2000)], 400).save(str(tmp_path / "other"))
    args = (f"--from={as_torch}", f"--workdir={tmp_path}/run", f"--tokenizer={tmp_path}/other")
    refused(command(importer, capsys, *args), "the weights have 521 pieces, but the tokenizer has 400")
    assert not (tmp_path / "run").exists()


def test_a_config_says_the_rest_and_the_weights_their_sizes(as_torch, tmp_path, capsys):
    bare = shutil.copytree(as_torch, tmp_path / "bare")
    (bare / "lowrank_jax.json").unlink()
    run = lambda *args: command(importer, capsys, f"--from={bare}", f"--workdir={tmp_path}/run", *args)
    refused(run(), "--config=FILE")
    refused(run("--config.seed=3"), "--config=FILE")
    status, _, err = run(f"--config={runs.ROOT}/configs/quickstart.py", "--config.seed=3", "--config.every.keep=1")
    assert status == 0, err
    config = run_folder.read_config(f"{tmp_path}/run")
    assert (config.seed, config.every.keep, config.model.d, config.model.vocab) == (3, 1, 32, 521)


def test_mistakes_get_one_line_and_leave_nothing(as_torch, as_hf, tmp_path, capsys):
    count = iter(range(99))

    def copy(change, source=as_torch) -> pathlib.Path:
        folder = shutil.copytree(source, tmp_path / f"export{next(count)}")
        change(folder)
        return folder

    def with_weights(change):
        def spoil(folder):
            state = load_file(folder / "model.safetensors")
            change(state)
            save_file(state, folder / "model.safetensors")

        return spoil

    def with_config(**changes):
        return lambda f: (f / "config.json").write_text(
            json.dumps(json.loads((f / "config.json").read_text()) | changes)
        )

    first = "layers.0.attention.q.down.weight"
    cases = [
        (with_weights(lambda s: s.pop(first)), [f"model.{first}"]),
        (
            with_weights(lambda s: s.update({first: s[first][:-1].contiguous()})),
            [f"model.{first}", "[3, 32]", "[4, 32]"],
        ),
        (with_weights(lambda s: s.update({"layers.7.x.weight": torch.ones(2)})), ["layers.7.x.weight"]),
        (with_weights(lambda s: s.update({"lm_head.weight": torch.ones(521, 32)})), ["lm_head.weight"]),
        (lambda f: (f / "model.safetensors").write_bytes(b"12345678{"), ["model.safetensors", "damaged"]),
        (lambda f: (f / "model.safetensors").unlink(), ["no weights"]),
        (lambda f: (f / "config.json").unlink(), ["config.json"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json", "damaged"]),
        (lambda f: (f / "lowrank_jax.json").write_text("[]"), ["lowrank_jax.json", "damaged"]),
        (with_config(model_type="llama"), ["llama", "lowrank_alibi"]),
        (with_config(rms_norm_eps=1e-5), ["rms_norm_eps"]),
        (with_config(hidden_size="wide"), ["hidden_size"]),
        (with_config(vocab_size=520), ["520", "521"]),
        (with_config(rank_q=5), ["ranks [5, 4"]),
        (lambda f: (shutil.rmtree(f / "tokenizer"), (f / "tokenizer.json").unlink()), ["--tokenizer"]),
    ]
    for change, names in cases:
        folder = copy(change)
        refused(command(importer, capsys, f"--from={folder}", f"--workdir={tmp_path}/run"), *names)
    pickle = tmp_path / "code.pt"
    torch.save({"a": Code(str(tmp_path / "ran"))}, pickle)
    shutil.copy(as_torch / "config.json", tmp_path)
    shutil.copy(as_torch / "lowrank_jax.json", tmp_path)
    shutil.copytree(as_torch / "tokenizer", tmp_path / "tokenizer")
    refused(command(importer, capsys, f"--from={pickle}", f"--workdir={tmp_path}/run"), "code.pt", "no state dict")
    refused(command(importer, capsys, f"--from={tmp_path}/nowhere", f"--workdir={tmp_path}/run"), "nowhere")
    refused(command(importer, capsys, f"--from={as_hf}", f"--workdir={as_hf}"), "--workdir", "already")
    assert not (tmp_path / "ran").exists(), "code in a pickle was run"
    assert not (tmp_path / "run").exists() and not [n for n in os.listdir(tmp_path) if n.startswith(".export")]


def test_an_unfinished_run_is_exported_on_request_alone(reference, tmp_path, capsys):
    run = shutil.copytree(reference, tmp_path / "run")
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    export_it = lambda *args: command(
        export, capsys, f"--workdir={run}", "--format=torch", f"--out={tmp_path}/out", *args
    )
    unfinished = "".join(line for line in lines if json.loads(line)["event"] != "finish")
    ended_earlier = "".join(line.replace('"step": 13', '"step": 9') if '"finish"' in line else line for line in lines)
    for events in (unfinished, ended_earlier):
        (run / "events.jsonl").write_text(events)
        refused(export_it(), "not finished", "step 13", "--unfinished")
        assert not (tmp_path / "out").exists()
    status, facts, err = export_it("--unfinished")
    assert status == 0 and facts["verified"] and facts["step"] == runs.STEPS == 13, err
