"""Records: every shape becomes the same document, and whatever cannot is refused with the key and the reason."""

import functools
import json

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
    "words of both": {"messages": [{"role": "user", "value": "Hi"}, {"from": "gpt", "content": "Ho"}]},
    "JSON in text": {"messages": json.dumps([USER, ANSWER])},
    "OpenAI's other parts": {
        "messages": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "H"}, "o"]},
        ]
    },
    "only an input": {"instruction": " ", "input": "Hi", "output": "Ho", "system": "\n"},
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
    nothing = {"unused": ["system"]} if record.get("system") else {}
    assert read(record) == read(record, chats=False) == TALK | nothing
    nulls = dict.fromkeys(records.KEYS) | {"messages": None, "text": None}  # a table has every column in every row
    assert read(nulls | record) == TALK | nothing


def test_the_optional_keys_beside_a_pair_join_it():
    record = {"instruction": "Add.", "input": "1 and 2", "output": "3", "system": "You add."}
    system, user = {"role": "system", "content": "You add."}, {"role": "user", "content": "Add.\n\n1 and 2"}
    assert read(record) == {"messages": [system, user, {"role": "assistant", "content": "3"}]}


SYSTEM = {"role": "system", "content": "Be kind."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
EARLIER = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
KEYS_BESIDE = {
    "system and conversations": {"system": "Be kind.", "conversations": [USER, ANSWER]},
    "system and messages": {"system": "Be kind.", "messages": [USER, ANSWER]},
    "system_prompt": {"system_prompt": "Be kind.", "messages": [USER, ANSWER]},
    "system of a pair": {"prompt": "Hi", "response": "Ho", "system": "Be kind."},
    "system twice": {"system": "Be kind.", "messages": [SYSTEM, USER, ANSWER]},
    "a system turn by another name": {"conversations": [{"from": "System", "value": "Be kind."}, USER, ANSWER]},
}


@pytest.mark.parametrize("record", KEYS_BESIDE.values(), ids=KEYS_BESIDE)
def test_a_system_prompt_beside_the_messages_is_their_first_turn(record):
    assert read(record) == {"messages": [SYSTEM, USER, ANSWER]}


def test_a_second_system_prompt_follows_the_first():
    record = {"system": "Be kind.", "messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER]}
    assert read(record)["messages"][0] == {"role": "system", "content": "Be kind.\n\nBe brief."}


@pytest.mark.parametrize(
    "history", [[["A", "B"]], (("A", "B"),), np.array([["A", "B"]], object), '[["A", "B"]]', EARLIER]
)
def test_the_history_of_a_pair_is_its_earlier_turns(history):
    assert read({"instruction": "Hi", "output": "Ho", "history": history}) == {"messages": [*EARLIER, USER, ANSWER]}


@pytest.mark.parametrize("pair", [("instruction", "output"), ("question", "answer"), ("prompt", "completion")])
@pytest.mark.parametrize("key, value", [("context", "C\n"), ("input", "C\n"), ("context", ["C", "\n"])])
def test_a_context_or_input_is_part_of_the_users_turn(pair, key, value):
    (user, answer), text = pair, "".join(value) if isinstance(value, str) else "C\n\n\n"
    content = read({user: "Hi", answer: "Ho", key: value})["messages"][0]["content"]
    assert content == f"Hi\n\n{text}"


ROLE_NAMES = {"user": "user human Human prompter", "system": "system developer", "tool": "tool observation function"}
ROLE_NAMES["assistant"] = "assistant gpt chatgpt bing bard model bot GPT"


@pytest.mark.parametrize("role, name", [(role, name) for role, names in ROLE_NAMES.items() for name in names.split()])
def test_roles_have_many_names(role, name):
    turns = [{"from": name, "value": "A"}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    assert read({"conversations": turns})["messages"] == [{"role": role, "content": "A"}, USER, ANSWER]


def test_a_call_in_a_role_of_its_own_is_the_assistants():
    call = '{"name": "add", "arguments": {"a": 1}}'
    turns = [USER, {"from": "function_call", "value": call}, {"from": "observation", "value": "2"}, ANSWER]
    _, said, heard, _ = read({"conversations": turns})["messages"]
    assert said == {"role": "assistant", "content": call, "function_call": [CALL]}
    assert heard == {"role": "tool", "content": "2"}
    turns[1]["value"] = "add(1)"
    assert read({"conversations": turns})["messages"][1] == {"role": "assistant", "content": "add(1)"}


FUNCTION = {"name": "add", "arguments": '{"a": 1}'}
CALLS = {
    "arguments in text": {"tool_calls": [{"type": "function", "function": FUNCTION}]},
    "arguments in an object": {"content": None, "tool_calls": np.array([CALL], object)},
    "without a wrapper": {"content": "", "tool_calls": [FUNCTION]},
    "parameters": {"tool_calls": [{"name": "add", "parameters": {"a": 1}}]},
    "input": {"tool_calls": [{"name": "add", "input": {"a": 1}}]},
    "in text": {"content": "", "tool_calls": '[{"name": "add", "arguments": {"a": 1}}]'},
    "OpenAI's first form": {"content": None, "function_call": FUNCTION},
    "with the nulls of a table": {"content": "", "tool_calls": [{"function": FUNCTION | {"b": None}, "id": None}]},
}


@pytest.mark.parametrize("message", CALLS.values(), ids=CALLS)
def test_calls_have_one_form_and_need_no_content(message):
    said = read({"messages": [USER, {"role": "assistant"} | message]})["messages"][1]
    assert said == {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize("arguments", [None, "", " ", {}, "{}"])
def test_a_call_without_arguments_has_an_empty_object(arguments):
    call = {"name": "now", "arguments": arguments}
    (said,) = read({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]})["messages"][1]["tool_calls"]
    assert said["function"] == {"name": "now", "arguments": {}}


@pytest.mark.parametrize("key", ["tools", "functions"])
@pytest.mark.parametrize(
    "tools",
    [[{"name": "add"}], '[{"name": "add"}]', {"name": "add"}, ['{"name": "add"}'], [{"function": {"name": "add"}}]],
)
def test_descriptions_of_tools_have_one_form(key, tools):
    document = read({"messages": [USER, ANSWER], key: tools})
    assert [tool["function"] for tool in document.pop("tools")] == [{"name": "add"}] and document == TALK


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("value", ["Hm.", np.array(["H", "m."], object), [{"type": "reasoning", "text": "Hm."}]])
def test_reasoning_has_one_name(key, value):
    said = read({"messages": [USER, ANSWER | {key: value}]})["messages"][1]
    assert said == ANSWER | {"reasoning_content": "Hm."}


@pytest.mark.parametrize(
    "result, text", [({"a": "\xe9"}, '{"a": "\xe9"}'), ([{"a": 1}], '[{"a": 1}]'), (3, "3"), ([], "")]
)
def test_the_result_of_a_tool_may_be_any_value(result, text):
    heard = {"role": "tool", "content": text}
    assert read({"messages": [USER, {"role": "function", "content": result}, ANSWER]})["messages"][1] == heard


@pytest.mark.parametrize("part", [{"type": "thinking", "thinking": "Hm."}, {"type": "reasoning", "text": "Hm."}])
def test_reasoning_may_be_a_part_of_an_answer(part):
    said = read({"messages": [USER, ANSWER | {"content": [part, {"type": "text", "text": "Ho"}]}]})["messages"][1]
    assert said == ANSWER | {"reasoning_content": "Hm."}


def test_an_empty_answer_is_context():
    silent = {"role": "assistant", "content": " "}
    assert read({"messages": [USER, silent, USER, ANSWER]})["messages"][1] == silent | {"weight": 0}


FLAGS = [{"weight": 0}, {"weight": 0.0}, {"weight": "0"}, {"train": False}, {"training": "False"}, {"loss": False}]


@pytest.mark.parametrize("flag", [*FLAGS, {"loss": 0}])
def test_an_answer_without_weight_is_marked(flag):
    record = {"messages": [USER, ANSWER | flag, USER, ANSWER | dict.fromkeys(flag, "1")]}
    assert read(record)["messages"] == [USER, ANSWER | {"weight": 0}, USER, ANSWER]
    with pytest.raises(BadRecord, match="every assistant turn of 'messages' has weight 0"):
        read({"messages": [USER, ANSWER | flag]})


def test_keys_that_nothing_comes_from_are_named():
    record = {"messages": [USER, ANSWER], "id": 1, "url": "x", "weight": 0, "score": None, "history": [], "text": "Hi"}
    assert read(record) == TALK | {"unused": ["id", "url", "weight"]}
    assert read({"messages": [USER, ANSWER], "history": [["A", "B"]]})["unused"] == ["history"]
    assert read({"prompt": [USER], "response": "Ho", "context": "C"})["unused"] == ["context"]
    assert read({"prompt": "Hi", "response": "Ho"}, names=["prompt", "response", "image"])["unused"] == ["image"]
    nested = {"talk": {"turns": [USER, ANSWER], "system": "Be kind.", "id": None}}
    assert read(nested, messages_key="talk.turns")["unused"] == ["talk.system"]
    assert read({"text": "Hi", "id": 1}, chats=False) == {"text": "Hi"}, "metadata beside a text is ordinary"


def test_values_that_are_nested_too_deeply_are_refused():
    deep = functools.reduce(lambda value, _: [value], range(5000), 1)
    assert refused({"messages": [USER, ANSWER | {"meta": deep}]}) == "its values are nested too deeply"


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
    for record in ({"meta": "no object"}, {"meta": None}, {"meta": {"b": "x"}}, {"body": "x"}):
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
    "null content": (
        {"messages": [USER, {"role": "assistant", "content": None}]},
        "[1].content reads null where text should be",
    ),
    "role": ({"messages": [{"role": 1, "content": ""}]}, "'messages'[0].role must be text, not int"),
    "content": ({"messages": [{"role": "user", "content": 1}]}, "'messages'[0].content must be text, not int"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "not text, of type 'image'"),
    "silent": ({"messages": [USER]}, "'messages' has no assistant turn that says something"),
    "blank": ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "no assistant turn that says something"),
    "ragged": ({"messages": {"role": ["user"], "content": ["a", "b"]}}, "'messages' must be a list of messages"),
    "one message": ({"messages": USER}, "'messages' must be a list of messages; it has role, content"),
    "conversations": ({"conversations": []}, "'conversations' is empty"),
    "half a pair": ({"prompt": "Hi"}, "neither 'messages' nor 'text' in it; it has prompt"),
    "pair": ({"prompt": "Hi", "response": 1}, "'response' must be text or messages, not int"),
    "null text": ({"text": None, "id": 1}, "'text' reads null where text should be"),
    "nulls of a table": ({"text": None, "messages": None}, "'messages' and 'text' read null where text should be"),
    "half a pair is null": ({"prompt": "Hi", "response": None}, "'response' reads null where text should be"),
    "null in a path": ({"a": {"b": None}}, "'a.b' reads null where text should be", {"text_key": "a.b"}),
    "mute pair": ({"prompt": "Hi", "response": ""}, "'response' has no assistant turn that says something"),
    "history": ({"prompt": "Hi", "response": "Ho", "history": ["A"]}, "'history'[0] must be [question, answer]"),
    "weight": ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "'messages'[1].weight must be 0 or 1, not '0.5'"),
    "train": ({"messages": [USER, ANSWER | {"train": "no"}]}, "'messages'[1].train must be 0 or 1, not 'no'"),
    "calls": ({"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]}, "'messages'[1].tool_calls must be"),
    "tools": ({"messages": [USER, ANSWER], "tools": "add"}, "'tools' must be a list of tools"),
    "input": ({"instruction": "Hi", "input": 1, "output": "Ho"}, "'input' must be text, not int"),
}


@pytest.mark.parametrize("record, reason, keys", [(*case, {})[:3] for case in WRONG.values()], ids=WRONG)
def test_unusable_records_are_refused_with_the_reason(record, reason, keys):
    for chats in (True, False):
        assert reason in refused(record, chats, **keys)


def test_the_keys_of_a_record_are_listed_but_not_all_of_many():
    reason = refused({f"key{i}" + "x" * 100: 1 for i in range(20)})
    assert "key7" in reason and "key8" not in reason and reason.endswith("... and 12 more") and len(reason) < 400
    assert refused({}, names=["title", "body"]).endswith("; it has title, body")
