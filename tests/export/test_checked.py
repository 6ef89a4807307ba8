"""Folders of strangers: whatever is wrong in them is one line that names it, and nothing is written."""

import contextlib
import json
import os
import pathlib
import pickle
import random
import shutil
import zipfile

import exports
import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank_jax import cli, importer
from lowrank_jax.config import UsageError
from lowrank_jax.export import checked, folder, import_weights
from lowrank_jax.export import torch as plain

DOWN, NORM = "layers.0.attention.q.down.weight", "norm.weight"


class Code:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def model(make, tok):
    return exports.trained(make, tok)


@pytest.fixture(scope="module")
def export(model, tmp_path_factory) -> pathlib.Path:
    return pathlib.Path(plain.write(model, str(tmp_path_factory.mktemp("torch") / "out")))


@pytest.fixture
def copy(export, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(export, tmp_path / "export"))


def refused(source, *names: str) -> None:
    out = source.parent / "run" if source.is_dir() else source.parent.parent / "run"
    with pytest.raises(UsageError) as e:
        importer.command([f"--from={source}", f"--workdir={out}"])
    line = str(e.value)
    assert all(name in line for name in names) and "\n" not in line and len(line) < 700, line
    assert not out.exists() and not [name for name in os.listdir(out.parent) if name.startswith(".export")]


def with_config(export: pathlib.Path, **changes) -> pathlib.Path:
    path = export / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return export


def with_state(export: pathlib.Path, change) -> pathlib.Path:
    state = load_file(export / "model.safetensors")
    changed = change(state)
    torch.save(state if changed is None else changed, export / "model.pt")
    return export / "model.pt"


KINDS = {
    "NaN": (lambda w: w.clone().index_fill_(0, torch.tensor([0]), float("nan")), "NaN"),
    "infinite": (lambda w: torch.full_like(w, float("-inf")), "128 values"),
    "too large for fp32": (lambda w: torch.full_like(w, 1e300, dtype=torch.float64), "too large"),
    "whole numbers": (lambda w: w.long(), "int64"),
    "truth values": (lambda w: w.bool(), "bool"),
    "complex": (lambda w: w.to(torch.complex64), "complex64"),
    "eight bits": (lambda w: w.to(torch.float8_e4m3fn), "float8_e4m3fn"),
    "sparse": (lambda w: w.to_sparse(), "sparse"),
    "compressed rows": (lambda w: w.to_sparse_csr(), "sparse"),
    "quantised": (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "quantised"),
    "no data": (lambda w: torch.empty_like(w, device="meta"), "without data"),
    "empty": (lambda w: w[:0], "[0, 32]"),
    "a number": (lambda w: w.sum(), "[]"),
    "transposed": (lambda w: w.T, "[32, 4]"),
    "one more dimension": (lambda w: w[None], "[1, 4, 32]"),
    "a view of terabytes": (lambda w: torch.zeros(1).expand(10**6, 10**6), "[1000000, 1000000]"),
    "a list": (lambda w: w.tolist(), "list"),
    "none": (lambda w: None, "NoneType"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_unusable_tensor_is_named_with_its_file(kind, copy):
    spoil, name = KINDS[kind]
    refused(with_state(copy, lambda state: state.update({DOWN: spoil(state[DOWN])})), "model.pt", DOWN, name)


def test_usual_tensors_of_any_kind_are_read(copy, model):
    def change(state):
        state[DOWN] = torch.nn.Parameter(state[DOWN].double())
        state["embed_tokens.weight"] = state["embed_tokens.weight"].T.contiguous().T
        state[NORM] = torch.ones(1).expand(32)
        state["layers.0.mlp_norm.weight"] = torch._neg_view(-state["layers.0.mlp_norm.weight"])
        state["lm_head.weight"] = state["embed_tokens.weight"]

    read = import_weights.open_export(str(with_state(copy, change))).params
    expected = model.params | {"norm": {"gain": np.ones(32, np.float32)}}
    jax.tree.map(np.testing.assert_array_equal, read, expected)
    state = {name: w.bfloat16() for name, w in load_file(copy / "model.safetensors").items()}
    save_file(state, copy / "model.safetensors")
    read = checked.arrays([str(copy / "model.safetensors")])
    assert all(np.array_equal(w, state[name].float().numpy()) for name, w in read.items())


def test_no_state_dict_is_one_line_and_runs_no_code(copy, tmp_path):
    marker = tmp_path / "ran"
    for word, content in {
        "'model' is a dict": lambda s: {"model": s, "optimizer": {}},
        "'step' is a int": lambda s: s | {"step": 3},
        "a list": lambda s: list(s.values()),
        "a Tensor": lambda s: s[NORM],
        "3 is a Tensor": lambda s: {3: s[NORM]},
        "mkdir": lambda s: s | {"x": Code(str(marker))},
    }.items():
        refused(with_state(copy, content), "model.pt is no state dict", word)
    for content in (pickle.dumps(Code(str(marker))), b"", b"PK\3\4" + bytes(99)):
        (copy / "model.pt").write_bytes(content)
        refused(copy / "model.pt", "model.pt is no state dict")
    with zipfile.ZipFile(copy / "model.pt", "w", zipfile.ZIP_DEFLATED) as f:
        f.writestr("archive/data.pkl", bytes(10**6))
    refused(copy / "model.pt", "model.pt is no state dict", "compressed")
    assert not marker.exists()


def test_tensors_that_are_there_twice_or_not_at_all_are_named(copy):
    refused(with_state(copy, lambda state: state.update({"model." + DOWN: state[DOWN]})), DOWN, "twice", "model.pt")
    refused(with_state(copy, lambda state: {n: w for n, w in state.items() if n != DOWN}), DOWN, "have no", "model.pt")
    refused(with_state(copy, lambda state: state.update({"\x1b[31m": state[DOWN]})), r"\x1b[31m", "model.pt")
    state = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    (copy / "model.pt").unlink()
    for name in ("a.safetensors", "b.safetensors"):
        save_file({DOWN: state[DOWN]}, copy / name)
    refused(copy, "b.safetensors", DOWN, "a.safetensors")


def test_an_index_names_files_beside_it_alone(copy):
    state, index = load_file(copy / "model.safetensors"), copy / "model.safetensors.index.json"
    os.rename(copy / "model.safetensors", copy / "one.safetensors")
    save_file({"other": torch.ones(1)}, copy / "stale.safetensors")
    shards = dict.fromkeys(state, "one.safetensors")
    index.write_text(json.dumps({"weight_map": shards}))
    assert checked.arrays(checked.weight_files(str(copy))).keys() == state.keys()
    for name in ("../one.safetensors", "/etc/passwd", "..", "", "config.json", 3, None, ["one.safetensors"]):
        index.write_text(json.dumps({"weight_map": shards | {DOWN: name}}))
        refused(copy, "index.json", DOWN)
    index.write_text(json.dumps({"weight_map": shards | {DOWN: "two.safetensors"}}))
    refused(copy, "two.safetensors is missing")
    for values in ({}, {"weight_map": {}}, {"weight_map": ["one.safetensors"]}):
        index.write_text(json.dumps(values))
        refused(copy, "index.json", "weight_map")


JSON = {
    "nested": (b"[" * 100_000, "nested"),
    "nested objects": (b'{"a":' * 100_000, "nested"),
    "a list": (b"[]", "[]"),
    "null": (b"null", "None"),
    "empty": (b"", "damaged"),
    "not UTF-8": (b'{"a": "\xff"}', "utf-8"),
    "a number of 5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
}


@pytest.mark.parametrize("name", ["config.json", "lowrank_jax.json", "model.safetensors.index.json"])
def test_damaged_json_is_one_line(name, copy):
    (copy / "model.safetensors").rename(copy / "one.safetensors")
    for content, word in JSON.values():
        (copy / name).write_bytes(content)
        refused(copy, name, word)
    for change in (
        os.mkdir,
        os.mkfifo,
        lambda path: os.symlink("nowhere", path),
        lambda path: os.symlink("/dev/zero", path),
    ):
        (copy / name).unlink() if not (copy / name).is_dir() else (copy / name).rmdir()
        change(copy / name)
        refused(copy, name, "no regular file")


def test_a_byte_order_mark_is_no_fault(copy):
    (copy / "config.json").write_bytes(b"\xef\xbb\xbf" + (copy / "config.json").read_bytes())
    assert import_weights.open_export(str(copy)).config.model.d == 32


def test_a_file_that_is_none_is_not_waited_for(copy):
    path = copy / "model.safetensors"
    for change in (os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        path.unlink() if not path.is_dir() else path.rmdir()
        change(path)
        refused(copy, "model.safetensors is no regular file")


def test_sizes_beyond_the_files_are_refused_before_anything_is_read(copy, monkeypatch):
    monkeypatch.setattr(checked, "arrays", lambda files: pytest.fail("the weights were read"))
    for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "mlp_rank", "embed_rank"):
        for size in (2**31 - 1, 10**9, 10**12, 10**400):
            before = (copy / "config.json").read_text()
            refused(with_config(copy, **{key: size}), "config.json", key)
            (copy / "config.json").write_text(before)
    refused(with_config(copy, rms_norm_eps="x" * 10**6), "rms_norm_eps")


def test_progress_of_the_export_is_checked(copy):
    for progress in ({"step": "7"}, {"tokens": -1}, {"step": float("nan")}, {"step": True}):
        values = json.loads((copy / "lowrank_jax.json").read_text())
        (copy / "lowrank_jax.json").write_text(json.dumps(values | {"progress": progress}))
        refused(copy, "lowrank_jax.json", *progress)


def test_any_damage_of_any_file_is_one_line_or_none(copy):
    """Flips, cuts and insertions in the files that an import reads; what is still read has the shapes of the config."""
    draw, out = random.Random(0), copy.parent / "run"
    files = {path: path.read_bytes() for path in copy.iterdir() if path.suffix in (".json", ".safetensors")}
    for _ in range(40):
        path = draw.choice(list(files))
        content = bytearray(files[path])
        for _ in range(draw.choice([1, 1, 4])):
            i = draw.randrange(min(len(content), 4000))  # headers are at the beginning
            content[i : i + draw.choice([0, 1, 1, 9])] = draw.randbytes(draw.choice([0, 1, 1, 9]))
        path.write_bytes(content[: draw.choice([None, None, draw.randrange(len(content))])])
        with contextlib.suppress(UsageError):
            read = import_weights.open_export(str(copy))
            assert all(np.isfinite(w).all() for w in jax.tree.leaves(read.params))
        path.write_bytes(files[path])
    assert not out.exists()


def test_out_is_checked_before_the_work(copy, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(copy)
    (tmp_path / "loop").symlink_to("loop")
    paths = {
        "file": "exists",
        "file/below/it": "Not a directory",
        "link": "exists",
        "loop": "exists",
        "x" * 300: "too long",
    }
    for path, word in (paths | {"x" * 300: "too long"}).items():
        with pytest.raises(UsageError, match=f"--out=.*{word}"):
            folder.unused(str(tmp_path / path), "--out")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match="does not let you write"):
        folder.unused(str(tmp_path / "new" / "folder"), "--out")


def test_the_card_of_an_export_quotes_what_settings_say(model):
    spec = "text:a|b`<script>\n# title\x1b[31m\ud800"
    source = model.config.pretrain.sources[0].__class__(spec, ((0, 1.0),), "text", "messages", "train")
    pretrain = model.config.pretrain.__class__(**vars(model.config.pretrain) | {"sources": (source,)})
    config = model.config.__class__(**vars(model.config) | {"pretrain": pretrain})
    facts = folder.facts(model._replace(config=config))
    row = next(line for line in facts.splitlines() if "pretraining data" in line)
    assert row == r"| pretraining data | `text:a\|b'&lt;script> # title?[31m?` |"


def test_an_error_line_is_bounded(capsys):
    def command(argv):
        raise UsageError("x " * 10**6)

    with pytest.raises(SystemExit) as e:
        cli.main(command, [])
    assert e.value.code == 2 and len(capsys.readouterr().err) < 2100
