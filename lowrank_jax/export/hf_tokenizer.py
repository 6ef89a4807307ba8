"""Tokenizer files for transformers: tokenizer.json, tokenizer_config.json and the chat template."""

import json
import pathlib
import re

from lowrank_jax.config import UsageError
from lowrank_jax.data import chat
from lowrank_jax.data.tokenizer import CONFIG_FILE, JSON_FILE, SPACE_MARK, TEMPLATE_FILE, SentencePiece, Tokenizer

BPE = pathlib.Path(__file__).parent / "cards" / "tokenizer.json"  # without its pieces

# Goes before a template that takes text alone: clients of the OpenAI API also send lists of parts.
PARTS_TO_TEXT = """\
{%- set read = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message.content is defined and message.content is iterable and message.content is not string -%}
{%- if message.content | rejectattr('type', 'equalto', 'text') | list -%}
{{- raise_exception('this model reads parts of type text alone') -}}
{%- endif -%}
{%- set message = dict(message, content=message.content | map(attribute='text') | join) -%}
{%- endif -%}
{%- set read.messages = read.messages + [message] -%}
{%- endfor -%}
{%- set messages = read.messages %}"""


def files(tokenizer: Tokenizer, longest: int) -> dict[str, str]:
    """Return contents by file name; raises UsageError for a SentencePiece model that tokenizer.json cannot describe.

    Every text gets a BOS in front, as documents have in training. In transformers, a text that contains the name of a
    control symbol gets that symbol's id, unless `split_special_tokens=True`: the template needs its tags found by name.
    """
    model = _from_pieces(pieces(tokenizer)) if isinstance(tokenizer, SentencePiece) else json.loads(tokenizer.json)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": longest, "padding_side": "right"}
    config |= {"clean_up_tokenization_spaces": False, **tokenizer.names}
    config.setdefault("pad_token", tokenizer.names["eos_token"])
    described = {JSON_FILE: model | {"post_processor": _bos_in_front(tokenizer)}, CONFIG_FILE: config}
    texts = {name: json.dumps(value, indent=1, ensure_ascii=False) for name, value in described.items()}
    return texts | {TEMPLATE_FILE: template(tokenizer)}


def template(tokenizer: Tokenizer) -> str:
    """Return the chat template for other programs: with a BOS in front if it has none, and taking parts of text."""
    text, user = tokenizer.chat_template, {"role": "user", "content": "a"}
    try:
        plain = chat.render(tokenizer, [user], True)
    except UsageError:  # the template does not take such a conversation
        return "{{ bos_token }}" + text
    bos = "" if plain.startswith(tokenizer.names["bos_token"]) else "{{ bos_token }}"
    return bos + ("" if _takes_parts(tokenizer, plain) else PARTS_TO_TEXT) + text


def _takes_parts(tokenizer: Tokenizer, plain: str) -> bool:
    try:
        parts = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
        return chat.render(tokenizer, parts, True) == plain
    except UsageError:
        return False


def without_generation(template: str) -> str:
    """Return the template with `{% if true %}` for `{% generation %}`, which few engines know; white space stays."""
    return re.sub(r"(\{%[-+]?\s*)(end)?generation\b", lambda m: m[1] + ("endif" if m[2] else "if true"), template)


def pieces(tokenizer: SentencePiece) -> list:
    """Return the pieces by id; raises UsageError unless the model is BPE and leaves the text as it is."""
    model = tokenizer.proto()
    rules = model.normalizer_spec
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise UsageError("this SentencePiece model is not BPE; only BPE models can be exported")
    if rules.precompiled_charsmap or rules.add_dummy_prefix or rules.remove_extra_whitespaces:
        raise UsageError("a SentencePiece model that changes the text (normalisation, dummy prefix) cannot be exported")
    return list(model.pieces)


def _bos_in_front(tokenizer: Tokenizer) -> dict:
    bos, text = tokenizer.names["bos_token"], lambda name, i: {"Sequence": {"id": name, "type_id": i}}
    special = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special, text("A", 0)],
        "pair": [special, text("A", 0), text("B", 1)],
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos], "tokens": [bos]}},
    }


def _from_pieces(pieces: list) -> dict:
    """Return a tokenizer.json that gives the ids of these SentencePiece pieces."""
    # Marks in the pieces become spaces, not spaces in a text marks: so a mark in a text stays three bytes.
    texts = [p.piece.replace(SPACE_MARK, " ") if p.type in (p.NORMAL, p.USER_DEFINED) else p.piece for p in pieces]
    exact = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    described = json.loads(BPE.read_text(encoding="utf-8"))
    described["added_tokens"] = [
        {"id": i, "content": text, **exact, "special": p.type != p.USER_DEFINED}
        for i, (text, p) in enumerate(zip(texts, pieces))
        if p.type in (p.CONTROL, p.UNKNOWN, p.USER_DEFINED)
    ]
    described["model"] |= {
        "unk_token": next(p.piece for p in pieces if p.type == p.UNKNOWN),
        "vocab": {text: i for i, text in enumerate(texts)},
        "merges": _merges({text: -p.score for text, p in zip(texts, pieces) if p.type == p.NORMAL}),
    }
    return described


def _merges(ranks: dict[str, float]) -> list[tuple[str, str]]:
    """Return the pairs that merge, by rank: every cut of a piece into two, as SentencePiece merges any neighbours."""
    pairs = [
        (rank, cut, whole[:cut], whole[cut:])
        for whole, rank in ranks.items()
        for cut in range(1, len(whole))
        if whole[:cut] in ranks and whole[cut:] in ranks
    ]
    return [pair[2:] for pair in sorted(pairs)]
