"""Conversations to tokens: a Jinja template renders, `{% generation %}` marks what the assistant says.

The template runs in Jinja's immutable sandbox with the meaning Hugging Face gives it. One without `{% generation %}` is
rendered turn by turn to find out what the assistant says. Message text can never become a control symbol: inside it
every symbol's name is broken up before rendering, and mended after the text has been cut at the real ones.
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
from lowrank_jax.data.tokenizer import Tokenizer

# Unicode noncharacters, reserved for a program's own use: they are dropped from message text.
OPEN, CLOSE, BREAK = "\ufdd0", "\ufdd1", "\ufdd2"
TODAY = datetime.datetime(2024, 7, 26)  # what templates are told: with the real date a resume would change the data
_HAS_GENERATION = re.compile(r"\{%-?\s*generation\b")


def encode(tokenizer: Tokenizer, messages: list[dict], prompt: bool = False) -> tuple[list[int], list[bool]]:
    """Ids of a conversation without a BOS in front, and for each whether the assistant says it.

    With `prompt`, up to where the assistant is to speak. Raises UsageError where the template does not take the
    conversation, or the assistant says nothing though it is no prompt.
    """
    ids, said, speaking = [], [], False
    specials = set(tokenizer.specials.values())
    for part in _parts(tuple(tokenizer.specials)).split(render(tokenizer, messages, prompt)):
        if part in (OPEN, CLOSE):
            speaking = part == OPEN
        elif part in tokenizer.specials:
            ends = bool(ids) and said[-1] and ids[-1] not in specials  # a symbol that ends a turn carries weight
            ids.append(tokenizer.specials[part])
            said.append(speaking or ends)
        elif text := part.replace(BREAK, ""):
            new = tokenizer.encode(text)
            ids += new
            said += [speaking] * len(new)
    if not prompt and not any(said):
        raise UsageError("a conversation has no assistant turn, so there is nothing to learn from it")
    start = int(bool(ids) and ids[0] == tokenizer.bos)  # whoever asks puts it in front
    return ids[start:], said[start:]


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids that end what the assistant says: EOS, and the symbol that the chat template puts behind a turn."""
    exchange = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        ids, said = encode(tokenizer, exchange)
    except UsageError:  # a template that takes no such exchange
        return [tokenizer.eos]
    specials = set(tokenizer.specials.values())
    spoken = [i for i, speaks in zip(ids, said) if speaks]
    # The symbols before the answer say how it is meant, as <|channel|> does: they do not end it.
    text = max((k for k, i in enumerate(spoken) if i not in specials and "b" in tokenizer.decode([i])), default=-1)
    return sorted({tokenizer.eos, *specials.intersection(spoken[text + 1 :])})


def render(tokenizer: Tokenizer, messages: list[dict], prompt: bool) -> str:
    """The template's text, with OPEN and CLOSE around what the assistant says and symbols in messages broken up."""
    specials = tuple(tokenizer.specials)
    safe = [{k: _guard(v, specials) if isinstance(v, str) else v for k, v in m.items()} for m in messages]
    if prompt or _HAS_GENERATION.search(tokenizer.chat_template):
        return _render(tokenizer, safe, prompt)
    return _mark_turns(tokenizer, safe)


def _mark_turns(tokenizer: Tokenizer, messages: list[dict]) -> str:
    """Finds each answer between the text before it and the text up to it, which must both begin the whole text."""
    text, marked, done = _render(tokenizer, messages, False), "", 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = _render(tokenizer, messages[:i], True), _render(tokenizer, messages[: i + 1], False)
        if not (text.startswith(after) and after.startswith(before) and len(before) >= done):
            raise UsageError(
                "the chat template does not begin a conversation with the text of its first turns, so it does not tell "
                "what the assistant says; put {% generation %} and {% endgeneration %} around that"
            )
        *_, end = [m.end() for m in _parts(tuple(tokenizer.specials)).finditer(after, len(before))] or [len(after)]
        stop = len(after) if after[end:].strip() else end  # white space behind the symbol belongs to the next turn
        marked += text[done : len(before)] + OPEN + text[len(before) : stop] + CLOSE
        done = stop
    return marked + text[done:]


def _render(tokenizer: Tokenizer, messages: list[dict], prompt: bool) -> str:
    try:
        return _compile(tokenizer.chat_template).render(
            messages=messages, add_generation_prompt=prompt, tools=None, documents=None, **tokenizer.names
        )
    except UsageError:
        raise
    except Exception as e:  # a template is a program: anything may go wrong in it
        raise UsageError(f"the chat template does not take a conversation: {' '.join(str(e).split())[:200]}") from None


def _guard(text: str, specials: tuple[str, ...]) -> str:
    """`text` with every symbol's name in it broken up, and one that it might complete with the template around it.

    The latter only where there is one to complete: templates look at how a message begins, and trim it.
    """
    names, heads, tails = _guards(specials)
    text = names.sub(lambda m: m[0] + BREAK, re.sub(f"[{OPEN}{CLOSE}{BREAK}]", "", text))
    longest = max(map(len, specials), default=0)
    if any(text.rstrip()[-n:] in heads for n in range(1, longest)):
        body = text.rstrip()
        text = body + BREAK + text[len(body) :]
    if any(text.lstrip()[:n] in tails for n in range(1, longest)):
        body = text.lstrip()
        text = text[: len(text) - len(body)] + BREAK + body
    return text


@functools.lru_cache
def _guards(specials: tuple[str, ...]) -> tuple[re.Pattern, frozenset, frozenset]:
    """What matches the first character of a symbol's name, also of overlapping ones; the names' beginnings and ends."""
    names = re.compile(f"(?=(?:{_any_of(specials)})).", re.DOTALL)
    heads = frozenset(name[:n] for name in specials for n in range(1, len(name)))
    tails = frozenset(name[n:] for name in specials for n in range(1, len(name)))
    return names, heads, tails


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
    raise UsageError(f"the chat template refuses a conversation: {' '.join(str(reason).split())[:200]}")
