"""Exports for llama.cpp: its server gives the model's probabilities, ids and prompts."""

import functools
import os
import sys

import exports
import gguf as reader
import numpy as np
import pytest
from test_hf_tokenizer import LLAMA, write

from lowrank_jax.data import chat, tokenizer
from lowrank_jax.export import gguf, hf_tokenizer, verify

pytestmark = pytest.mark.slow

EQUAL = {"latent_norm": False, "rank_split": (1, 1, 1, 1)}
MODELS = {
    "8 heads": EQUAL,
    "12 heads, one latent": EQUAL | {"d": 48, "heads": 12, "shared_kv": True},
    "12 heads": EQUAL | {"d": 36, "heads": 12, "rank": 5, "mlp": 40},
    "all in low rank": EQUAL | {"mlp_rank": 8, "embed_rank": 12},
    "32 heads, a head of its own": EQUAL | {"d": 64, "heads": 32, "tied": False, "embed_rank": 12},
}


@pytest.fixture(scope="module")
def model(make, tok):
    return exports.trained(make, tok, **EQUAL)


@pytest.fixture(scope="module")
def path(model, tmp_path_factory) -> str:
    return gguf.write(model, str(tmp_path_factory.mktemp("gguf") / "out"), "latent")


@pytest.mark.parametrize("attn", gguf.FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_probabilities_are_ours(name, attn, make, tok, tmp_path):
    model = exports.trained(make, tok, **MODELS[name])
    assert gguf.check(model, gguf.write(model, str(tmp_path / "out"), attn), attn) <= 2e-5


@pytest.mark.parametrize("changes", [{"rank": 0}, {"latent_norm": False}, {"latent_norm": False, "shared_kv": True}])
def test_merged_projections_may_have_any_ranks(changes, make, tok, tmp_path):
    model = exports.trained(make, tok, **changes)
    assert gguf.check(model, gguf.write(model, str(tmp_path / "out"))) <= 2e-5


def types(path: str) -> dict[str, str]:
    return {t.name.removesuffix(".weight"): t.tensor_type.name for t in reader.GGUFReader(path).tensors}


# The largest error, the largest KL, and the size relative to f32, for rows that 256 divides.
QUANTS = {"f16": (2e-2, 1e-5, 0.5), "bf16": (0.15, 1e-3, 0.5), "q8_0": (0.6, 5e-3, 0.27), "q4_k_m": (4, 0.2, 0.16)}


@pytest.fixture(scope="module")
def wide(make, tok):
    return exports.trained(make, tok, **EQUAL | {"d": 256, "rank": 32, "mlp": 256})


@pytest.mark.parametrize("quant", QUANTS)
def test_smaller_types_are_close_as_measured_and_small(quant, wide, tmp_path):
    error, divergence, size = QUANTS[quant]
    path = gguf.write(wide, str(tmp_path / "out"), quant=quant)
    assert gguf.check(wide, path, quant=quant) <= error
    measured = gguf.quality(wide, path, quant=quant, tokens=48)
    assert 1e-3 < measured["max_abs_err"] <= error and 0 < measured["kl"] <= divergence
    assert 0 < abs(measured["bits_per_byte_change"]) < divergence**0.5 and measured["measured_tokens"] == 48
    matrices = [t for t in reader.GGUFReader(path).tensors if len(t.shape) == 2]
    assert sum(t.n_bytes for t in matrices) / sum(4 * t.n_elements for t in matrices) == pytest.approx(size, abs=0.01)


def test_packed_matrices_unpack_to_the_weights(wide, tmp_path):
    path = gguf.write(wide, str(tmp_path / "out"), quant="q4_k_m")
    expected = dict(gguf.tensors(wide.config.model, wide.params, "dense"))
    for tensor in reader.GGUFReader(path).tensors:
        w, name = expected[tensor.name.removesuffix(".weight")], tensor.tensor_type.name
        back = reader.quants.dequantize(tensor.data, tensor.tensor_type).reshape(w.shape)
        assert np.abs(back - w).max() <= {"F32": 0, "Q6_K": 0.04, "Q4_K": 0.2}[name] * np.abs(w).max(), tensor.name


def test_types_are_those_of_llamas_own_quantiser(wide, tmp_path):
    chosen = types(gguf.write(wide, str(tmp_path / "out"), quant="q4_k_m"))
    better = {"token_embd", "blk.1.attn_v", "blk.1.ffn_down"}
    assert {name for name, kind in chosen.items() if kind == "Q6_K"} == better
    assert {kind for name, kind in chosen.items() if name not in better} == {"F32", "Q4_K"}
    kinds = [gguf.kind(f"blk.{i}.attn_v", "q4_k_m", 16, True) for i in range(16)]
    assert [i for i, kind in enumerate(kinds) if kind == "Q6_K"] == [0, 1, 4, 7, 10, 13, 14, 15]
    assert gguf.kind("token_embd", "q4_k_m", 16, False) == gguf.kind("output", "q4_k_m", 16, True) == "Q4_K"


def test_rows_that_blocks_do_not_divide_are_kept_in_larger_types(make, tok, tmp_path, capsys):
    model = exports.trained(make, tok, **EQUAL | {"d": 288, "rank": 32, "mlp": 40})
    path = gguf.write(model, str(tmp_path / "out"), quant="q4_k_m")
    chosen = types(path)
    assert (chosen["blk.0.attn_v"], chosen["token_embd"], chosen["blk.0.ffn_down"]) == ("Q5_0", "Q8_0", "F16")
    message = "q4_k_m: blocks do not divide the rows of 15 of 15 matrices, kept as F16 or Q5_0 or Q8_0"
    assert message in capsys.readouterr().err
    assert gguf.check(model, path, quant="q4_k_m") < 2


def test_the_cache_is_one_head_of_latents(path, model):
    fields = reader.GGUFReader(path).fields
    value = lambda key: fields[f"refact.{key}"].contents()
    assert value("attention.head_count_kv") == 1
    assert value("attention.key_length") == value("attention.value_length") == model.config.model.rank


def test_texts_and_chats_have_the_same_ids(path, tok, make):
    with gguf.serve(path, tok.vocab_size, 100) as run:
        for text in exports.nasty_texts(make.prose(300)):
            assert run.encode(text) == tok.encode(text), repr(text)
        assert run.encode("a<|im_end|></s>b") == tok.encode("a<|im_end|></s>b")
        for seed in range(3):
            messages = [{"role": "system", "content": "be\n\n brief "}, *make.chat(5, seed)]
            assert run.encode_chat(messages) == [tok.bos, *chat.encode(tok, messages, prompt=True)[0]]


def test_generation_stops_where_the_assistant_does(path, tok):
    fields = reader.GGUFReader(path).fields
    ids = [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot")]
    assert sorted(ids) == chat.stop_ids(tok)


def test_a_template_without_generation_renders_the_same(tok):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    other = tokenizer.SentencePiece(tok.model, hf_tokenizer.without_generation(tok.chat_template))
    assert "generation %}" not in other.chat_template.replace("add_generation_prompt", "")
    assert chat.encode(other, messages)[0] == chat.encode(tok, messages)[0]
    trimmed = "{% for m in messages %}\n  {%- generation -%} \n {{ m.content }}\n  {% endgeneration %}\n.{% endfor %}"
    one, two = (tokenizer.SentencePiece(tok.model, t) for t in (trimmed, hf_tokenizer.without_generation(trimmed)))
    assert chat.encode(one, messages)[0] == chat.encode(two, messages)[0]


def test_the_command_says_what_it_verified(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gguf, "quality", functools.partial(gguf.quality, tokens=48))
    (tmp_path / "out").mkdir()
    args = ("--format=gguf", f"--out={tmp_path}/out", "--attn=latent")
    status, facts, err = exports.run(monkeypatch, capsys, model, *args)
    assert status == 0 and facts["verified"] and 0 < facts["max_abs_err"] <= 2e-5, err
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["model.gguf"]
    args = ("--format=gguf", f"--out={tmp_path}/small", "--quant=bf16")
    status, facts, err = exports.run(monkeypatch, capsys, model, *args)
    assert status == 0 and facts["verified"] and facts["max_abs_err"] > 2e-5 and 0 < facts["kl"] < 1e-2, err
    assert f"bits per byte {facts['bits_per_byte']:.4f} ({facts['bits_per_byte_change']:+.4f})" in err


def test_without_a_runtime_the_export_is_not_verified(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    status, facts, err = exports.run(monkeypatch, capsys, model, "--format=gguf", f"--out={tmp_path}/out")
    assert status == 0 and facts["verified"] is False and facts["max_abs_err"] is None
    assert "not verified" in err and "pip install" in err and (tmp_path / "out" / "model.gguf").is_file()


@pytest.mark.parametrize("attn", gguf.FORMS)
def test_a_wrong_export_leaves_nothing(attn, model, tmp_path, monkeypatch, capsys):
    right = gguf.attention
    monkeypatch.setattr(gguf, "attention", lambda *args: [w * 1.001 for w in right(*args)])
    args = ("--format=gguf", f"--out={tmp_path}/out", f"--attn={attn}")
    exports.refused(exports.run(monkeypatch, capsys, model, *args), 1, "differ")
    assert os.listdir(tmp_path) == []


def test_a_file_that_llama_cannot_load_leaves_nothing(model, tmp_path, monkeypatch, capsys):
    right = gguf.tensors
    monkeypatch.setattr(gguf, "tensors", lambda *args: list(right(*args))[:-1])
    exports.refused(exports.run(monkeypatch, capsys, model, "--format=gguf", f"--out={tmp_path}/out"), 1, "load")
    assert os.listdir(tmp_path) == []


def test_models_that_a_file_cannot_hold_are_refused(make, tok, tmp_path, monkeypatch, capsys):
    model_of = lambda **changes: exports.trained(make, tok, **changes)
    foreign = tokenizer.load(write(tmp_path / "tok", "bytes", LLAMA, bos_token="<s>"))
    cases = [
        (model_of(), (), "latent_norm"),
        (model_of(latent_norm=False), ("--attn=latent",), "--attn=dense"),
        (model_of(rank=0), ("--attn=latent",), "rank=0"),
        (exports.trained(make, foreign, **EQUAL), (), "tokenizer.json"),
        (model_of(**EQUAL), ("--quant=q2",), "--quant"),
    ]
    for model, args, name in cases:
        result = exports.run(monkeypatch, capsys, model, "--format=gguf", f"--out={tmp_path}/out", *args)
        exports.refused(result, 2, name)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "xllamacpp", None)
        args = ("--format=gguf", f"--out={tmp_path}/out", "--quant=q4_k_m")
        exports.refused(exports.run(monkeypatch, capsys, model_of(**EQUAL), *args), 2, "pip install xllamacpp")
    monkeypatch.setitem(sys.modules, "gguf", None)
    result = exports.run(monkeypatch, capsys, model_of(**EQUAL), "--format=gguf", f"--out={tmp_path}/out")
    exports.refused(result, 2, "pip install gguf")
    assert os.listdir(tmp_path) == ["tok"]


def test_verification_goes_beyond_the_trained_length(model):
    longest = verify.longest(model.config)
    lengths = [len(row) for row, _ in verify.prompts(model)]
    assert sum(n > longest for n in lengths) == 2 and max(lengths) < gguf.CONTEXT * longest
    assert all(places[0] == 0 and places[-1] == len(row) - 1 for row, places in verify.prompts(model))
    off = lambda row, places: verify.logits(model, row, places) + np.float32(np.nan)
    with pytest.raises(Exception, match="differ"):
        verify.check(model, [off])
