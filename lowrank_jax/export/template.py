"""The chat template as other programs need it."""

import re

from lowrank_jax.config import UsageError
from lowrank_jax.data import chat
from lowrank_jax.data.tokenizer import Tokenizer

_GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation\b")


def with_bos(tokenizer: Tokenizer) -> str:
    """The template with the token that begins a document in front: who tokenises its text adds nothing to it."""
    template, bos = tokenizer.chat_template, tokenizer.names["bos_token"]
    try:
        if chat.render(tokenizer, [{"role": "user", "content": "a"}], True).startswith(bos):
            return template
    except UsageError:  # it takes no such conversation
        pass
    return "{{ bos_token }}" + template


def plain(template: str) -> str:
    """Without `{% generation %}`, which few engines know; an `if true` leaves the white space around it the same."""
    return _GENERATION.sub(lambda m: m[1] + ("endif" if m[2] else "if true"), template)
