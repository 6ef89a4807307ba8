"""Turns a raw record (a JSON object, a row of a table) into a document, or raises BadRecord with the reason.

docs/custom_dataset.md lists the shapes. A text or messages key may be a path, as in `meta.body`. A null value counts as
a missing key, because a table has every column in every row.
"""

import contextlib
import json
from collections.abc import Iterable

from lowrank_jax.data.blocks import BadRecord, Document

PAIRS = [("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("instruction", "response")]
PAIRS += [("question", "answer"), ("question", "response")]
SYSTEM, INPUT, HISTORY = ("system", "system_prompt"), ("input", "context"), "history"  # optional keys beside a pair
TOOLS = ("tools", "functions")
# Every key that a record may need besides the text key and the messages key
KEYS = ("conversations", *dict.fromkeys(key for pair in PAIRS for key in pair), *SYSTEM, *INPUT, HISTORY, *TOOLS)
ROLES = {role: role for role in ("user", "assistant", "system", "tool")}
ROLES |= dict.fromkeys(("human", "prompter"), "user") | {"developer": "system", "system_prompt": "system"}
ROLES |= dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "claude", "model", "bot", "chatbot", "ai"), "assistant")
ROLES |= dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool")
CALLERS = ("function_call", "tool_call")  # roles of an assistant whose text is a call
REASONING = ("reasoning_content", "thinking", "reasoning")
TRAINED = ("weight", "train", "loss")  # OpenAI's, axolotl's and swift's keys of a turn: 0 or false is not trained
SHOWN_KEYS, SHOWN_LETTERS = 8, 30


def document(record, text_key: str, messages_key: str, chats: bool, where: str, names: Iterable[str] = ()) -> Document:
    """Return a record's document: with `chats`, prefer a conversation of any shape, and else the text, to a pair.

    `names` are the keys of a record of which only some were read. Raises BadRecord.
    """
    try:
        if not isinstance(record, dict):
            raise ValueError(f"a record must be an object, not {_kind(record)}")
        messages, text, names = _get(record, messages_key), _get(record, text_key), list(names or record)
        if messages is not None:
            shape = _messages(messages, repr(messages_key)), repr(messages_key), {messages_key}
        else:
            shape = _shape(record) if text is None or chats else None
        if shape is not None:
            roots = {key.split(".")[0] for key in (text_key, messages_key)}  # a text is the conversation's other form
            return _conversation(*shape, record, [n for n in names if n not in {text_key, *roots}])
        if text is None:
            raise ValueError(f"neither {messages_key!r} nor {text_key!r} in it{_listed(names)}")
        return {"text": _text(text, repr(text_key))}
    except ValueError as e:
        raise BadRecord(where, str(e)) from None
    except RecursionError:
        raise BadRecord(where, "its values are nested too deeply") from None


def roots(text_key: str, messages_key: str) -> set[str]:
    """Return the top-level keys that `document` may read."""
    return {part for key in (text_key, messages_key) for part in (key, key.split(".")[0])} | set(KEYS)


def _shape(record: dict) -> tuple[list[dict], str, set[str]] | None:
    """Return (messages, key, the keys that they come from) of a conversation that is not under the messages key."""
    if record.get("conversations") is not None:
        return _messages(record["conversations"], "'conversations'"), "'conversations'", {"conversations"}
    for prompt_key, answer_key in PAIRS:
        prompt, answer = record.get(prompt_key), record.get(answer_key)
        if prompt is not None and answer is not None:
            used = {prompt_key, answer_key, HISTORY}
            if isinstance(prompt, str | bytes):
                more = [_joined(record[key], repr(key)) for key in INPUT if not _is_empty(record.get(key))]
                prompt = "\n\n".join([_text(prompt, repr(prompt_key)), *(text for text in more if text.strip())])
                used |= set(INPUT)
            turns = _history(record.get(HISTORY)) + _side(prompt, "user", repr(prompt_key))
            return turns + _side(answer, "assistant", repr(answer_key)), repr(answer_key), used
    return None


def _history(value) -> list[dict]:
    """Return the earlier turns of a pair: a list of [question, answer], or messages."""
    earlier, turns = [] if _is_empty(value) else _list(value), []
    if earlier is None:
        raise ValueError(f"'history' must be a list of [question, answer], not {_kind(value)}")
    if any(isinstance(turn, dict) for turn in earlier):
        return _messages(earlier, "'history'")
    for i, pair in enumerate(earlier):
        if len(sides := _list(pair) or ()) != 2:
            raise ValueError(f"'history'[{i}] must be [question, answer]")
        texts = [_text(side, f"'history'[{i}][{k}]") for k, side in enumerate(sides)]
        turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts)]
    return turns


def _side(value, role: str, key: str) -> list[dict]:
    """Return the messages of half a pair, which is a text or messages."""
    return [{"role": role, "content": _text(value, key)}] if isinstance(value, str | bytes) else _messages(value, key)


def _conversation(messages: list[dict], key: str, used: set[str], record: dict, names: list[str]) -> Document:
    """Return a document of messages, its `tools`, and `unused`: the names of the keys that nothing came from."""
    spoken = [m for m in messages if m["role"] == "assistant" and (m["content"].strip() or m.get("tool_calls"))]
    if not spoken:
        raise ValueError(f"{key} has no assistant turn that says something, so there is nothing to learn from it")
    if all(m.get("weight") == 0 for m in spoken):
        raise ValueError(f"every assistant turn of {key} has weight 0, so there is nothing to learn from it")
    if name := next((name for name in SYSTEM if record.get(name)), None):
        first, used = _joined(record[name], repr(name)), used | {name}
        if messages[0]["role"] == "system":
            text, messages = messages[0]["content"], messages[1:]
            first = text if first in text else f"{first}\n\n{text}"
        messages = [{"role": "system", "content": first}, *messages]
    result = {"messages": messages}
    if name := next((name for name in TOOLS if not _is_empty(record.get(name))), None):
        result["tools"], used = _tools(record[name], repr(name)), used | {name}
    unused = [n for n in names if n not in used and not (n in record and _is_empty(record[n]))]
    return result | ({"unused": unused} if unused else {})


def _messages(value, key: str) -> list[dict]:
    """Return messages from a list of dicts or, as `datasets` and TFDS give it, a dict of lists."""
    if isinstance(value, dict):
        columns = {name: _list(column) for name, column in value.items()}
        if not columns or None in columns.values() or len({len(c) for c in columns.values()}) > 1:
            raise ValueError(f"{key} must be a list of messages{_listed(value)}")
        value = [dict(zip(columns, turn)) for turn in zip(*columns.values())]
    turns = _list(value)
    if not turns:
        reason = "is empty" if turns == [] else f"must be a list of messages, not {_kind(value)}"
        raise ValueError(f"{key} {reason}")
    return [_message(turn, f"{key}[{i}]") for i, turn in enumerate(turns)]


def _message(turn, key: str) -> dict:
    if not isinstance(turn, dict):
        raise ValueError(f"{key} must be an object with a 'role' and a 'content', not {_kind(turn)}")
    turn = {k: v for k, v in turn.items() if v is not None}
    role, content = turn.get("role"), turn.get("content")
    if len(turn) == 2 and isinstance(role, str) and role in ROLES and isinstance(content, str):  # most turns
        return {"role": ROLES[role], "content": _text(content, key)}
    who, what = ("from", "value") if "role" not in turn and "from" in turn else ("role", "content")
    calls = next((turn[k] for k in ("tool_calls", "function_call") if not _is_empty(turn.get(k))), None)
    if who not in turn or not (what in turn or calls):
        raise ValueError(f"{key} must have a {who!r} and a {what!r}{_listed(turn)}")
    role, content = _text(turn[who], f"{key}.{who}"), turn.get(what, "")
    if (parts := _list(content)) is not None:
        content = "".join(_part(part, f"{key}.{what}") for part in parts)
    content, named = _text(content, f"{key}.{what}"), role.strip().lower()
    taken = {who, what, "tool_calls", "function_call", *TRAINED, *REASONING}
    message = {k: _plain(v, f"{key}.{k}") for k, v in turn.items() if k not in taken}
    message |= {"role": "assistant" if named in CALLERS else ROLES.get(named, role), "content": content}
    if calls:
        message["tool_calls"] = _calls(calls, f"{key}.tool_calls")
    elif named in CALLERS:
        with contextlib.suppress(ValueError):  # text of another form stays text
            message["function_call"] = _calls(content, key)
    if reasoning := next((turn[k] for k in REASONING if turn.get(k)), None):
        message["reasoning_content"] = _text(reasoning, f"{key}.reasoning_content")
    flags = [turn[k] for k in TRAINED if k in turn]
    if wrong := [k for k in TRAINED if k in turn and turn[k] not in (0, 1)]:
        raise ValueError(f"{key}.{wrong[0]} must be 0 or 1, not {str(turn[wrong[0]])[:SHOWN_LETTERS]!r}")
    return message | ({"weight": 0} if 0 in flags else {})


def _calls(value, key: str) -> list[dict]:
    """Return calls of tools as `{"type": "function", "function": {"name": ..., "arguments": ...}}`."""
    calls = _parsed(_plain(value, key))
    calls = [calls] if isinstance(calls, dict) else calls
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{key} must be a list of calls with a 'name' and 'arguments'")
    wrapped = [call if "function" in call else {"function": call} for call in calls]
    texts = [call["function"].get("arguments", {}) for call in wrapped]
    arguments = [parsed if isinstance(parsed := _parsed(text), dict) else text for text in texts]
    return [
        {"type": "function", **call, "function": call["function"] | {"arguments": argument}}
        for call, argument in zip(wrapped, arguments)
    ]


def _tools(value, key: str) -> list[dict]:
    """Return descriptions of tools as `{"type": "function", "function": {"name": ...}}`, from JSON or its text."""
    tools = _parsed(_plain(value, key))
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{key} must be a list of tools")
    return [{"type": "function", "function": tool} if "name" in tool else tool for tool in tools]


def _parsed(value):
    """Return the value of a JSON text, and anything else as it is."""
    with contextlib.suppress(ValueError):
        return json.loads(value) if isinstance(value, str) else value
    return value


def _plain(value, key: str):
    """Return JSON values without nulls: a table gives every object every key."""
    if (parts := _list(value)) is not None:
        return [_plain(part, key) for part in parts]
    if isinstance(value, dict):
        return {_text(k, key): _plain(v, f"{key}.{k}") for k, v in value.items() if v is not None}
    if isinstance(value, str | bytes):
        return _text(value, key)
    value = value.item() if hasattr(value, "item") else value
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def _joined(value, key: str) -> str:
    """Return a text, or the paragraphs of a list of texts."""
    parts = _list(value)
    return _text(value, key) if parts is None else "\n\n".join(_text(part, key) for part in parts)


def _is_empty(value) -> bool:
    return value is None or (hasattr(value, "__len__") and not len(value))


def _part(part, key: str) -> str:
    if not isinstance(part, dict) or part.get("text") is None or part.get("type", "text") not in ("text", b"text"):
        raise ValueError(f"{key} has a part that is not text")
    return _text(part["text"], key)


def _list(value) -> list | None:
    """Return a list, a tuple or an array of at least one dimension as a list, and None for anything else."""
    if hasattr(value, "tolist") and getattr(value, "ndim", 0):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple) else None


def _get(record: dict, key: str):
    """Return the value of the key, or else of the path a.b.c, or else None."""
    if key in record:
        return record[key]
    for part in key.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record


def _text(value, key: str) -> str:
    """Return text, with a question mark for half of a surrogate pair, which JSON can escape and UTF-8 cannot encode."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as e:
            raise ValueError(f"{key} is not UTF-8 text at byte {e.start}") from None
    if not isinstance(value, str):
        raise ValueError(f"{key} must be text, not {_kind(value)}")
    return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")


def _kind(value) -> str:
    return "null" if value is None else type(value).__name__


def _listed(names: Iterable) -> str:
    names = [str(name) for name in names]
    shown = [name if len(name) <= SHOWN_LETTERS else name[:SHOWN_LETTERS] + "..." for name in names[:SHOWN_KEYS]]
    more = f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
    return f"; it has {', '.join(shown)}{more}" if names else "; it has no keys"
