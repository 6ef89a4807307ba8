"""Hugging Face tokenizers: the same promises as SentencePiece keeps, and chat templates as they come with them."""

import functools
import json
import os
import random
import re

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from lowrank_jax.config import UsageError
from lowrank_jax.data import chat, tokenizer
from lowrank_jax.data.tokenizer import CHATML, TURN_END, TURN_START

END, HEAD, TAIL, TURN = "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
OVERLAP = ("<s>", "s><", "[INST]")
SPECIALS = (END, HEAD, TAIL, TURN, *OVERLAP)
LLAMA = """{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
INST = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} \
{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% endif %}{% endfor %}"""
TEXTS = st.lists(st.one_of(st.text(max_size=6), st.sampled_from([*SPECIALS, TURN_END, "<s><", " ", "\n"]))).map("".join)
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "ba ce?"},
    {"role": "assistant", "content": "di fo."},
    {"role": "user", "content": "gu"},
    {"role": "assistant", "content": "ha je"},
]


LLAMA2 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} \
{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"""
HARMONY = """{% for m in messages %}<s>{{ m.role }}{% if m.role == 'assistant' %}[INST]final{% endif %}\
<|end_header_id|>{{ m.content }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<s>assistant{% endif %}"""
PLAIN = """{% for m in messages %}<|start_header_id|>{{ m.role }} {{ m.name }}<|end_header_id|>{{ m.content }}\
<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>{% endif %}"""


def learn(kind: str) -> tokenizers.Tokenizer:
    """A byte-level BPE, as GPT-2 has; a BPE with byte fallback, as Llama 2; or a lower-casing WordPiece."""
    texts = ["the cat sat on the mat. ba ce di fo gu ha je\n"] * 5
    if kind == "bytes":
        learnt = tokenizers.Tokenizer(models.BPE())
        learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        learnt.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(SPECIALS), initial_alphabet=alphabet)
    elif kind == "fallback":
        learnt = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        learnt.normalizer = normalizers.Replace(" ", "\u2581")
        parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        learnt.decoder = decoders.Sequence(parts)
        first = [*SPECIALS, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=first)
        learnt.train_from_iterator(texts, trainer)
        facts = json.loads(learnt.to_str())
        facts["added_tokens"] = [t for t in facts["added_tokens"] if t["content"] in SPECIALS]
        return tokenizers.Tokenizer.from_str(json.dumps(facts))
    else:
        learnt = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        learnt.normalizer = normalizers.BertNormalizer(lowercase=True)
        learnt.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=100, special_tokens=["[UNK]", END])
    learnt.train_from_iterator(texts, trainer)
    return learnt


def write(folder, kind: str = "bytes", template: str = "", **config) -> str:
    folder.mkdir(exist_ok=True)
    learn(kind).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END} | config))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return str(folder)


@pytest.fixture(scope="module", params=["bytes", "fallback"])
def tok(request, tmp_path_factory) -> tokenizer.Tokenizer:
    return tokenizer.load(write(tmp_path_factory.mktemp("hf") / request.param, request.param, LLAMA))


@given(TEXTS)
def test_text_survives_and_never_becomes_a_special_token(tok, text):
    text = text.replace("\u2581", "_")  # which a byte-fallback model takes for a space
    ids = tok.encode(text)
    assert tok.decode(ids) == text and not set(ids) & set(tok.specials.values())
    assert tok.byte_lengths()[ids].sum() == len(text.encode())


def edited(folder, edit, kind: str = "bytes", template: str = LLAMA) -> str:
    """A folder with a tokenizer.json that `edit` has changed."""
    path = write(folder, kind, template)
    facts = json.loads((folder / "tokenizer.json").read_text())
    edit(facts)
    (folder / "tokenizer.json").write_text(json.dumps(facts))
    return path


@pytest.fixture(scope="module", params=[True, False], ids=["special", "plain"])
def stripping(request, tmp_path_factory) -> tokenizer.Tokenizer:
    """Its added tokens take the white space around them, as Phi-3's do; `plain` ones but EOS stand for text."""

    def strip(facts):
        for token in facts["added_tokens"]:
            token |= {"lstrip": True, "rstrip": True, "special": request.param or token["content"] == END}

    return tokenizer.load(edited(tmp_path_factory.mktemp("hf") / "a", strip))


@given(TEXTS)
def test_added_tokens_leave_the_white_space_around_them(stripping, text):
    ids = stripping.encode(text)
    assert stripping.decode(ids) == text and not set(ids) & set(stripping.specials.values())
    assert stripping.byte_lengths()[ids].sum() == len(text.encode())


def unigram(folder) -> str:
    """A Unigram model with byte fallback, which has its special tokens among its pieces."""
    pieces = [("<unk>", 0.0), *((name, 0.0) for name in SPECIALS), *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    pieces += [(character, -5.0) for character in "\u2581abcdefghi<>/|"]
    learnt = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    learnt.normalizer = normalizers.Replace(" ", "\u2581")
    learnt.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    learnt.add_special_tokens(list(SPECIALS))
    folder.mkdir()
    learnt.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return str(folder)


@pytest.fixture(scope="module", params=["unigram", "ignore_merges"])
def knowing(request, tmp_path_factory) -> tokenizer.Tokenizer:
    """The model itself would find the names of special tokens in a text."""
    folder = tmp_path_factory.mktemp("hf") / "a"
    if request.param == "unigram":
        return tokenizer.load(unigram(folder))
    return tokenizer.load(edited(folder, lambda facts: facts["model"].update(ignore_merges=True), "fallback"))


@given(TEXTS)
@example(END)
@example("<s><")
@example("a<s><s>s><<s")
def test_a_model_with_special_tokens_among_its_pieces_keeps_them_from_text(knowing, text):
    text = text.replace("\u2581", "_")
    ids = knowing.encode(text)
    assert knowing.decode(ids) == text and not set(ids) & set(knowing.specials.values())
    assert knowing.byte_lengths()[ids].sum() == len(text.encode())


def test_half_a_surrogate_pair_becomes_a_question_mark(tok):
    assert tok.decode(tok.encode("a\ud83d b")) == "a? b"
    assert trained(tok, [CHAT[1], {"role": "assistant", "content": "a\ud83d b"}]) == f"a? b{TURN}"


def test_a_saved_tokenizer_is_the_same_tokenizer(tok, tmp_path):
    tok.save(tmp_path)
    again = tokenizer.load(str(tmp_path))
    for fact in ("vocab_size", "bos", "eos", "names", "specials", "chat_template", "sha256", "files_sha256"):
        assert getattr(again, fact) == getattr(tok, fact)
    assert again.encode("the cat sat") == tok.encode("the cat sat")
    assert chat.encode(again, CHAT) == chat.encode(tok, CHAT)


def test_ids_with_gaps_all_fit_into_the_vocabulary(tmp_path):
    folder = write(tmp_path / "gaps", template=LLAMA)
    facts = json.loads((tmp_path / "gaps" / "tokenizer.json").read_text())
    vocab = facts["model"]["vocab"]
    last = max(vocab, key=vocab.get)
    count, vocab[last] = len(vocab), vocab[last] + 7
    (tmp_path / "gaps" / "tokenizer.json").write_text(json.dumps(facts))
    tok = tokenizer.load(folder)
    assert tok.vocab_size == count + 7 == vocab[last] + 1 and len(tok.byte_lengths()) == tok.vocab_size


def test_a_tokenizer_without_a_template_gets_chatml_and_its_tags(tmp_path):
    tok = tokenizer.load(write(tmp_path / "a"))
    assert tok.chat_template == CHATML and tok.bos == tok.eos == tok.special(END)
    assert tok.vocab_size == learn("bytes").get_vocab_size() + 2
    assert len(tok.byte_lengths()) == tok.vocab_size and tok.special(TURN_START) == tok.vocab_size - 2
    tok.save(tmp_path / "b")
    assert tokenizer.load(str(tmp_path / "b")).vocab_size == tok.vocab_size
    assert tok.sha256 != tokenizer.load(write(tmp_path / "c", template=LLAMA)).sha256


def test_tokenizers_that_differ_only_in_their_eos_have_different_hashes(tmp_path):
    one, other = (tokenizer.load(write(tmp_path / name, "bytes", LLAMA, eos_token=name)) for name in (END, TURN))
    assert one.json == other.json and one.eos != other.eos and one.sha256 != other.sha256


def test_a_template_is_found_wherever_it_is_kept(tmp_path):
    inside = write(tmp_path / "a", chat_template=LLAMA)
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": LLAMA}]
    for folder in (inside, write(tmp_path / "b", chat_template=named), write(tmp_path / "c", "bytes", LLAMA)):
        assert tokenizer.load(folder).chat_template == LLAMA
    assert tokenizer.load(write(tmp_path / "d", "bytes", LLAMA, chat_template="x")).chat_template == LLAMA
    assert tokenizer.load(f"{inside}/tokenizer.json").chat_template == LLAMA


def test_the_names_of_special_tokens_may_be_in_a_file_of_their_own(tmp_path):
    folder = write(tmp_path / "a", eos_token=None)
    with pytest.raises(UsageError, match="tokenizer_config.json must name an eos_token"):
        tokenizer.load(folder)
    (tmp_path / "a" / "tokenizer_config.json").unlink()
    names = {"eos_token": {"content": END}, "bos_token": {"content": "<s>"}}
    (tmp_path / "a" / "special_tokens_map.json").write_text(json.dumps(names))
    tok = tokenizer.load(folder)
    assert (tok.eos, tok.bos) == (tok.special(END), tok.special("<s>"))


def test_the_config_goes_before_the_map_of_special_tokens(tmp_path):
    folder = write(tmp_path / "a", eos_token=TURN, add_bos_token=True, pad_token=None, unk_token="nowhere")
    (tmp_path / "a" / "special_tokens_map.json").write_text(json.dumps({"eos_token": END, "bos_token": HEAD}))
    tok = tokenizer.load(folder)
    assert tok.names == {"eos_token": TURN, "bos_token": HEAD}


def test_a_tokenizer_that_changes_text_is_refused_in_one_line(tmp_path):
    spaced = edited(tmp_path / "b", lambda facts: facts["pre_tokenizer"].update(add_prefix_space=True))
    for folder in (write(tmp_path / "a", "wordpiece"), spaced):
        with pytest.raises(UsageError, match=f"^tokenizer {folder}: its ids do not decode to the same text") as e:
            tokenizer.load(folder)
        assert "\n" not in str(e.value)


CHANGES = {
    "NFKC": ({"type": "NFKC"}, r"becomes 'A1 ,"),
    "lower case": ({"type": "Lowercase"}, "'  Two .* becomes '  two "),
    "accents": ({"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}]}, "becomes"),
    "combining marks": ({"type": "Replace", "pattern": {"String": "\u0301"}, "content": ""}, r"'e\\u0301' becomes 'e'"),
    "ligatures": ({"type": "Replace", "pattern": {"String": "\ufb01"}, "content": "fi"}, r"'\\ufb01' becomes 'fi'"),
    "emoji": ({"type": "Replace", "pattern": {"String": "\u200d"}, "content": ""}, r"\\u200d"),
    "control": ({"type": "Replace", "pattern": {"String": "\x1b"}, "content": ""}, r"\\x1b"),
    "line ends": ({"type": "Replace", "pattern": {"String": "\r\n"}, "content": "\n"}, r"\\r\\n"),
    "private": ({"type": "Replace", "pattern": {"String": "\ue000"}, "content": ""}, r"\\ue000"),
    "the end": ({"type": "Strip", "strip_left": False, "strip_right": True}, "becomes"),
    "an added name": ({"type": "Replace", "pattern": {"String": "[INST]"}, "content": "[inst]"}, r"becomes .*\[inst\]"),
}


@pytest.mark.parametrize("rule, example", CHANGES.values(), ids=CHANGES)
def test_a_tokenizer_that_normalises_text_is_refused_with_an_example(tmp_path, rule, example):
    folder = edited(tmp_path / "a", lambda facts: facts.update(normalizer=rule))
    with pytest.raises(UsageError, match="its ids do not decode to the same text: '.*' becomes '.*'; learn one") as e:
        tokenizer.load(folder)
    assert re.search(example, str(e.value)) and str(e.value).isascii() and "\n" not in str(e.value)


def test_a_tokenizer_that_composes_equivalent_characters_is_used_and_said_to_do_so(tmp_path, capsys):
    """Qwen's tokenizers do: their texts look the same."""
    folder = edited(tmp_path / "a", lambda facts: facts.update(normalizer={"type": "NFC"}))
    assert tokenizer.load(folder).decode(tokenizer.load(folder).encode("e\u0301")) == "\xe9"
    assert "composes characters: 'e\\u0301' becomes '\\xe9'" in capsys.readouterr().err


JUNK = [None, True, -1, 1e99, "", "x", [], {}, [1], {"a": 1}, 2**31 - 1, 2**70, {"type": "x"}, {"Regex": "("}]


def places(value, path=()):
    yield path
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in [*keys[:6], *keys[-2:]]:
            yield from places(value[key], (*path, key))


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A file with a bit flipped, cut short, with zeros in it, or with JSON of another type at a random place."""
    i, kind = draw.randrange(len(content)), draw.randrange(5)
    if kind < 3:
        flipped = bytes([content[i] ^ 1 << draw.randrange(8)])
        return content[:i] + (flipped + content[i + 1 :], b"", b"\0" * 9 + content[i:])[kind]
    facts = json.loads(content)
    *way, last = draw.choice([path for path in places(facts) if path])
    functools.reduce(lambda value, key: value[key], way, facts)[last] = draw.choice(JUNK)
    return json.dumps(facts).encode()


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
def test_a_damaged_tokenizer_is_refused_in_one_line_or_works(tmp_path, kind, capfd):
    folder, draw, refused = write(tmp_path / "a", kind, LLAMA), random.Random(kind), 0
    files = {path: path.read_bytes() for path in sorted((tmp_path / "a").glob("*.json"))}
    for _ in range(150):
        path = draw.choice(sorted(files))
        path.write_bytes(damaged(files[path], draw))
        try:
            tok = tokenizer.load(folder)
            tok.encode("the cat e\u0301 \u6f22")
            chat.stop_ids(tok)
        except UsageError as e:
            refused += 1
            assert "\n" not in str(e)
        path.write_bytes(files[path])
    assert refused > 50 and "panicked" not in capfd.readouterr().err


def test_a_model_that_cannot_encode_some_texts_is_refused_in_one_line(tmp_path):
    unknown = {"unk_token": "nowhere", "byte_fallback": False}
    folder = edited(tmp_path / "a", lambda facts: facts["model"].update(unknown), "fallback")
    with pytest.raises(UsageError, match=f"^tokenizer {folder}: the tokenizer cannot encode a text: .*nowhere"):
        tokenizer.load(folder)


def test_a_text_has_the_same_ids_each_time_even_if_the_file_asks_for_dropout(tmp_path):
    tok = tokenizer.load(edited(tmp_path / "a", lambda facts: facts["model"].update(dropout=0.5)))
    assert len({tuple(tok.encode("the cat sat on the mat")) for _ in range(20)}) == 1


def test_merges_that_would_make_the_library_abort_are_refused(tmp_path):
    """tokenizers 0.23 cuts the prefix off each piece, also in the middle of a character."""
    folder = edited(tmp_path / "a", lambda facts: facts["model"].update(continuing_subword_prefix="x"))
    with pytest.raises(
        UsageError, match=f"^tokenizer {folder}: a merge of tokenizer.json lacks the continuing_subword"
    ):
        tokenizer.load(folder)


def test_a_panic_of_the_library_is_one_line_and_other_output_is_kept(tmp_path, monkeypatch, capfd):
    def panic(path):
        os.write(2, b"thread '<unnamed>' panicked\n")
        raise type("PanicException", (BaseException,), {})("out of range")

    folder, load = write(tmp_path / "a", "bytes", LLAMA), tokenizer._load
    monkeypatch.setattr(tokenizer, "_load", panic)
    with pytest.raises(UsageError, match=f"^tokenizer {folder}: not a tokenizer.json$"):
        tokenizer.load(folder)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(tokenizer, "_load", lambda path: os.write(2, b"a warning\n") and load(path))
    tokenizer.load(folder)
    assert capfd.readouterr().err == "a warning\n"


@pytest.mark.parametrize("edit", [lambda v: v.update(b=v["a"]), lambda v: v.update(b=2**31 - 1)])
def test_ids_that_two_pieces_share_or_no_memory_could_hold_are_refused(tmp_path, edit):
    folder = edited(tmp_path / "a", lambda facts: edit(facts["model"]["vocab"]))
    with pytest.raises(UsageError, match=f"^tokenizer {folder}: (two pieces of|tokenizer.json has an id of)"):
        tokenizer.load(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {}}'])
def test_a_file_that_is_no_tokenizer_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UsageError, match=f"^tokenizer {tmp_path}: not a tokenizer.json$"):
        tokenizer.load(str(tmp_path))


BROKEN = {
    ("tokenizer_config.json", b'{"eos_token":\n'): "tokenizer_config.json is not JSON: Expecting value",
    ("tokenizer_config.json", b"[]"): "tokenizer_config.json must hold a JSON object",
    ("tokenizer_config.json", b'{"chat_template": 3}'): "tokenizer_config.json has a chat_template that is no text",
    ("tokenizer_config.json", b'{"chat_template": ["a"]}'): "tokenizer_config.json has a chat_template that is no text",
    ("tokenizer_config.json", b'{"eos_token": ["a"]}'): "tokenizer_config.json must name an eos_token",
    ("tokenizer_config.json", b'{"eos_token": {"id": 1}}'): "tokenizer_config.json must name an eos_token",
    ("special_tokens_map.json", b"[" * 100_000): "special_tokens_map.json is not JSON: ",
    ("chat_template.jinja", b"caf\xe9"): "chat_template.jinja is not UTF-8 text at byte 3",
}


@pytest.mark.parametrize("name, content", BROKEN)
def test_a_broken_file_beside_the_tokenizer_is_refused_by_name_in_one_line(tmp_path, name, content):
    folder = write(tmp_path / "a")
    (tmp_path / "a" / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"^tokenizer {folder}: {BROKEN[name, content]}") as e:
        tokenizer.load(folder)
    assert "\n" not in str(e.value)


def test_a_missing_json_file_is_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match=f"^tokenizer {tmp_path}/tokenizer.json: no such file$"):
        tokenizer.load(f"{tmp_path}/tokenizer.json")


def test_a_tokenizer_from_the_hub_is_loaded(monkeypatch, tmp_path):
    import huggingface_hub

    folder = write(tmp_path / "a", "bytes", LLAMA)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: folder)
    assert tokenizer.load("some/name").sha256 == tokenizer.load(folder).sha256
    (tmp_path / "a" / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="^tokenizer some/name: the Hugging Face hub has no tokenizer.json"):
        tokenizer.load("some/name")


def test_a_name_that_the_hub_does_not_know_is_refused_in_one_line(monkeypatch):
    import huggingface_hub

    def away(*_, **__):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", away)
    with pytest.raises(
        UsageError, match="^tokenizer no/such: no such file, and the .* hub did not give .*: no network at all$"
    ):
        tokenizer.load("no/such")


# ------------------------------------------------------------------------------------------------------ chat templates


def spelled(tok, ids: list[int]) -> list[str]:
    names = {i: name for name, i in tok.specials.items()}
    return [names.get(i) or tok.decode([i]) for i in ids]


def trained(tok, messages: list[dict]) -> str:
    ids, said = chat.encode(tok, messages)
    return "".join(piece for piece, learnt in zip(spelled(tok, ids), said) if learnt)


def test_a_template_without_generation_trains_the_answers_and_their_ends(tok):
    assert trained(tok, CHAT) == f"di fo.{TURN}ha je{TURN}"
    ids, _ = chat.encode(tok, CHAT)
    assert spelled(tok, ids)[0] == HEAD and set(chat.stop_ids(tok)) == {tok.eos, tok.special(TURN)}
    prompt, _ = chat.encode(tok, CHAT[:2], prompt=True)
    assert ids[: len(prompt)] == prompt


def with_template(tok, template: str) -> tokenizer.Tokenizer:
    return tokenizer.HuggingFace(tok.json, {"eos_token": END, "bos_token": "<s>"}, template)


def test_the_symbol_behind_an_answer_is_trained_even_if_the_template_omits_it(tok):
    inst = with_template(tok, INST)
    assert trained(inst, CHAT[1:]) == f"di fo.{END}ha je{END}"
    ids, _ = chat.encode(inst, CHAT[1:])
    assert "<s>" not in spelled(inst, ids)[:1], "the caller puts BOS in front"
    assert chat.stop_ids(inst) == [inst.eos]


@pytest.mark.parametrize("template", [INST, LLAMA2])
def test_only_the_answers_of_llama_2_and_the_eos_behind_each_are_trained(tok, template):
    tok = with_template(tok, template)
    ids, said = chat.encode(tok, CHAT[1:])
    assert trained(tok, CHAT[1:]).replace(" di", "di").replace(" ha", "ha") == f"di fo.{END}ha je{END}"
    assert "".join(spelled(tok, ids)) == f"[INST] ba ce? [/INST] di fo.{END}[INST] gu [/INST] ha je{END}"
    assert tok.bos not in ids and chat.stop_ids(tok) == [tok.eos]
    prompt, _ = chat.encode(tok, CHAT[1:2], prompt=True)
    assert ids[: len(prompt)] == prompt and not any(said[: len(prompt)])


def test_symbols_in_front_of_an_answer_are_trained_and_do_not_end_it(tok):
    tok = with_template(tok, HARMONY)
    assert trained(tok, CHAT[1:3]) == f"[INST]final{TAIL}di fo.{TURN}"
    assert set(chat.stop_ids(tok)) == {tok.eos, tok.special(TURN)}


def test_marked_and_unmarked_templates_train_the_same(tok):
    marked = LLAMA.replace(
        "{{ m.content | trim }}<|eot_id|>",
        "{%- if m.role == 'assistant' -%}{% generation %}X{% endgeneration %}{% else %}X{% endif %}",
    )
    marked = marked.replace("<|end_header_id|>\n\n{%- if", "<|end_header_id|>{{ '\\n\\n' }}{%- if").replace(
        "X", "{{ m.content | trim }}<|eot_id|>"
    )
    assert chat.encode(with_template(tok, marked), CHAT) == chat.encode(with_template(tok, LLAMA), CHAT)


@given(TEXTS, TEXTS, TEXTS)
def test_no_message_adds_a_special_token(tok, question, answer, role):
    messages = [{"role": f"u{role}", "content": question}, {"role": "assistant", "content": f"a{answer}"}]
    ids, _ = chat.encode(tok, messages)
    assert [i for i in spelled(tok, ids) if i in tok.specials] == [HEAD, TAIL, TURN] * 2


@given(TEXTS, TEXTS, TEXTS)
def test_text_of_messages_survives_also_under_other_keys(tok, question, answer, name):
    question, answer, name = (
        text.replace("\u2581", "_").translate(dict.fromkeys(map(ord, "\ufdd0\ufdd1\ufdd2")))
        for text in (question, answer, name)
    )
    tok = with_template(tok, PLAIN)
    messages = [
        {"role": "user", "content": question, "name": name},
        {"role": "assistant", "content": answer, "name": name},
    ]
    ids, _ = chat.encode(tok, messages)
    assert tok.decode(ids) == f"user {name}{question}assistant {name}{answer}"
    assert [i for i in spelled(tok, ids) if i in tok.specials] == [HEAD, TAIL, TURN] * 2


def test_a_template_that_forgets_earlier_turns_is_refused(tok):
    forgets = LLAMA.replace("{% for m in messages %}", "{% for m in messages[-2:] %}")
    with pytest.raises(UsageError, match="put {% generation %} and {% endgeneration %} around"):
        chat.encode(with_template(tok, forgets), CHAT)


BAD = {"{{ raise_exception('roles must alternate') }}": "refuses a conversation: roles must alternate"}
BAD |= {"{{ raise_exception('one\n\ntwo') }}": "refuses a conversation: one two"}
BAD |= {"{{ '{0.__class__.__mro__}'.format('') }}": "is unsafe", "{{ strftime_now.__self__.now() }}": "is unsafe"}
BAD |= {"{% for %}": "refuses", "{{ a.b.c }}": "'a' is undefined", "{{ messages[99].content }}": "refuses"}
BAD |= {"{{ ''.__class__.__mro__[1].__subclasses__() }}": "refuses", "{{ messages.append(1) }}": "refuses"}


@pytest.mark.parametrize("template", BAD)
def test_a_template_that_fails_is_one_line(tok, template):
    with pytest.raises(UsageError, match="^the chat template ") as e:
        chat.encode(with_template(tok, template), CHAT)
    assert BAD[template] in str(e.value) and "\n" not in str(e.value)


def test_templates_see_a_fixed_date_and_plain_json(tok):
    template = "{{ strftime_now('%d %b %Y') }} {{ messages | tojson }}{{ messages[1].name }}"
    text = chat.render(
        with_template(tok, template), [CHAT[0], {"role": "user", "content": "<b>\u00e9</b>", "name": END}], True
    )
    assert text.startswith('26 Jul 2024 [{"') and "<b>\u00e9</b>" in text and END not in text
    assert END in text.replace(chat.BREAK, "")
