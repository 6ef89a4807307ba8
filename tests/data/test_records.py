"""Records: every shape becomes the same document, and whatever cannot is refused with the key and the reason."""

import numpy as np
import pytest

from lowrank_jax.data import records
from lowrank_jax.data.records import BadRecord

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
TALK = {"messages": [USER, ANSWER]}


def read(record, chats=True, text_key="text", messages_key="messages", names=None):
    return records.document(record, text_key, messages_key, chats, "here", names)


def refused(record, chats=True, **kwargs) -> str:
    with pytest.raises(BadRecord) as e:
        read(record, chats, **kwargs)
    assert e.value.where == "here" and str(e.value) == f"here: {e.value.reason}" and "\n" not in str(e.value)
    return e.value.reason


SHAPES = {
    "messages": {"messages": [USER, ANSWER]},
    "messages in a tuple": {"messages": (USER, ANSWER)},
    "messages in an array": {"messages": np.array([USER, ANSWER], object)},
    "dict of lists": {"messages": {"role": ["user", "assistant"], "content": ["Hi", "Ho"]}},
    "dict of arrays of bytes": {
        "messages": {"role": np.array([b"user", b"assistant"], object), "content": [b"Hi", b"Ho"]}
    },
    "parts": {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "H"}, {"text": "o"}]}]},
    "messages in ShareGPT's words": {"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
    "conversations": {"conversations": [{"from": "user", "value": "Hi"}, {"from": "model", "value": "Ho"}]},
    "conversations with roles": {"conversations": [USER, ANSWER]},
    "prompt, response": {"prompt": "Hi", "response": "Ho"},
    "prompt, completion": {"prompt": "Hi", "completion": "Ho"},
    "prompt, completion of messages": {"prompt": [USER], "completion": [ANSWER]},
    "prompt of messages": {"prompt": [USER], "response": "Ho"},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Ho"},
    "alpaca without input": {"instruction": "Hi", "input": None, "output": "Ho"},
    "question, answer": {"question": "Hi", "answer": "Ho"},
    "bytes": {"question": b"Hi", "answer": b"Ho"},
}


@pytest.mark.parametrize("record", SHAPES.values(), ids=SHAPES)
def test_every_shape_of_a_conversation_is_the_same_document(record):
    assert read(record) == TALK
    assert read(record, chats=False) == TALK
    nulls = dict.fromkeys(records.KEYS) | {"messages": None, "text": None}  # a table has every column in every row
    assert read(nulls | record) == TALK


def test_the_optional_keys_beside_a_pair_join_it():
    record = {"instruction": "Add.", "input": "1 and 2", "output": "3", "system": "You add."}
    system, user = {"role": "system", "content": "You add."}, {"role": "user", "content": "Add.\n\n1 and 2"}
    assert read(record) == {"messages": [system, user, {"role": "assistant", "content": "3"}]}


def test_messages_keep_their_other_fields_but_null():
    turn = {"role": "tool", "content": "4", "name": "sum", "cost": 3, "call": None}
    kept = read({"messages": [turn, ANSWER]})["messages"][0]
    assert kept == {"role": "tool", "content": "4", "name": "sum", "cost": 3}


def test_a_conversation_goes_before_the_text_in_sft_only():
    alpaca = {"instruction": "Hi", "output": "Ho", "text": "Hi Ho"}
    assert read(alpaca, chats=True) == TALK
    assert read(alpaca, chats=False) == {"text": "Hi Ho"}
    both = {"messages": [USER, ANSWER], "text": "Hi Ho"}
    assert read(both, chats=True) == read(both, chats=False) == TALK
    assert read({"text": "only"}, chats=True) == {"text": "only"}


def test_a_key_may_be_a_path_and_a_literal_key_wins():
    assert read({"meta": {"body": "path"}}, text_key="meta.body") == {"text": "path"}
    assert read({"meta": {"body": "path"}, "meta.body": "literal"}, text_key="meta.body") == {"text": "literal"}
    assert read({"a": {"b": {"c": [USER, ANSWER]}}}, messages_key="a.b.c") == TALK
    for record in ({"meta": "no object"}, {"meta": None}, {"meta": {"body": None}}, {"body": "x"}):
        assert "neither 'messages' nor 'meta.body' in it" in refused(record, text_key="meta.body")
    assert {"a", "a.b", "messages", "prompt"} <= records.roots("a.b", "messages")


def test_text_is_whole():
    assert read({"text": "a\ud800b\u00e9"}, chats=False) == {"text": "a?b\u00e9"}
    assert read({"text": "caf\u00e9".encode()}, chats=False) == {"text": "caf\u00e9"}
    assert refused({"text": b"caf\xe9"}, chats=False) == "'text' is not UTF-8 text at byte 3"
    assert read({"messages": [USER, {"role": "assistant", "content": "\udfff"}]})["messages"][1]["content"] == "?"


WRONG = {
    "list": ([], "a record must be an object, not list"),
    "null": (None, "a record must be an object, not null"),
    "text": ("hello", "a record must be an object, not str"),
    "empty": ({}, "neither 'messages' nor 'text' in it; it has no keys"),
    "other keys": ({"body": "x", "id": 1}, "neither 'messages' nor 'text' in it; it has body, id"),
    "number": ({"text": 3}, "'text' must be text, not int"),
    "no list": ({"messages": "Hi"}, "'messages' must be a list of messages, not str"),
    "number of messages": ({"messages": 3}, "'messages' must be a list of messages, not int"),
    "no turns": ({"messages": []}, "'messages' is empty"),
    "turn": ({"messages": ["Hi"]}, "'messages'[0] must be an object with a 'role' and a 'content', not str"),
    "no content": ({"messages": [{"role": "user"}]}, "'messages'[0] must have a 'role' and a 'content'; it has role"),
    "null content": ({"messages": [USER, {"role": "assistant", "content": None}]}, "'messages'[1] must have"),
    "role": ({"messages": [{"role": 1, "content": ""}]}, "'messages'[0].role must be text, not int"),
    "content": ({"messages": [{"role": "user", "content": 1}]}, "'messages'[0].content must be text, not int"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "has a part that is not text"),
    "silent": ({"messages": [USER]}, "'messages' has no assistant turn that says something"),
    "blank": ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "no assistant turn that says something"),
    "ragged": ({"messages": {"role": ["user"], "content": ["a", "b"]}}, "'messages' must be a list of messages"),
    "one message": ({"messages": USER}, "'messages' must be a list of messages; it has role, content"),
    "conversations": ({"conversations": []}, "'conversations' is empty"),
    "half a pair": ({"prompt": "Hi"}, "neither 'messages' nor 'text' in it; it has prompt"),
    "pair": ({"prompt": "Hi", "response": 1}, "'response' must be a list of messages, not int"),
    "mute pair": ({"prompt": "Hi", "response": ""}, "'response' has no assistant turn that says something"),
    "input": ({"instruction": "Hi", "input": 1, "output": "Ho"}, "'input' must be text, not int"),
}


@pytest.mark.parametrize("record, reason", WRONG.values(), ids=WRONG)
def test_unusable_records_are_refused_with_the_reason(record, reason):
    for chats in (True, False):
        assert reason in refused(record, chats)


def test_the_keys_of_a_record_are_listed_but_not_all_of_many():
    reason = refused({f"key{i}" + "x" * 100: 1 for i in range(20)})
    assert "key7" in reason and "key8" not in reason and reason.endswith("... and 12 more") and len(reason) < 400
    assert refused({}, names=["title", "body"]).endswith("; it has title, body")
