"""Messages as rows write them: speakers, tool calls, switches; and what is wrong with them, in words."""

from __future__ import annotations

import json

import pytest

from packtrain.data.messages import SWITCHES, make_chat, read_messages, read_tools
from packtrain.data.report import BadRow

USER = {"role": "user", "content": "one"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


def read(*messages: object, roles: dict[str, str] | None = None) -> list[dict]:
    return [message.body for message in read_messages({"messages": list(messages)}, "messages", roles or {})]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"from": "human", "value": "one"}, USER),
        ({"from": "gpt", "value": "one"}, {"role": "assistant", "content": "one"}),
        ({"role": "model", "content": "one"}, {"role": "assistant", "content": "one"}),
        ({"role": "ipython", "content": "one"}, {"role": "tool", "content": "one"}),
        ({"from": "observation", "value": "one"}, {"role": "tool", "content": "one"}),
        ({"role": "user", "content": [{"type": "text", "text": "o"}, {"type": "text", "text": "ne"}]}, USER),
        ({"role": "user", "content": "one", "name": None, "tool_calls": None}, USER),
        ({"role": "system", "content": ""}, {"role": "system", "content": ""}),
        (
            {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
            {"role": "assistant", "tool_calls": [CALL]},
        ),
        (
            {"from": "function_call", "value": '[{"name": "f", "arguments": "{\\"a\\": 1}"}]'},
            {"role": "assistant", "tool_calls": [CALL]},
        ),
        (
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
            {"role": "assistant", "tool_calls": [CALL]},
        ),
        (
            {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL | {"id": "x"}])},
            {"role": "assistant", "content": "", "tool_calls": [CALL | {"id": "x"}]},
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1, "b": None}}}]},
            {"role": "assistant", "tool_calls": [CALL]},  # a table fills in the arguments of other rows
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "parameters": {"a": 1}}]},
            {"role": "assistant", "tool_calls": [CALL]},
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]},
            {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]},
        ),
    ],
)
def test_message_becomes(given, expected):
    assert read(given) == [expected]


def test_messages_as_json_text():
    found = read_messages({"messages": json.dumps([USER])}, "messages", {})
    assert [message.body for message in found] == [USER]


def test_names_of_speakers_are_the_users_to_choose():
    roles = {"Teacher": "user", "user": "assistant"}
    assert read({"role": "Teacher", "content": "one"}, USER, roles=roles) == [USER, USER | {"role": "assistant"}]
    with pytest.raises(BadRow, match=r"messages\[0\] has the unknown role 'Teacher' .*`data.roles`"):
        read({"role": "Teacher", "content": "one"})


def called(**call: object) -> dict:
    return {"role": "assistant", "tool_calls": [call]}


NOTHING = 'messages[1] has no content (a message that says nothing has the content "")'


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"role": "assistant", "content": None}, NOTHING),
        ({"role": "assistant"}, NOTHING),
        ({"role": "tool", "content": None}, "messages[1] has no content"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "messages[1] has no content"),
        ({"role": "assistant", "content": " \n"}, "the content of messages[1] is empty"),
        ({"role": "user", "content": ""}, "the content of messages[1] is empty"),
        ({"role": "user", "content": 5}, "the content of messages[1] is a number, not text: 5"),
        ({"role": "user", "content": {"a": 1}}, "the content of messages[1] is an object, not text"),
        ({"role": "user", "content": [{"type": "image"}]}, "the content of messages[1] has parts that are not text"),
        ({"role": ["user"], "content": "x"}, "messages[1] has the unknown role ['user']"),
        ({"content": "x"}, "messages[1] has the unknown role None"),
        ({"from": "alien", "value": "x"}, "messages[1] has the unknown role 'alien'"),
        ({"role": "assistant", "tool_calls": "[{"}, "the tool calls of messages[1] is not valid JSON"),
        ({"role": "assistant", "tool_calls": {"name": "f"}}, "the tool calls of messages[1] are not a list"),
        (called(function={"arguments": {}}), "messages[1].tool_calls[0] is not a call with the name of a function"),
        (called(function={"name": ""}), "messages[1].tool_calls[0] is not a call with the name of a function"),
        (called(name="f", arguments="{"), "the arguments of messages[1].tool_calls[0] is not valid JSON"),
        (called(name="f", arguments="[1]"), "the arguments of messages[1].tool_calls[0] are not an object: [1]"),
        ({"from": "function_call", "value": "f(1)"}, "the tool call of messages[1] is not valid JSON"),
        ({"role": "assistant", "content": "x", "reasoning_content": 5}, "'reasoning_content' of messages[1] is a number"),
        ({"role": "assistant", "content": "x", "weight": -0.5}, "'weight' of messages[1] is -0.5, which is not true, false"),
        ({"role": "assistant", "content": "x", "weight": "1"}, "'weight' of messages[1] is '1', which is not true, false"),
        ({"role": "assistant", "content": "x", "weight": float("nan")}, "'weight' of messages[1] is nan, which is not"),
        ({"role": "assistant", "content": "x", "train": 0.5}, "'train' of messages[1] is 0.5, and must be true or false"),
        ({"role": "assistant", "content": "x", "loss": []}, "'loss' of messages[1] is [], which is not true, false"),
        (
            {"role": "assistant", "content": "x", "train": True, "weight": 0},
            "messages[1] has switches that contradict each other: 'weight', 'train'",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(given, reason):
    with pytest.raises(BadRow) as error:
        read(USER, given)
    assert str(error.value).startswith(reason)
    assert len(read(USER, USER)) == 2


@pytest.mark.parametrize("key", SWITCHES)
@pytest.mark.parametrize(("value", "factor"), [(True, 1.0), (1, 1.0), (False, 0.0), (0, 0.0), (0.0, 0.0)])
def test_switches(key, value, factor):
    chat = make_chat(read_messages({"messages": [USER, USER | {key: value}]}, "messages", {}))
    assert chat.switches == {1: factor} and chat.unknown == ()
    assert chat.messages == [USER, USER]  # no template sees them


def test_switches_that_agree_and_those_that_are_null():
    chat = make_chat(read_messages({"messages": [USER | {"train": False, "weight": 0, "loss": None}]}, "messages", {}))
    assert chat.switches == {0: 0.0}
    chat = make_chat(read_messages({"messages": [USER | {"train": None}]}, "messages", {}))
    assert chat.switches == {} and chat.unknown == ()


@pytest.mark.parametrize(("key", "value"), [("trainable", 0), ("loss_mask", 1), ("masked", "no"), ("final", True)])
def test_keys_that_look_like_switches_are_named(key, value):
    chat = make_chat(read_messages({"messages": [USER | {key: value}, USER | {"name": "x"}]}, "messages", {}))
    assert chat.unknown == (key,) and chat.switches == {}


# --- tools -----------------------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "f", "description": "Adds."}}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"tools": [TOOL]}, [TOOL]),
        ({"tools": json.dumps([TOOL])}, [TOOL]),
        ({"tools": [json.dumps(TOOL)]}, [TOOL]),
        ({"tools": [TOOL | {"strict": None}]}, [TOOL]),
        ({"functions": [TOOL["function"]]}, [TOOL]),
        ({"functions": json.dumps([TOOL["function"]]), "tools": None}, [TOOL]),
        ({"tools": []}, None),
        ({"tools": " "}, None),
        ({}, None),
    ],
)
def test_tools(row, expected):
    assert read_tools(row) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"tools": "["}, "'tools' is not valid JSON"),
        ({"tools": TOOL}, "'tools' is not a list"),
        ({"tools": ["f"]}, r"tools\[0\] is not valid JSON"),
        ({"tools": [5]}, "'tools' contains 5, which is not an object that describes a tool"),
        ({"functions": "5"}, "'functions' is not a list: 5"),
    ],
)
def test_tools_that_are_none(row, reason):
    with pytest.raises(BadRow, match=reason):
        read_tools(row)
