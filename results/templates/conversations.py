"""The conversations that every template is tried on: one row of each kind, as a data set would write it."""

from __future__ import annotations

import json

ZERO_WIDTH = "\u200d"
FAMILY = ZERO_WIDTH.join("\U0001f468\U0001f469\U0001f467")  # one sign of five characters and 18 bytes
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Reports the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city."}},
            "required": ["city"],
        },
    },
}
SYSTEM = {"role": "system", "content": "Answer in one word, please."}
FRANCE, PARIS = "What is the capital of France?", "Paris is the capital."
ITALY, ROME = "And that of Italy?", "Rome is that one."
THOUGHT, SECOND_THOUGHT = "Ten times three, and seven times three.", "One more than before."


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: object) -> dict:
    return {"role": "assistant", "content": content, **more}


def call(city: str, identity: str = "call00001") -> dict:
    """A tool call in OpenAI's form, its arguments as JSON text."""
    return {
        "id": identity,
        "type": "function",
        "function": {"name": "get_weather", "arguments": json.dumps({"city": city})},
    }


def answered(content: str, identity: str = "call00001") -> dict:
    return {"role": "tool", "name": "get_weather", "tool_call_id": identity, "content": content}


_TWO_TURNS = [user(FRANCE), assistant(PARIS), user(ITALY), assistant(ROME)]
_REASONED = [user("What is 17 times 3?"), assistant("It is 51.", reasoning_content=THOUGHT)]
_CALLED = [user("How is the weather in Oslo?"), assistant(None, tool_calls=[call("Oslo")]), answered("Rain and wind.")]

CONVERSATIONS: dict[str, dict] = {
    "plain": {"messages": _TWO_TURNS[:2]},
    "system": {"messages": [SYSTEM, *_TWO_TURNS[:2]]},
    "multi-turn": {"messages": _TWO_TURNS},
    "system, multi-turn": {"messages": [SYSTEM, *_TWO_TURNS]},
    "tool call": {"messages": [*_CALLED, assistant("It pours there.")], "tools": [TOOL]},
    "words and tool call": {
        "messages": [
            _CALLED[0],
            assistant("Let me look.", tool_calls=[call("Oslo")]),
            _CALLED[2],
            assistant("It pours."),
        ],
        "tools": [TOOL],
    },
    "parallel calls": {
        "messages": [
            user("How is the weather in Oslo and Rome?"),
            assistant(None, tool_calls=[call("Oslo"), call("Rome", "call00002")]),
            answered("Rain and wind."),
            answered("Sun all day.", "call00002"),
            assistant("Wet, then dry."),
        ],
        "tools": [TOOL],
    },
    "reasoning and tool call": {
        "messages": [
            _CALLED[0],
            assistant(None, tool_calls=[call("Oslo")], reasoning_content=THOUGHT),
            _CALLED[2],
            assistant("It pours there.", reasoning_content=SECOND_THOUGHT),
        ],
        "tools": [TOOL],
    },
    "odd arguments": {
        "messages": [
            _CALLED[0],
            assistant(None, tool_calls=[call('"Zürich" \\ \n{Nord}')]),
            *_CALLED[2:],
            assistant("So."),
        ],
        "tools": [TOOL],
    },
    "tools, none called": {"messages": _TWO_TURNS[:2], "tools": [TOOL]},
    "reasoning": {"messages": _REASONED},
    "<think> in content": {
        "messages": [_REASONED[0], assistant(f"<think>\n{THOUGHT}\n</think>\n\nIt is 51.")],
    },
    "reasoning, earlier turn": {
        "messages": [*_REASONED, user("And plus one?"), assistant("Then it is 52.", reasoning_content=SECOND_THOUGHT)]
    },
    "thinking off": {"messages": _TWO_TURNS, "chat_template_kwargs": {"enable_thinking": False}},
    "two answers in a row": {"messages": [*_TWO_TURNS[:2], assistant(ROME), *_TWO_TURNS[2:]]},
    "empty answer": {"messages": [user(FRANCE), assistant(""), user(ITALY), assistant(ROME)]},
    "emoji, right to left": {
        "messages": [
            user("Say it in signs"),
            assistant(f"Done {FAMILY} \u0645\u0631\u062d\u0628\u0627 \U0001fae8"),
            user("\u05e9\u05dc\u05d5\u05dd?"),
            assistant("\U0001f600"),
        ]
    },
    "blanks": {
        "messages": [user("  Write a line.  \n"), assistant("  A line.\n\n"), user("Again"), assistant("\tB line \n")]
    },
    "trailing question": {"messages": [*_TWO_TURNS[:2], user("Thank you!")]},
    "switches": {
        "messages": [
            user(FRANCE),
            assistant(PARIS, weight=0),
            user(ITALY),
            assistant(ROME, weight=1),
            user("And of Spain?"),
            assistant("Madrid, I think.", weight=0.5),
        ]
    },
    "short": {"messages": [user("Is I a letter? And a?"), assistant("I"), user("Is a?"), assistant("a")]},
    "assistant first": {"messages": [assistant("I"), user("Hello there"), assistant("a")]},
    "repeated": {"messages": [user("Paris"), assistant("Paris"), user("Paris"), assistant("Paris")]},
    "names of roles": {
        "messages": [
            user("assistant"),
            assistant("user"),
            user("What is <think>?"),
            assistant("assistant\nA tag, </think>"),
        ]
    },
    "markup in content": {
        "messages": [user("Write <|im_end|> and {{ x }}"), assistant("\\n <b>\"{{ x }}\"</b> & <|end|> 'so'")]
    },
}
TURN_KEYS = ("weight",)  # of messages, and not for the template
