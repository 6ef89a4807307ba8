"""Exports for transformers: the same logits, ids and chats in every way of running them."""

import json
import os
import sys

import exports
import numpy as np
import pytest
import runs
import torch
from test_hf_tokenizer import LLAMA, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_jax.config import UsageError
from lowrank_jax.data import chat, tokenizer
from lowrank_jax.export import hf, hf_tokenizer, verify, weights

pytestmark = pytest.mark.slow

torch.set_num_threads(1)  # others test at the same time, and threads wait for each other by spinning


@pytest.fixture(scope="module")
def model(make, tok):
    return exports.trained(make, tok)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> str:
    return hf.write(model, str(tmp_path_factory.mktemp("hf") / "usual"))


def load(folder: str, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings).eval()


def random_ids(length: int, rows: int = 1, vocab: int = 521) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(3).integers(4, vocab, size=(rows, length)))


@pytest.mark.parametrize("name", exports.MODELS)
@torch.no_grad()
def test_logits_are_ours_with_and_without_a_cache(name, make, tok, tmp_path):
    model = exports.trained(make, tok, **exports.MODELS[name])
    assert hf.check(model, hf.write(model, str(tmp_path / "out"))) <= 2e-5
    net, ids = load(str(tmp_path / "out")), random_ids(50)
    full = net(ids, use_cache=False).logits
    ours = verify.logits(model, ids[0].numpy(), np.arange(50))
    assert ours.std() > 0.2 and np.abs(full[0].numpy() - ours).max() <= 2e-5
    out = net(ids[:, :20])
    steps = [out.logits] + [net(ids[:, i : i + 1], past_key_values=out.past_key_values).logits for i in range(20, 50)]
    torch.testing.assert_close(torch.cat(steps, 1), full, atol=2e-5, rtol=0)
    padded = torch.cat([torch.zeros(1, 9, dtype=int), ids], 1)
    seen = (torch.arange(59) >= 9).long()[None]
    torch.testing.assert_close(net(padded, attention_mask=seen).logits[:, 9:], full, atol=2e-5, rtol=0)
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    said = net.generate(ids, use_cache=False, **greedy)
    assert torch.equal(said, net.generate(ids, **greedy))
    assert torch.equal(said, net.generate(ids, cache_implementation="static", **greedy))
    assert torch.equal(said, net.generate(padded, attention_mask=seen, **greedy)[:, 9:])
    beams = {"num_beams": 3, **greedy}
    assert torch.equal(net.generate(ids, **beams), net.generate(ids, use_cache=False, **beams))


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True])
def test_the_cache_holds_latents_alone(shared, make, tok, tmp_path):
    model = exports.trained(make, tok, shared_kv=shared)
    cache = load(hf.write(model, str(tmp_path / "out")))(random_ids(30, rows=2)).past_key_values
    _, k, v, _ = model.config.model.ranks
    for layer in cache.layers:
        assert layer.keys.shape == (2, 1, 30, k) and layer.values.shape == (2, 1, 30, 0 if shared else v)


@torch.no_grad()
def test_rows_of_several_lengths_in_one_batch(folder):
    net, rows = load(folder), [random_ids(30)[0, :n] for n in (4, 30, 17)]
    batch = torch.stack([torch.cat([torch.zeros(30 - len(row), dtype=int), row]) for row in rows])
    seen = torch.stack([torch.arange(30) >= 30 - len(row) for row in rows]).long()
    greedy = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    said = net.generate(batch, attention_mask=seen, **greedy)[:, 30:]
    assert torch.equal(said, torch.cat([net.generate(row[None], **greedy)[:, len(row) :] for row in rows]))


def test_the_model_trains_saves_and_loads(folder, tmp_path):
    net, ids = load(folder), random_ids(20, rows=2)
    expected = net(ids).logits
    net.save_pretrained(tmp_path / "again")
    assert {"modeling_lowrank.py", "lowrank.py"} <= set(os.listdir(tmp_path / "again"))
    torch.testing.assert_close(load(str(tmp_path / "again"))(ids).logits, expected)
    grads = []
    for checkpointing in (False, True):
        net.zero_grad()
        if checkpointing:
            net.activation_checkpointing_enable()
        net.train()
        net(ids, labels=ids).loss.backward()
        grads.append({name: p.grad.clone() for name, p in net.named_parameters()})
    assert all(torch.isfinite(grad).all() and grad.abs().max() > 0 for grad in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


@torch.no_grad()
def test_half_precision_and_eager_are_close(folder):
    ids = random_ids(40)
    expected = load(folder)(ids).logits
    torch.testing.assert_close(load(folder, attn_implementation="eager")(ids).logits, expected, atol=2e-5, rtol=0)
    half = load(folder, dtype=torch.bfloat16)(ids).logits
    assert half.dtype == torch.bfloat16 and (half - expected).abs().max() < 0.15


def test_texts_have_the_same_ids(folder, tok, make):
    exported = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for text in [*exports.nasty_texts(make.prose(300)), "\u2581a \u2581", *verify.TEXTS]:
        assert exported(text)["input_ids"] == [tok.bos, *tok.encode(text)], repr(text)
        assert exported.decode(tok.encode(text), clean_up_tokenization_spaces=False) == text
    ids = exported("a<|im_end|></s>b", split_special_tokens=True, add_special_tokens=False)["input_ids"]
    assert ids == tok.encode("a<|im_end|></s>b")
    assert exported.decode([tok.bos, *tok.encode("ba"), tok.special("<|im_end|>")], skip_special_tokens=True) == "ba"


def test_pieces_that_merge_in_two_ways_merge_as_in_sentencepiece():
    """With few letters, pieces overlap: aba is ab a and a ba."""
    letters = exports.random.Random(5)
    text = ["".join(letters.choices("ab ", k=200)) for _ in range(60)]
    tok = tokenizer.train(text, 600)
    exported = tokenizer.tokenizers.Tokenizer.from_str(hf_tokenizer.files(tok, 64)["tokenizer.json"])
    for _ in range(300):
        text = "".join(letters.choices("ab ", k=60))
        assert exported.encode(text, add_special_tokens=False).ids == tok.encode(text), text


def test_chats_have_the_same_ids_and_end(folder, tok, make):
    exported = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for seed in range(5):
        messages = [{"role": "system", "content": "be\n\n brief "}, *make.chat(5, seed)]
        ids, said = chat.encode(tok, messages, prompt=True)
        assert exported.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == [tok.bos, *ids]
        masks = {"return_assistant_tokens_mask": True, "return_dict": True}
        out = exported.apply_chat_template(messages, add_generation_prompt=True, **masks)
        assert out["assistant_masks"] == [0, *map(int, said)]
    assert load(folder).generation_config.eos_token_id == chat.stop_ids(tok) == [tok.eos, tok.special("<|im_end|>")]


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
def test_a_foreign_tokenizer_is_exported(kind, tmp_path, make):
    tok = tokenizer.load(write(tmp_path / "tok", kind, LLAMA, bos_token="<s>"))
    model = exports.trained(make, tok)
    folder = hf.write(model, str(tmp_path / "out"))
    assert hf.check(model, folder) <= 2e-5
    exported = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for text in exports.nasty_texts(make.prose(300), 100):
        assert exported(text)["input_ids"] == [tok.bos, *tok.encode(text)], repr(text)


def test_a_sentencepiece_model_that_changes_the_text_is_refused(make):
    for settings in ({"model_type": "unigram"}, {"model_type": "bpe", "add_dummy_prefix": True}):
        out = tokenizer.io.BytesIO()
        plain = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
        tokenizer.spm.SentencePieceTrainer.train(
            sentence_iterator=iter(make.prose(900).split(".")),
            model_writer=out,
            vocab_size=60,
            control_symbols=["<|im_start|>", "<|im_end|>"],
            minloglevel=2,
            **plain | settings,
        )
        with pytest.raises(UsageError, match="cannot be exported|can be exported"):
            hf_tokenizer.files(tokenizer.SentencePiece(out.getvalue()), 64)


def test_the_card_tells_what_it_was_trained_on(folder):
    card = open(os.path.join(folder, "README.md")).read()
    assert "| `tokens` in training | 1,234 |" in card and "| `step` in training | 7 |" in card and "cursor" not in card


def test_the_command_says_what_it_verified(model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "hf"
    status, facts, err = exports.run(monkeypatch, capsys, model, "--format=hf", f"--out={out}")
    assert status == 0 and facts["verified"] and 0 < facts["max_abs_err"] <= 2e-5, err
    assert (facts["format"], facts["out"]) == ("hf", str(out)) and (out / "config.json").is_file()
    assert os.listdir(tmp_path) == ["new"] and os.listdir(out.parent) == ["hf"]
    assert len({os.stat(file).st_mode for file in out.iterdir() if file.is_file()}) == 1, (
        "a file that others may not read"
    )


def test_without_a_runtime_the_export_is_not_verified(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, facts, err = exports.run(monkeypatch, capsys, model, "--format=hf", f"--out={tmp_path}/out")
    assert status == 0 and facts["verified"] is False and facts["max_abs_err"] is None
    assert "not verified" in err and "pip install" in err and (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("wrong", ["model.layers.1.attention.v.up.weight", "model.norm.weight"])
def test_a_wrong_export_leaves_nothing(wrong, model, tmp_path, monkeypatch, capsys):
    right = weights.tensors
    monkeypatch.setattr(weights, "tensors", lambda params: right(params) | {wrong: right(params)[wrong] * 1.001})
    result = exports.run(monkeypatch, capsys, model, "--format=hf", f"--out={tmp_path}/a/out")
    exports.refused(result, 1, "differ")
    assert os.listdir(tmp_path) == []


def test_mistakes_get_one_line(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    run = lambda *args: exports.run(monkeypatch, capsys, model, *args)
    exports.refused(run("--format=hf", f"--out={tmp_path}/full"), 2, "full")
    exports.refused(run("--format=hf", f"--out={tmp_path}/full/mine.txt"), 2, "mine.txt")
    exports.refused(run("--format=hf", f"--out={tmp_path}/x", "--attn=dense"), 2, "--attn")
    exports.refused(run("--format=hf", f"--out={tmp_path}/x", "--quant=int8"), 2, "--quant")
    exports.refused(run("--format=nothing", f"--out={tmp_path}/x"), 2, "--format")
    exports.refused(run("--format=hf"), 2, "--out")
    exports.refused(run("--format=hf", "--out="), 2, "--out=")
    assert os.listdir(tmp_path) == ["full"] and os.listdir(tmp_path / "full") == ["mine.txt"]


def test_a_run_is_exported(reference, tmp_path):
    """The run ended with SFT."""
    assert runs.TINY["sft.steps"] > 0
    code, out, err = runs.run("export", f"--workdir={reference}", "--format=hf", f"--out={tmp_path}/out", "--json")
    assert code == 0 and runs.last_json(out)["verified"], err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 64
    runs.assert_one_line(*runs.run("export", f"--workdir={tmp_path}", "--format=hf", "--out=x")[::2], 2, "holds no run")
