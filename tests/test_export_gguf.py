"""Exports for llama.cpp: its own server gives the probabilities, ids and prompts that the model gives."""

import os
import sys

import exports
import gguf as reader
import numpy as np
import pytest
from test_hf_tokenizer import LLAMA, write

from lowrank_jax.data import chat, tokenizer
from lowrank_jax.export import gguf, llama, template, verify

EQUAL = {"latent_norm": False, "rank_split": (1, 1, 1, 1)}
MODELS = {
    "8 heads": EQUAL,
    "12 heads, one latent": EQUAL | {"d": 48, "heads": 12, "shared_kv": True},
    "12 heads": EQUAL | {"d": 36, "heads": 12, "rank": 5, "mlp": 40},
    "all in low rank": EQUAL | {"mlp_rank": 8, "embed_rank": 12},
    "a head of its own": EQUAL | {"tied": False, "embed_rank": 12},
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


def test_half_precision_is_close_and_half_as_large(model, path, tmp_path):
    half = gguf.write(model, str(tmp_path / "out"), "latent", "f16")
    assert 2e-5 < gguf.check(model, half, "latent", "f16") <= 2e-2
    sizes = [sum(tensor.data.nbytes for tensor in reader.GGUFReader(p).tensors) for p in (half, path)]
    assert 0.5 < sizes[0] / sizes[1] < 0.52


def test_the_cache_is_one_head_of_latents(path, model):
    fields = reader.GGUFReader(path).fields
    value = lambda key: fields[f"refact.{key}"].contents()
    assert value("attention.head_count_kv") == 1
    assert value("attention.key_length") == value("attention.value_length") == model.config.model.rank


def test_texts_and_chats_have_the_same_ids(path, tok, make):
    with llama.opened(path, tok.vocab_size, 100) as run:
        for text in exports.nasty_texts(make.prose(300)):
            assert run.encode(text) == tok.encode(text), repr(text)
        assert run.encode("a<|im_end|></s>b") == tok.encode("a<|im_end|></s>b")
        for seed in range(3):
            messages = [{"role": "system", "content": "be\n\n brief "}, *make.chat(5, seed)]
            assert run.encode_chat(messages) == [tok.bos, *chat.encode(tok, messages, prompt=True)[0]]


def test_it_stops_where_the_assistant_does(path, tok):
    fields = reader.GGUFReader(path).fields
    ids = [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot")]
    assert sorted(ids) == chat.stop_ids(tok)


def test_a_template_without_generation_renders_the_same(tok):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    other = tokenizer.SentencePiece(tok.model, template.plain(tok.chat_template))
    assert "generation %}" not in other.chat_template.replace("add_generation_prompt", "")
    assert chat.encode(other, messages)[0] == chat.encode(tok, messages)[0]
    trimmed = "{% for m in messages %}\n  {%- generation -%} \n {{ m.content }}\n  {% endgeneration %}\n.{% endfor %}"
    one, two = (tokenizer.SentencePiece(tok.model, t) for t in (trimmed, template.plain(trimmed)))
    assert chat.encode(one, messages)[0] == chat.encode(two, messages)[0]


def test_the_command_says_what_it_verified(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    args = ("--format=gguf", f"--out={tmp_path}/out", "--attn=latent")
    status, facts, err = exports.run(monkeypatch, capsys, model, *args)
    assert status == 0 and facts["verified"] and 0 < facts["max_abs_err"] <= 2e-5, err
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["model.gguf"]


def test_without_a_runtime_it_is_made_and_not_called_verified(model, tmp_path, monkeypatch, capsys):
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


def test_what_a_file_cannot_hold_is_refused(make, tok, tmp_path, monkeypatch, capsys):
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
    monkeypatch.setitem(sys.modules, "gguf", None)
    result = exports.run(monkeypatch, capsys, model_of(**EQUAL), "--format=gguf", f"--out={tmp_path}/out")
    exports.refused(result, 2, "pip install gguf")
    assert os.listdir(tmp_path) == ["tok"]


def test_verification_compares_beyond_the_trained_length(model):
    longest = verify.longest(model.config)
    lengths = [len(row) for row, _ in verify.prompts(model)]
    assert sum(n > longest for n in lengths) == 2 and max(lengths) < gguf.CONTEXT * longest
    assert all(places[0] == 0 and places[-1] == len(row) - 1 for row, places in verify.prompts(model))
    off = lambda row, places: verify.logits(model, row, places) + np.float32(np.nan)
    with pytest.raises(Exception, match="differ"):
        verify.check(verify.difference(model, off))
