"""Turns a raw record (a JSON object, a row of a table) into a document, or raises BadRecord with the reason.

docs/custom_dataset.md lists the shapes. A text or messages key may be a path, as in `meta.body`. A null value counts as
a missing key, because a table has every column in every row.
"""

from collections.abc import Iterable

from lowrank_jax.data.blocks import BadRecord, Document

PAIRS = [("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("instruction", "response")]
PAIRS += [("question", "answer"), ("question", "response")]
SYSTEM, INPUT = ("system", "system_prompt"), ("input", "context")  # optional keys beside a pair
# Every key that a record may need besides the text key and the messages key
KEYS = ("conversations", *dict.fromkeys(key for pair in PAIRS for key in pair), *SYSTEM, *INPUT)
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}
SHOWN_KEYS, SHOWN_LETTERS = 8, 30


def document(record, text_key: str, messages_key: str, chats: bool, where: str, names: Iterable[str] = ()) -> Document:
    """Return a record's document: with `chats`, prefer a conversation of any shape, and else the text, to a pair.

    `names` are the keys of a record of which only some were read. Raises BadRecord.
    """
    try:
        if not isinstance(record, dict):
            raise ValueError(f"a record must be an object, not {_kind(record)}")
        messages, text = _get(record, messages_key), _get(record, text_key)
        if messages is not None:
            return _conversation(_messages(messages, repr(messages_key)), repr(messages_key))
        if (text is None or chats) and (conversation := _shape(record)) is not None:
            return conversation
        if text is None:
            raise ValueError(f"neither {messages_key!r} nor {text_key!r} in it{_listed(names or record)}")
        return {"text": _text(text, repr(text_key))}
    except ValueError as e:
        raise BadRecord(where, str(e)) from None


def roots(text_key: str, messages_key: str) -> set[str]:
    """Return the top-level keys that `document` may read."""
    return {part for key in (text_key, messages_key) for part in (key, key.split(".")[0])} | set(KEYS)


def _shape(record: dict) -> Document | None:
    """Return a conversation that is not under the messages key."""
    if record.get("conversations") is not None:
        return _conversation(_messages(record["conversations"], "'conversations'"), "'conversations'")
    for prompt_key, answer_key in PAIRS:
        prompt, answer = record.get(prompt_key), record.get(answer_key)
        if prompt is not None and answer is not None:
            system = next((record[key] for key in SYSTEM if record.get(key)), None)
            turns = [] if system is None else [{"role": "system", "content": _text(system, "'system'")}]
            if isinstance(prompt, str | bytes) and prompt_key == "instruction":
                more = [_text(record[key], repr(key)) for key in INPUT if record.get(key)]
                prompt = "\n\n".join([_text(prompt, repr(prompt_key)), *(text for text in more if text.strip())])
            turns += _side(prompt, "user", repr(prompt_key)) + _side(answer, "assistant", repr(answer_key))
            return _conversation(turns, repr(answer_key))
    return None


def _side(value, role: str, key: str) -> list[dict]:
    """Return the messages of half a pair, which is a text or messages."""
    return [{"role": role, "content": _text(value, key)}] if isinstance(value, str | bytes) else _messages(value, key)


def _conversation(messages: list[dict], key: str) -> Document:
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        raise ValueError(f"{key} has no assistant turn that says something, so there is nothing to learn from it")
    return {"messages": messages}


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
    who, what = ("from", "value") if turn.get("role") is None and turn.get("from") is not None else ("role", "content")
    role, content = turn.get(who), turn.get(what)
    if role is None or content is None:
        raise ValueError(f"{key} must have a {who!r} and a {what!r}{_listed(k for k in turn if turn[k] is not None)}")
    role = _text(role, f"{key}.{who}")
    if (parts := _list(content)) is not None:
        content = "".join(_part(part, f"{key}.{what}") for part in parts)
    extra = {k: _text(v, f"{key}.{k}") for k, v in turn.items() if k not in (who, what) and isinstance(v, str)}
    return extra | {"role": ROLES.get(role, role), "content": _text(content, f"{key}.{what}")}


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
