"""Turns conversations into tokens: a Jinja template renders them, and `{% generation %}` marks the assistant's text.

A template has the meaning that Hugging Face gives it, and runs in `template.render`. A template without
`{% generation %}` is rendered turn by turn to find the assistant's text. Message text can never become a control
symbol: the names of symbols in it are split before rendering, and joined after the text is cut at the real symbols.
"""

import contextlib
import functools
import itertools
import os.path
import re
from collections.abc import Callable

from lowrank_jax.config import UsageError
from lowrank_jax.data import template
from lowrank_jax.data.blocks import Document
from lowrank_jax.data.records import REASONING, ROLES
from lowrank_jax.data.template import BREAK, CLOSE, OPEN
from lowrank_jax.data.tokenizer import Tokenizer

KNOWN = {"role", "content", "weight", "function_call", "tool_call_id", "name"}  # names and ids may go with a call
HIDDEN = (
    "the chat template does not begin a conversation with the text of its first turns, which hides the assistant's "
    "text; put {% generation %} and {% endgeneration %} around it"
)
_MARKS = re.compile(f"[{OPEN}{CLOSE}{BREAK}]")
USER_TEXT, ANSWER_TEXT = "\ufdd3", "\ufdd4"  # noncharacters, which a template cannot write by itself


def encode(
    tokenizer: Tokenizer, messages: list[dict], prompt: bool = False, tools: list[dict] | None = None
) -> tuple[list[int], list[bool]]:
    """Return a conversation's ids without BOS, and for each id whether the assistant says it with weight.

    A `prompt` ends where the assistant shall speak. Raises UsageError if the template refuses the conversation, or if
    the assistant says nothing in a conversation that is no prompt.
    """
    ids, said, speaking, is_open = [], [], False, False  # open: the assistant's text has no end yet
    for part in _parts(tuple(tokenizer.specials)).split(render(tokenizer, messages, prompt, tools)):
        if part in (OPEN, CLOSE):
            speaking = part == OPEN
        elif part in tokenizer.specials:
            ids.append(tokenizer.specials[part])
            said.append(speaking or (is_open and said[-1]))  # the symbol that ends a turn carries weight
            is_open = False
        elif text := part.replace(BREAK, ""):
            new = tokenizer.encode(text)
            ids += new
            said += [speaking] * len(new)
            is_open = speaking and (is_open or not text.isspace())
    if not prompt and not any(said):
        raise UsageError("a conversation has no assistant turn, so there is nothing to learn from it")
    start = int(bool(ids) and ids[0] == tokenizer.bos)  # the caller adds BOS
    return ids[start:], said[start:]


def encode_document(tokenizer: Tokenizer, document: Document) -> tuple[list[int], list[bool], bool]:
    """Return `encode` of a document's messages, and whether the EOS that follows ends an answer.

    It does if the template puts no symbol behind the last answer, as where the next role's symbol ends a turn.
    """
    ids, said = encode(tokenizer, document["messages"], tools=document.get("tools"))
    return ids, said, said[-1] and ids[-1] not in tokenizer.specials.values()


def unused(tokenizer: Tokenizer, document: Document) -> set[str]:
    """Return the names of a conversation's keys that nothing is rendered from, and of its unknown roles."""
    words, names = template.words(tokenizer.chat_template), set(document.get("unused", ()))
    for message in document["messages"]:
        names |= {f"a turn's {key}" for key in message.keys() - KNOWN - words}
        if message["role"] not in ROLES:
            names.add(f"the role {message['role'][:30]!r}")
        if "reasoning_content" in message and words.intersection(REASONING):
            names.discard("a turn's reasoning_content")
    return names | ({"tools"} if document.get("tools") and "tools" not in words else set())


EXCHANGE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
# What may follow an answer; not every tokenizer has a symbol for the last two.
NEXT = [[], EXCHANGE, *([{"role": role, "content": "c"}] for role in ("user", "tool", "system"))]


def check(tokenizer: Tokenizer) -> None:
    """Raise UsageError unless answers alone are trained, and a symbol that ends each, so that a model learns to stop.

    Nothing is proved of a template that refuses an exchange of two turns, also behind a system turn.
    """
    _check_texts(tokenizer)
    for more in NEXT[:3]:
        if not all(behind for _, behind in _symbols(tokenizer, EXCHANGE + more)):
            reason = "puts no control symbol behind an answer, so a model could not learn to stop"
            remedy = "write {{ eos_token }} behind the assistant's content, inside {% generation %} if it has that"
            raise UsageError(f"the chat template {reason}; {remedy}")


def _check_texts(tokenizer: Tokenizer) -> None:
    """Raise UsageError if a template omits an answer's text, or marks the text of a user as the assistant's."""
    messages = [{"role": "user", "content": USER_TEXT}, {"role": "assistant", "content": ANSWER_TEXT}]
    for start in ([], [{"role": "system", "content": "c"}]):
        with contextlib.suppress(UsageError):
            text = render(tokenizer, [*start, *messages], False)
            spoken = "".join(span.split(CLOSE)[0] for span in text.split(OPEN)[1:])
            break
    else:
        return
    remedy = "put {% generation %} and {% endgeneration %} around the assistant's content, which is text"
    if ANSWER_TEXT not in text:
        raise UsageError(f"the chat template does not render the text of an answer; {remedy}")
    if USER_TEXT in spoken or ANSWER_TEXT not in spoken:
        raise UsageError(f"the chat template marks other text than the assistant's for training; {remedy}")


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that end the assistant's turn: EOS, and the symbols that the chat template puts behind a turn.

    A symbol that also ends the reasoning in front of an answer ends no turn.
    """
    ends = {i for more in NEXT for _, behind in _symbols(tokenizer, EXCHANGE + more) for i in behind}
    thinking = [EXCHANGE[0], EXCHANGE[1] | {"reasoning_content": "c"}]
    inside = {i for before, _ in _symbols(tokenizer, thinking) for i in before}
    return sorted({tokenizer.eos} | (ends - inside))


def _symbols(tokenizer: Tokenizer, messages: list[dict]) -> list[tuple[set[int], set[int]]]:
    """Return the trained symbols before and behind each answer "b"; no answer if the template refuses the messages."""
    try:
        ids, said, is_open = encode_document(tokenizer, {"messages": messages})
    except UsageError:
        start = {"role": "system", "content": "c"}  # some templates want one
        return [] if messages[0] == start else _symbols(tokenizer, [start, *messages])
    specials, answers = set(tokenizer.specials.values()), []
    for speaks, stretch in itertools.groupby(zip([*ids, tokenizer.eos], [*said, is_open]), lambda pair: pair[1]):
        spoken = [i for i, _ in stretch if speaks]
        if texts := [k for k, i in enumerate(spoken) if i not in specials and "b" in tokenizer.decode([i]).lower()]:
            answers.append((specials.intersection(spoken[: texts[-1]]), specials.intersection(spoken[texts[-1] :])))
    return answers


def render(tokenizer: Tokenizer, messages: list[dict], prompt: bool, tools: list[dict] | None = None) -> str:
    """Return the template's text, with OPEN and CLOSE around the assistant's text and symbols in messages split."""
    specials, words = tuple(tokenizer.specials), template.words(tokenizer.chat_template)
    safe = [_guard(_fit(message, words), specials) for message in messages]
    variables = {"tools": _guard(tools, specials) or None, "documents": None} | tokenizer.names

    def draw(part: list[dict], prompt: bool) -> str:
        return template.render(tokenizer.chat_template, part, variables | {"add_generation_prompt": prompt})

    if prompt:
        return draw(safe, True)
    muted = [m.get("weight") == 0 for m in messages if m["role"] == "assistant"]
    if OPEN not in template.words(tokenizer.chat_template):
        return _mark_turns(draw, safe, muted, specials)
    text = draw(safe, False)
    if any(muted):
        spans = text.split(OPEN)
        if len(spans) - 1 != len(muted):
            raise UsageError("the chat template does not mark one text for each answer, so weight 0 cannot be honoured")
        marks = ["" if is_muted else OPEN for is_muted in muted]
        text = spans[0] + "".join(mark + span for mark, span in zip(marks, spans[1:]))
    return text


def _fit(message: dict, words: frozenset[str]) -> dict:
    """Return a message with the keys that a template of these words reads; raises UsageError if it reads no calls."""
    calls, reasoning = message.get("function_call"), message.get("reasoning_content")
    fitted = {key: value for key, value in message.items() if key not in ("weight", "function_call")}
    if calls and "tool_calls" in words:
        fitted |= {"content": "", "tool_calls": calls}
    if fitted.get("tool_calls") and "tool_calls" not in words:
        raise UsageError("the chat template does not render tool_calls")
    return fitted | ({key: reasoning for key in REASONING if key in words} if reasoning else {})


def _mark_turns(draw: Callable, messages: list[dict], muted: list[bool], specials: tuple[str, ...]) -> str:
    """Render messages with a template that marks nothing, and mark the answers that carry weight."""
    text, marked, done, muted = draw(messages, False), "", 0, iter(muted)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            start, stop = _answer_span(draw, text, messages, i, _parts(specials))
            if start < done:
                raise UsageError(HIDDEN)
            marks = ("", "") if next(muted) else (OPEN, CLOSE)
            marked += text[done:start] + text[start:stop].join(marks)
            done = stop
    return marked + text[done:]


def _answer_span(draw: Callable, text: str, messages: list[dict], i: int, symbols: re.Pattern) -> tuple[int, int]:
    """Return where in the whole text the answer `messages[i]` starts and stops.

    It lies between the text without it and the text up to it, which must both begin the whole.
    """
    after = draw(messages[: i + 1], False)
    if is_last := not text.startswith(after):  # as the last, it may end in another symbol, or in one more
        after = after[: max([m.start() for m in symbols.finditer(after)], default=0)]
    before = _before(draw, messages, i, after)
    symbol_ends = [m.end() for m in symbols.finditer(after, len(before))]
    end = symbol_ends[-1] if symbol_ends else len(after)
    stop = len(after) if after[end:].strip() else end  # white space behind the symbol belongs to the next turn
    ends = not is_last or (symbol_ends and stop == end) or symbols.match(text, len(after))
    if not (text.startswith(after) and after.startswith(before) and ends):
        raise UsageError(HIDDEN)
    return len(before), stop


def _before(draw: Callable, messages: list[dict], i: int, after: str) -> str:
    """Return the text before the answer `messages[i]`, which should begin the text `after` it.

    Templates that read `messages[0]` cannot render the empty list before a first answer, or render too little. The text
    is then what two conversations have in common that differ in the answer alone.
    """
    try:
        before = draw(messages[:i], True)
    except UsageError:
        if i:
            raise
        before = None
    if i or (before is not None and after.startswith(before)):
        return before
    return os.path.commonprefix([draw([{"role": "assistant", "content": x}], False) for x in USER_TEXT + ANSWER_TEXT])


def _guard(value, specials: tuple[str, ...]):
    """Split the symbols' names in all texts of a JSON value."""
    if isinstance(value, str):
        return _guard_text(value, specials)
    if isinstance(value, dict):
        return {_guard_key(key, specials): _guard(part, specials) for key, part in value.items()}
    return [_guard(part, specials) for part in value] if isinstance(value, list) else value


@functools.lru_cache(1024)  # "role" and "content" come again and again
def _guard_key(key, specials: tuple[str, ...]):
    return _guard(key, specials)


def _guard_text(text: str, specials: tuple[str, ...]) -> str:
    """Split every symbol's name in `text`, and its ends if they could form one with the template's text around them.

    Other ends stay as they are, because templates look at how a message begins, and trim it.
    """
    names, heads, tails = _guards(specials)
    text = names.sub(lambda m: m[0] + BREAK, _MARKS.sub("", text))
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
