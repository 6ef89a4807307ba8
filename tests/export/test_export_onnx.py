"""Exports for ONNX Runtime: the same logits for any rows, lengths and pasts, and measured changes in int8."""

import functools
import os
import sys

import exports
import numpy as np
import onnx as reader
import onnxruntime
import pytest
import torch

from lowrank_jax.export import onnx, verify

pytestmark = pytest.mark.slow

torch.set_num_threads(1)

# An export takes some seconds, so each of these combines several of exports.MODELS.
MODELS = {
    "8 heads": {},
    "12 heads, dense": {"d": 48, "heads": 12, "rank": 0},
    "32 heads, one latent, all in low rank, a head of its own": {
        "d": 64,
        "heads": 32,
        "shared_kv": True,
        "latent_norm": False,
        "mlp_rank": 8,
        "embed_rank": 12,
        "tied": False,
    },
}


@pytest.fixture(scope="module")
def written(make, tok, tmp_path_factory):
    """Return a function from a name to (model, folder), which writes each model once."""

    @functools.cache
    def write(name: str):
        model = exports.trained(make, tok, **MODELS[name])
        with pytest.MonkeyPatch.context() as patch:
            if "dense" in name:  # as if it were too large for one file
                patch.setattr(onnx, "ONE_FILE", 0)
            folder = onnx.write(model, str(tmp_path_factory.mktemp("onnx") / "out"))
        assert os.path.isfile(os.path.join(folder, "model.onnx.data")) == ("dense" in name)
        return model, folder

    return write


def open_session(folder: str) -> tuple[onnxruntime.InferenceSession, dict[str, int]]:
    """Return a session, and the widths of its pasts by name."""
    session = onnxruntime.InferenceSession(os.path.join(folder, "model.onnx"), providers=["CPUExecutionProvider"])
    return session, {x.name: x.shape[-1] for x in session.get_inputs() if x.name.startswith("past")}


def step(session, ids, mask, past: dict) -> tuple[np.ndarray, dict]:
    logits, *present = session.run(None, {"input_ids": ids, "attention_mask": mask} | past)
    return logits, dict(zip(past, present))


def empty(widths: dict, rows: int) -> dict:
    return {name: np.zeros((rows, 1, 0, width), np.float32) for name, width in widths.items()}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_ours_for_any_rows_lengths_and_pasts(name, written):
    model, folder = written(name)
    assert onnx.check(model, folder) <= 2e-5
    (session, widths), ids = open_session(folder), np.random.default_rng(3).integers(4, 521, size=(3, 90))
    ours = np.stack([verify.logits(model, row, np.arange(90)) for row in ids])
    for rows in (1, 3):
        whole, _ = step(session, ids[:rows], np.ones((rows, 90), np.int64), empty(widths, rows))
        assert np.abs(whole - ours[:rows]).max() <= 2e-5
        parts, past, at = [], empty(widths, rows), 0
        for end in (40, 41, 60, *range(61, 91)):
            logits, past = step(session, ids[:rows, at:end], np.ones((rows, end), np.int64), past)
            parts, at = [*parts, logits], end
        assert np.abs(np.concatenate(parts, 1) - ours[:rows]).max() <= 2e-5
    padded, mask = ids.copy(), np.ones((3, 90), np.int64)
    padded[1, :31], mask[1, :31] = 0, 0
    _, past = step(session, padded[:, :89], mask[:, :89], empty(widths, 3))
    logits, _ = step(session, padded[:, 89:], mask, past)
    assert np.abs(logits[1, 0] - verify.logits(model, ids[1, 31:], np.array([58]))[0]).max() <= 2e-5


def test_inputs_and_outputs_are_latents_with_named_sizes(written):
    for name, kinds in (("8 heads", ("key", "value")), (list(MODELS)[2], ("key",))):
        model, folder = written(name)
        graph = reader.load(os.path.join(folder, "model.onnx")).graph
        of = lambda x: [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim]
        pasts = [f"past_key_values.{i}.{kind}" for i in range(2) for kind in kinds]
        assert [x.name for x in graph.input] == ["input_ids", "attention_mask", *pasts]
        assert [x.name for x in graph.output] == ["logits", *(p.replace("past_key_values", "present") for p in pasts)]
        _, k, v, _ = model.config.model.ranks
        assert [of(x) for x in list(graph.input)[2:4]] == [
            ["rows", 1, "past_tokens", width] for width in (k, v if len(kinds) == 2 else k)
        ]
        assert of(graph.input[0]) == ["rows", "tokens"] and of(graph.output[0]) == ["rows", "tokens", 521]


def test_a_tied_table_is_stored_once_and_no_local_path_is_exported(written):
    model, folder = written("8 heads")
    content = open(os.path.join(folder, "model.onnx"), "rb").read()
    assert b"lowrank_jax/export" not in content and b".py" not in content
    tables = [w for w in reader.load_from_string(content).graph.initializer if 521 in w.dims]
    assert len(tables) == 1


def test_int8_is_smaller_and_reports_its_changes(model_and_folder, tmp_path, monkeypatch, capsys):
    model, exact = model_and_folder
    args = ("--format=onnx", "--quant=int8", f"--out={tmp_path}/out")
    status, facts, err = exports.run(monkeypatch, capsys, model, *args)
    assert status == 0 and facts["verified"] and os.listdir(tmp_path) == ["out"], err
    assert 1e-3 < facts["max_abs_err"] < 1 and 0 < facts["kl"] < 1e-2
    assert f"bits per byte {facts['bits_per_byte']:.4f} ({facts['bits_per_byte_change']:+.4f})" in err
    graph = reader.load(str(tmp_path / "out" / "model.onnx")).graph
    large = [
        w for w in graph.initializer if len(w.dims) > 1 and np.prod(w.dims) > 500 and not w.name.endswith("scales")
    ]
    assert len(large) > 10 and all(w.data_type == reader.TensorProto.UINT8 for w in large)
    assert [list(w.dims) for w in large].count([521, 1, 32]) == 1  # the table and its head are one
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(exact))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("quant", onnx.TYPES)
def test_a_row_is_the_same_beside_any_others(quant, name, written, tmp_path):
    model, folder = written(name)
    if quant == "int8":
        os.mkdir(tmp_path / "out")
        with pytest.MonkeyPatch.context() as patch:
            if "dense" in name:
                patch.setattr(onnx, "ONE_FILE", 0)
            onnx._quantize(os.path.join(folder, "model.onnx"), str(tmp_path / "out" / "model.onnx"))
        folder = str(tmp_path / "out")
        expected = verify.logits(model, np.arange(4, 40), np.arange(36))
        assert np.abs(onnx._reader(model, folder)(np.arange(4, 40), np.arange(36), None)[0] - expected).max() < 0.5
    (session, widths), ids = open_session(folder), np.random.default_rng(3).integers(4, 521, size=(1, 9))
    others = [np.zeros((1, 9), int), np.full((1, 9), 7), np.random.default_rng(4).integers(4, 521, size=(4, 9))]
    read = lambda ids, past, seen: step(session, ids, np.ones((len(ids), seen), np.int64), past)
    alone, past = read(ids, empty(widths, 1), 9)
    next_alone, _ = read(ids[:, :1], past, 10)
    for other in others:
        rows = np.concatenate([ids, other])
        logits, past = read(rows, empty(widths, len(rows)), 9)
        next_logits, _ = read(rows[:, :1], past, 10)
        assert np.abs(logits[0] - alone[0]).max() <= 2e-6 and np.abs(next_logits[0] - next_alone[0]).max() <= 2e-6
        mask = np.ones((len(rows), 9), np.int64)
        mask[1:, :6] = 0
        logits, _ = step(session, rows, mask, empty(widths, len(rows)))
        assert np.abs(logits[0] - alone[0]).max() <= 2e-6


@pytest.fixture(scope="module")
def model_and_folder(written):
    return written("8 heads")


def test_a_wrong_graph_leaves_nothing(model_and_folder, tmp_path, monkeypatch, capsys):
    model, folder = model_and_folder

    def almost(_, names, path):
        model = reader.load(os.path.join(folder, "model.onnx"))
        table = next(w for w in model.graph.initializer if list(w.dims) == [32, 48])
        table.CopyFrom(reader.numpy_helper.from_array(reader.numpy_helper.to_array(table) * 1.01, table.name))
        reader.save(model, path)

    monkeypatch.setattr(onnx, "_graph", almost)
    result = exports.run(monkeypatch, capsys, model, "--format=onnx", f"--out={tmp_path}/out")
    exports.refused(result, 1, "differ")
    assert os.listdir(tmp_path) == []


def test_without_a_runtime_the_export_is_not_verified(model_and_folder, tmp_path, monkeypatch, capsys):
    model, folder = model_and_folder
    as_before = lambda _, names, path: reader.save(reader.load(os.path.join(folder, "model.onnx")), path)
    monkeypatch.setattr(onnx, "_graph", as_before)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    status, facts, err = exports.run(monkeypatch, capsys, model, "--format=onnx", f"--out={tmp_path}/out")
    assert status == 0 and facts["verified"] is False and "pip install onnxruntime" in err
    assert (tmp_path / "out" / "model.onnx").is_file()


@pytest.mark.parametrize("package", ["torch", "onnx", "onnxscript"])
def test_missing_packages_are_named(package, model_and_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    result = exports.run(monkeypatch, capsys, model_and_folder[0], "--format=onnx", f"--out={tmp_path}/out")
    exports.refused(result, 2, f"pip install {package}")
    assert os.listdir(tmp_path) == []


def test_other_kinds_are_refused(model_and_folder, tmp_path, monkeypatch, capsys):
    for args, name in ((["--quant=q8_0"], "int8"), (["--attn=latent"], "--attn")):
        result = exports.run(monkeypatch, capsys, model_and_folder[0], "--format=onnx", f"--out={tmp_path}/x", *args)
        exports.refused(result, 2, name)
