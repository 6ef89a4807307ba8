"""Conversations to tokens: a Jinja template renders, `{% generation %}` marks what the assistant says.

The template runs in Jinja's immutable sandbox with the meaning Hugging Face gives it. Message text can never become a
chat tag: inside it every tag is broken up before rendering and mended after the text has been cut at the real ones.
"""

import functools
import re

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lowrank_jax.config import UsageError
from lowrank_jax.data.tokenizer import BOS, EOS, TURN_END, TURN_START, Tokenizer

TAGS = (BOS, EOS, TURN_START, TURN_END)
# Unicode noncharacters, reserved for a program's own use: they are dropped from message text.
OPEN, CLOSE, BREAK = "\ufdd0", "\ufdd1", "\ufdd2"
_PARTS = re.compile("(" + "|".join(map(re.escape, (*TAGS, OPEN, CLOSE))) + ")")


def encode(tokenizer: Tokenizer, messages: list[dict], prompt: bool = False) -> tuple[list[int], list[bool]]:
    """Ids of a conversation and, for each, whether the assistant says it; with `prompt`, up to where it is to speak.

    Raises UsageError where the assistant says nothing, unless it is a prompt.
    """
    ids, said, speaking = [], [], False
    for part in _PARTS.split(render(tokenizer.chat_template, messages, prompt)):
        if part in (OPEN, CLOSE):
            speaking = part == OPEN
            continue
        new = [tokenizer.special(part)] if part in TAGS else tokenizer.encode(part.replace(BREAK, ""))
        ids += new
        said += [speaking] * len(new)
    if not prompt and not any(said):
        raise UsageError("a conversation has no assistant turn, so there is nothing to learn from it")
    return ids, said


def render(template: str, messages: list[dict], prompt: bool) -> str:
    """The template's text, with OPEN and CLOSE around what the assistant says and every tag in a message broken up."""
    safe = [{**m, "role": _guard(m["role"]), "content": _guard(m["content"])} for m in messages]
    return _compile(template).render(messages=safe, add_generation_prompt=prompt, bos_token=BOS, eos_token=EOS)


def _guard(text: str) -> str:
    text = re.sub(f"[{OPEN}{CLOSE}{BREAK}]", "", text)
    return text.replace("<", "<" + BREAK)  # every tag starts with <


class _Generation(Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        mark = lambda text: nodes.Output([nodes.TemplateData(text)], lineno=line)
        return [mark(OPEN), *parser.parse_statements(("name:endgeneration",), drop_needle=True), mark(CLOSE)]


@functools.lru_cache
def _compile(template: str) -> jinja2.Template:
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    return env.from_string(template)
