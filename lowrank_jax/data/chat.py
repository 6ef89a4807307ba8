"""Turns conversations into tokens: a Jinja template renders them, and `{% generation %}` marks the assistant's text.

The template runs in Jinja's immutable sandbox, with the meaning that Hugging Face gives it. A template without
`{% generation %}` is rendered turn by turn to find the assistant's text. Message text can never become a control
symbol: the names of symbols in it are split before rendering, and joined after the text is cut at the real symbols.
"""

import datetime
import functools
import json
import re

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lowrank_jax.config import UsageError
from lowrank_jax.data.blocks import one_line
from lowrank_jax.data.tokenizer import Tokenizer

# Unicode noncharacters are reserved for a program's own use; they are removed from message text.
OPEN, CLOSE, BREAK = "\ufdd0", "\ufdd1", "\ufdd2"
TODAY = datetime.datetime(2024, 7, 26)  # for templates: with the real date a resume would change the data
_HAS_GENERATION = re.compile(r"\{%-?\s*generation\b")


def encode(tokenizer: Tokenizer, messages: list[dict], prompt: bool = False) -> tuple[list[int], list[bool]]:
    """Return a conversation's ids without BOS, and for each id whether the assistant says it.

    A `prompt` ends where the assistant shall speak. Raises UsageError if the template refuses the conversation, or if
    the assistant says nothing in a conversation that is no prompt.
    """
    ids, said, speaking = [], [], False
    specials = set(tokenizer.specials.values())
    for part in _parts(tuple(tokenizer.specials)).split(render(tokenizer, messages, prompt)):
        if part in (OPEN, CLOSE):
            speaking = part == OPEN
        elif part in tokenizer.specials:
            ends = bool(ids) and said[-1] and ids[-1] not in specials  # the symbol that ends a turn carries weight
            ids.append(tokenizer.specials[part])
            said.append(speaking or ends)
        elif text := part.replace(BREAK, ""):
            new = tokenizer.encode(text)
            ids += new
            said += [speaking] * len(new)
    if not prompt and not any(said):
        raise UsageError("a conversation has no assistant turn, so there is nothing to learn from it")
    start = int(bool(ids) and ids[0] == tokenizer.bos)  # the caller adds BOS
    return ids[start:], said[start:]


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that end the assistant's turn: EOS, and the symbol that the chat template puts behind a turn."""
    exchange = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        ids, said = encode(tokenizer, exchange)
    except UsageError:  # the template refuses such an exchange
        return [tokenizer.eos]
    specials = set(tokenizer.specials.values())
    spoken = [i for i, speaks in zip(ids, said) if speaks]
    # Symbols before the answer, such as <|channel|>, describe it and do not end it.
    text = max((k for k, i in enumerate(spoken) if i not in specials and "b" in tokenizer.decode([i])), default=-1)
    return sorted({tokenizer.eos, *specials.intersection(spoken[text + 1 :])})


def render(tokenizer: Tokenizer, messages: list[dict], prompt: bool) -> str:
    """Return the template's text, with OPEN and CLOSE around the assistant's text and symbols in messages split."""
    specials = tuple(tokenizer.specials)
    safe = [{k: _guard(v, specials) if isinstance(v, str) else v for k, v in m.items()} for m in messages]
    if prompt or _HAS_GENERATION.search(tokenizer.chat_template):
        return _render(tokenizer, safe, prompt)
    return _mark_turns(tokenizer, safe)


def _mark_turns(tokenizer: Tokenizer, messages: list[dict]) -> str:
    """Mark each answer: it lies between the text without it and the text up to it, which must both begin the whole."""
    text, marked, done = _render(tokenizer, messages, False), "", 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = _render(tokenizer, messages[:i], True), _render(tokenizer, messages[: i + 1], False)
        if not (text.startswith(after) and after.startswith(before) and len(before) >= done):
            reason = "does not begin a conversation with the text of its first turns, which hides the assistant's text"
            raise UsageError(f"the chat template {reason}; put {{% generation %}} and {{% endgeneration %}} around it")
        *_, end = [m.end() for m in _parts(tuple(tokenizer.specials)).finditer(after, len(before))] or [len(after)]
        stop = len(after) if after[end:].strip() else end  # white space behind the symbol belongs to the next turn
        marked += text[done : len(before)] + OPEN + text[len(before) : stop] + CLOSE
        done = stop
    return marked + text[done:]


def _render(tokenizer: Tokenizer, messages: list[dict], prompt: bool) -> str:
    options = {"add_generation_prompt": prompt, "tools": None, "documents": None} | tokenizer.names
    try:
        return _compile(tokenizer.chat_template).render(messages=messages, **options)
    except Exception as e:  # a template is a program, which may raise anything
        raise UsageError(f"the chat template refuses a conversation: {one_line(e)}") from None


def _guard(text: str, specials: tuple[str, ...]) -> str:
    """Split every symbol's name in `text`, and its ends if they could form one with the template's text around them.

    Other ends stay as they are, because templates look at how a message begins, and trim it.
    """
    names, heads, tails = _guards(specials)
    text = names.sub(lambda m: m[0] + BREAK, re.sub(f"[{OPEN}{CLOSE}{BREAK}]", "", text))
    if (body := text.rstrip()).endswith(heads):
        text = body + BREAK + text[len(body) :]
    if (body := text.lstrip()).startswith(tails):
        text = text[: len(text) - len(body)] + BREAK + body
    return text


@functools.lru_cache
def _guards(specials: tuple[str, ...]) -> tuple[re.Pattern, tuple[str, ...], tuple[str, ...]]:
    """A pattern for the first letters of symbols' names, also overlapping ones, and the names' beginnings and ends."""
    names = re.compile(f"(?=(?:{_any_of(specials)})).", re.DOTALL)
    heads = {name[:n] for name in specials for n in range(1, len(name))}
    tails = {name[n:] for name in specials for n in range(1, len(name))}
    return names, tuple(heads), tuple(tails)


@functools.lru_cache
def _parts(specials: tuple[str, ...]) -> re.Pattern:
    return re.compile(f"({_any_of((*specials, OPEN, CLOSE))})")


def _any_of(texts: tuple[str, ...]) -> str:
    return "|".join(map(re.escape, sorted(filter(None, texts), key=len, reverse=True)))


class _Generation(Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        mark = lambda text: nodes.Output([nodes.TemplateData(text)], lineno=line)
        return [mark(OPEN), *parser.parse_statements(("name:endgeneration",), drop_needle=True), mark(CLOSE)]


@functools.lru_cache
def _compile(template: str) -> jinja2.Template:
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    env.filters["tojson"] = lambda value, **options: json.dumps(value, **({"ensure_ascii": False} | options))  # no HTML
    env.globals |= {"raise_exception": _refuse, "strftime_now": TODAY.strftime}
    return env.from_string(template)


def _refuse(reason: str):
    raise jinja2.TemplateError(str(reason))
