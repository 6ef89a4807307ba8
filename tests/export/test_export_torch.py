"""Exports for plain PyTorch: a folder that needs nothing else, and the same logits."""

import json
import os
import shutil
import subprocess
import sys

import exports
import numpy as np
import pytest
import torch

from lowrank_jax.export import lowrank, verify, weights
from lowrank_jax.export import torch as plain

pytestmark = pytest.mark.slow

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(make, tok):
    return exports.trained(make, tok)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> str:
    return plain.write(model, str(tmp_path_factory.mktemp("torch") / "usual"))


def random_ids(length: int, rows: int = 1) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(3).integers(4, 521, size=(rows, length)))


@pytest.mark.parametrize("name", exports.MODELS)
@torch.no_grad()
def test_logits_are_ours_with_and_without_a_cache(name, make, tok, tmp_path):
    model = exports.trained(make, tok, **exports.MODELS[name])
    assert plain.check(model, plain.write(model, str(tmp_path / "out"))) <= 2e-5
    net, ids = lowrank.LowRank.load(str(tmp_path / "out")), random_ids(60, rows=2)
    full, _ = net(ids)
    assert np.abs(full[1].numpy() - verify.logits(model, ids[1].numpy(), np.arange(60))).max() <= 2e-5
    parts, past = [], None
    for at in (ids[:, :20], ids[:, 20:37], *ids[:, 37:].split(1, dim=1)):
        logits, past = net(at, past)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=2e-5, rtol=0)


@torch.no_grad()
def test_padding_changes_no_row(folder):
    net, ids = lowrank.LowRank.load(folder), random_ids(30, rows=2)
    ids[0, :13] = 0
    mask = torch.ones(2, 31)
    mask[0, :13] = 0
    _, past = net(ids[:, :29], mask_BS=mask[:, :29])
    logits, past = net(ids[:, 29:], past, mask[:, :30])
    for row, start in ((0, 13), (1, 0)):
        torch.testing.assert_close(logits[row, 0], net(ids[row : row + 1, start:])[0][0, -1], atol=2e-5, rtol=0)


def test_the_cache_holds_latents_alone(folder, model):
    _, past = lowrank.LowRank.load(folder)(random_ids(9, rows=3))
    _, k, v, _ = model.config.model.ranks
    assert [[tuple(x.shape) for x in layer] for layer in past] == [[(3, 1, 9, k), (3, 1, 9, v)]] * 2


def test_generation_takes_the_likeliest_token_and_ends(folder):
    net, ids = lowrank.LowRank.load(folder), random_ids(12)[0].tolist()
    new = net.generate(ids, 8)
    for i, token in enumerate(new):
        assert net(torch.tensor([ids + new[:i]]))[0][0, -1].argmax() == token
    net.c.eos_token_id = [new[3]]
    assert net.generate(ids, 8) == new[: new.index(new[3]) + 1]
    torch.manual_seed(0)
    assert net.generate(ids, 8, temperature=5.0) != new


def test_the_module_trains(folder):
    net, ids = lowrank.LowRank.load(folder).train(), random_ids(20, rows=2)
    logits, _ = net(ids[:, :-1])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert all(torch.isfinite(w.grad).all() and w.grad.abs().max() > 0 for w in net.parameters())


def test_the_example_runs_from_the_folder_alone_and_is_short(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    lines = (copy / "example.py").read_text().splitlines()
    assert len(lines) <= 20
    blocked = "import sys; sys.modules['transformers'] = sys.modules['lowrank_jax'] = sys.modules['jax'] = None; "
    run = f"import runpy; sys.argv = ['x', 'Bace di']; sys.path.insert(0, {str(copy)!r}); "
    command = [sys.executable, "-c", blocked + run + f"runpy.run_path({str(copy / 'example.py')!r})"]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("Bace di"), done.stderr


def test_the_card_tells_what_it_was_trained_on(folder):
    card = open(os.path.join(folder, "README.md")).read()
    assert "| `tokens` in training | 1,234 |" in card and "cursor" not in card


def test_the_command_says_what_it_verified(model, tmp_path, monkeypatch, capsys):
    status, facts, err = exports.run(monkeypatch, capsys, model, "--format=torch", f"--out={tmp_path}/out")
    assert status == 0 and facts["verified"] and 0 < facts["max_abs_err"] <= 2e-5, err
    assert os.listdir(tmp_path) == ["out"]
    files = [file for file in (tmp_path / "out").iterdir() if file.is_file()]
    assert len({os.stat(file).st_mode for file in files}) == 1, "a file that others may not read"


def test_without_a_runtime_the_export_is_not_verified(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    status, facts, err = exports.run(monkeypatch, capsys, model, "--format=torch", f"--out={tmp_path}/out")
    assert status == 0 and facts["verified"] is False and facts["max_abs_err"] is None
    assert "pip install torch" in err and (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("wrong", ["changed", "missing"])
def test_a_wrong_export_leaves_nothing(wrong, model, tmp_path, monkeypatch, capsys):
    tensors, name = weights.tensors(model.params), "model.layers.1.mlp.out.kernel.weight"
    w = tensors.pop(name)
    if wrong == "changed":
        tensors[name] = 2 * w
    monkeypatch.setattr(weights, "tensors", lambda params: tensors)
    result = exports.run(monkeypatch, capsys, model, "--format=torch", f"--out={tmp_path}/out")
    exports.refused(result, 1, "differ" if wrong == "changed" else "mlp.out.kernel")
    assert os.listdir(tmp_path) == []


def test_a_wrong_cache_is_noticed(model, tmp_path, monkeypatch, capsys):
    right = lowrank.LowRank.forward

    def forward(*args, **more):
        logits, past = right(*args, **more)
        return logits, [[x * 1.01 for x in layer] for layer in past]

    monkeypatch.setattr(lowrank.LowRank, "forward", forward)
    result = exports.run(monkeypatch, capsys, model, "--format=torch", f"--out={tmp_path}/out")
    exports.refused(result, 1, "differ")


def test_no_local_path_is_exported(make, tok, tmp_path):
    model = exports.trained(make, tok)
    config = make.run_config(
        **{f"model__{key}": getattr(model.config.model, key) for key in ("vocab", "d", "heads", "rank", "mlp")},
        pretrain__sources="text:/home/me/books/*.txt,hf:someone/corpus",
        tokenizer__path="/home/me/tok",
        init_from="/home/me/run",
    )
    out = plain.write(model._replace(config=config), str(tmp_path / "out"))
    for folder, _, names in os.walk(out):
        for name in names:
            assert b"/home/me" not in open(os.path.join(folder, name), "rb").read(), name
    sources = json.load(open(os.path.join(out, "lowrank_jax.json")))["config"]["pretrain"]["sources"]
    assert [source["spec"] for source in sources] == ["text:*.txt", "hf:someone/corpus"]
