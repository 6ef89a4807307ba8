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
TRAINED = ("weight", "train", "training", "loss")  # keys of a turn: OpenAI's, axolotl's and swift's
FLAGS = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}  # what they mean, also as text: 0 is not trained
ARGUMENTS = ("arguments", "parameters", "args", "input")  # keys of a call
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
            names = [n for n in names if n not in {text_key, *roots}] + _beside(record, messages_key)
            return _conversation(*shape, record, names)
        if text is None:
            pairs = [key for pair in PAIRS for key in pair if any(record.get(k) is not None for k in pair)]
            keys = dict.fromkeys((messages_key, text_key, *pairs))
            if nulls := [repr(key) for key in keys if _is_null(record, key)]:
                raise ValueError(f"{' and '.join(nulls)} read{'s'[len(nulls) > 1 :]} null where text should be")
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
                parts = [_joined(record[key], repr(key)) for key in INPUT if not _is_empty(record.get(key))]
                parts = [_text(prompt, repr(prompt_key)), *parts]
                prompt = "\n\n".join(text for text in parts if text.strip())
                used |= set(INPUT)
            turns = _history(record.get(HISTORY)) + _side(prompt, "user", repr(prompt_key))
            return turns + _side(answer, "assistant", repr(answer_key)), repr(answer_key), used
    return None


def _history(value) -> list[dict]:
    """Return the earlier turns of a pair: a list of [question, answer], or messages."""
    earlier, turns = [] if _is_empty(value) else _list(_unfolded(value)), []
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
    if isinstance(value, str | bytes):
        return [{"role": role, "content": _text(value, key)}]
    if not isinstance(value, dict) and _list(value) is None:
        raise ValueError(f"{key} must be text or messages, not {_kind(value)}")
    return _messages(value, key)


def _conversation(messages: list[dict], key: str, used: set[str], record: dict, names: list[str]) -> Document:
    """Return a document of messages, its `tools`, and `unused`: the names of the keys that nothing came from."""
    answers = [m for m in messages if m["role"] == "assistant"]
    spoken = [m for m in answers if m["content"].strip() or m.get("tool_calls")]
    if not spoken:
        raise ValueError(f"{key} has no assistant turn that says something, so there is nothing to learn from it")
    if all(m.get("weight") == 0 for m in spoken):
        raise ValueError(f"every assistant turn of {key} has weight 0, so there is nothing to learn from it")
    if len(spoken) < len(answers):  # nobody should learn to answer with nothing
        messages = [m | {"weight": 0} if m["role"] == "assistant" and m not in spoken else m for m in messages]
    systems = {name: _joined(record[name], repr(name)) for name in SYSTEM if not _is_empty(record.get(name))}
    if name := next((name for name, text in systems.items() if text.strip()), None):
        messages, used = _with_system(systems[name], messages), used | {name}
    result = {"messages": messages}
    if name := next((name for name in TOOLS if not _is_empty(record.get(name))), None):
        result["tools"], used = _tools(record[name], repr(name)), used | {name}
    unused = [n for n in names if n not in used and not (n in record and _is_empty(record[n]))]
    return result | ({"unused": unused} if unused else {})


def _with_system(text: str, messages: list[dict]) -> list[dict]:
    """Return messages with a system turn of this text, joined with their own."""
    if messages[0]["role"] == "system":
        own, messages = messages[0]["content"], messages[1:]
        text = own if text in own else f"{text}\n\n{own}"
    return [{"role": "system", "content": text}, *messages]


def _messages(value, key: str) -> list[dict]:
    """Return messages from a list of dicts, its JSON text or, as `datasets` and TFDS give it, a dict of lists."""
    value = _unfolded(value)
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
    nulls, turn = [k for k, v in turn.items() if v is None], {k: v for k, v in turn.items() if v is not None}
    role, content = turn.get("role"), turn.get("content")
    if len(turn) == 2 and isinstance(role, str) and role in ROLES and isinstance(content, str):  # most turns
        return {"role": ROLES[role], "content": _text(content, key)}
    who = "from" if "role" not in turn and "from" in turn else "role"
    what = next((k for k in ("content", "value") if k in turn), "value" if who == "from" else "content")
    calls = next((turn[k] for k in ("tool_calls", "function_call") if not _is_empty(turn.get(k))), None)
    if who not in turn or not (what in turn or calls):
        if missing := next((k for k in (who, what) if k in nulls), None):
            raise ValueError(f"{key}.{missing} reads null where text should be")
        raise ValueError(f"{key} must have a {who!r} and a {what!r}{_listed(turn)}")
    role, named = _text(turn[who], f"{key}.{who}"), _text(turn[who], f"{key}.{who}").strip().lower()
    content, thoughts = _content(turn.get(what, ""), ROLES.get(named), f"{key}.{what}")
    taken = {who, what, "tool_calls", "function_call", *TRAINED, *REASONING}
    message = {k: _plain(v, f"{key}.{k}") for k, v in turn.items() if k not in taken}
    message |= {"role": "assistant" if named in CALLERS else ROLES.get(named, role), "content": content}
    if calls:
        message["tool_calls"] = _calls(calls, f"{key}.tool_calls")
    elif named in CALLERS:
        with contextlib.suppress(ValueError):  # text of another form stays text
            message["function_call"] = _calls(content, key)
    reasoning = next((turn[k] for k in REASONING if not _is_empty(turn.get(k))), thoughts)
    if not _is_empty(reasoning):
        message["reasoning_content"] = "".join(_content(reasoning, None, f"{key}.reasoning_content"))
    return message | ({"weight": 0} if _is_muted(turn, key) else {})


def _is_muted(turn: dict, key: str) -> bool:
    """Return whether a turn says that it is not trained."""
    flags = {k: FLAGS.get(str(turn[k]).strip().lower()) for k in TRAINED if k in turn}
    if wrong := [k for k, flag in flags.items() if flag is None]:
        raise ValueError(f"{key}.{wrong[0]} must be 0 or 1, not {str(turn[wrong[0]])[:SHOWN_LETTERS]!r}")
    return 0 in flags.values()


def _content(value, role: str | None, key: str) -> tuple[str, str]:
    """Return the text of a message and the reasoning in it: a text, a list of parts, or any value of a tool."""
    parts = _list(value)
    if role == "tool" and not isinstance(value, str | bytes) and not (parts and all(map(_part_text, parts))):
        return "" if parts == [] else json.dumps(_plain(value, key), ensure_ascii=False), ""
    if parts is None:
        return _text(value, key), ""
    texts, thoughts = [], []
    for part in parts:
        kind, text = _part_text(part) or (None, None)
        if text is None:
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            raise ValueError(f"{key} has a part that is not text{f', of type {kind!r}' if kind else ''}")
        (thoughts if kind in REASONING else texts).append(_text(text, key))
    return "".join(texts), "\n\n".join(thoughts)


def _part_text(part) -> tuple[str, str | bytes] | None:
    """Return the type and the text of a part of a message, or None for a part without text, such as an image."""
    if isinstance(part, str | bytes):
        return "text", part
    kind = part.get("type") or "text" if isinstance(part, dict) else None
    kind = kind.decode("utf-8", "replace") if isinstance(kind, bytes) else kind
    if kind not in ("text", "input_text", "output_text", *REASONING):
        return None
    text = next((part[k] for k in (kind, "text") if part.get(k) is not None), None)
    return None if text is None else (kind, text)


def _calls(value, key: str) -> list[dict]:
    """Return calls of tools as `{"type": "function", "function": {"name": ..., "arguments": ...}}`."""
    calls = _parsed(_plain(value, key))
    calls = [calls] if isinstance(calls, dict) else calls
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{key} must be a list of calls with a 'name' and 'arguments'")
    wrapped = [call if "function" in call else {"function": call} for call in calls]
    for call in wrapped:
        function = call["function"]
        text = next((function[name] for name in ARGUMENTS if function.get(name) and str(function[name]).strip()), {})
        argument = parsed if isinstance(parsed := _parsed(text), dict) else text
        rest = {name: value for name, value in function.items() if name not in ARGUMENTS}
        call["function"] = rest | {"arguments": argument}
    return [{"type": "function"} | call for call in wrapped]


def _tools(value, key: str) -> list[dict]:
    """Return descriptions of tools as `{"type": "function", "function": {"name": ...}}`, from JSON or its text."""
    tools = _parsed(_plain(value, key))
    tools = [tools] if isinstance(tools, dict) else tools
    tools = [_parsed(tool) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{key} must be a list of tools")
    return [{"type": "function", "function": tool} if "name" in tool else tool for tool in tools]


def _parsed(value):
    """Return the value of a JSON text, and anything else as it is."""
    with contextlib.suppress(ValueError):
        return json.loads(value) if isinstance(value, str) else value
    return value


def _unfolded(value):
    """Return the list that a JSON text of one holds, and anything else as it is."""
    parsed = _parsed(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    return parsed if isinstance(parsed, list) else value


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


def _is_null(record: dict, key: str) -> bool:
    """Return whether a key or a path a.b.c is in a record, and null."""
    *path, last = [key] if key in record else key.split(".")
    parent = _get(record, ".".join(path)) if path else record
    return isinstance(parent, dict) and last in parent and parent[last] is None


def _beside(record: dict, key: str) -> list[str]:
    """Return the paths of the keys beside those of a path a.b.c, below the first."""
    path, names = [] if key in record else key.split("."), []
    for i in range(1, len(path)):
        parent = _get(record, root := ".".join(path[:i]))
        if isinstance(parent, dict):
            names += [f"{root}.{name}" for name, v in parent.items() if name != path[i] and not _is_empty(v)]
    return names


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
