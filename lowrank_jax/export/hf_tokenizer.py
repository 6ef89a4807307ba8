"""The files from which transformers makes the same tokenizer: tokenizer.json, tokenizer_config.json, the template."""

import json
import os
import tempfile

from lowrank_jax.data.tokenizer import CONFIG_FILE, JSON_FILE, SPACE_MARK, TEMPLATE_FILE, SentencePiece, Tokenizer
from lowrank_jax.export import pieces, template
from lowrank_jax.export.pieces import CONTROL, NORMAL, UNKNOWN, USER, Piece


def files(tokenizer: Tokenizer, longest: int) -> dict[str, str]:
    """Contents by file name; raises UsageError for a SentencePiece model that tokenizer.json cannot describe.

    A text gets the BOS in front, as documents have it in training. Only `split_special_tokens=True` keeps a text that
    has the name of a control symbol in it from becoming one: transformers finds the template's tags by their names.
    """
    facts = _from_pieces(pieces.read(tokenizer.model)) if isinstance(tokenizer, SentencePiece) else _saved(tokenizer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        **tokenizer.names,
    }
    config.setdefault("pad_token", tokenizer.names["eos_token"])
    dump = lambda value: json.dumps(value, indent=1, ensure_ascii=False)
    return {
        JSON_FILE: dump(facts | {"post_processor": _bos_in_front(tokenizer)}),
        CONFIG_FILE: dump(config),
        TEMPLATE_FILE: template.with_bos(tokenizer),
    }


def _saved(tokenizer: Tokenizer) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        with open(os.path.join(folder, JSON_FILE), encoding="utf-8") as f:
            return json.load(f)


def _bos_in_front(tokenizer: Tokenizer) -> dict:
    bos, text = tokenizer.names["bos_token"], lambda name, i: {"Sequence": {"id": name, "type_id": i}}
    special = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special, text("A", 0)],
        "pair": [special, text("A", 0), text("B", 1)],
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos], "tokens": [bos]}},
    }


def _from_pieces(found: list[Piece]) -> dict:
    """A tokenizer.json that gives the ids of these SentencePiece pieces.

    The mark for a space becomes a space in the pieces, instead of the spaces a mark in the text as is usual: so a mark
    that stands in the text stays what it is, three bytes.
    """
    texts = [p.text if p.kind not in (NORMAL, USER) else p.text.replace(SPACE_MARK, " ") for p in found]
    added = [
        {
            "id": i,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": piece.kind != USER,
        }
        for i, (text, piece) in enumerate(zip(texts, found))
        if piece.kind in (CONTROL, UNKNOWN, USER)
    ]
    ranks = {text: -piece.score for text, piece in zip(texts, found) if piece.kind == NORMAL}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": next(text for text, piece in zip(texts, found) if piece.kind == UNKNOWN),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {text: i for i, text in enumerate(texts)},
        "merges": _merges(ranks),
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": model,
    }


def _merges(ranks: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs of pieces that merge, the first to merge first.

    SentencePiece merges whatever two neighbours make a piece, so every cut of a piece into two others is a pair.
    """
    pairs = [
        (rank, cut, whole[:cut], whole[cut:])
        for whole, rank in ranks.items()
        for cut in range(1, len(whole))
        if whole[:cut] in ranks and whole[cut:] in ranks
    ]
    return [pair[2:] for pair in sorted(pairs)]
