"""Forms in which chat templates take tool calls: arguments as an object or as JSON text, a content or none.

`FORMS` rewrite a message; `PROBE` is a conversation by which `ChatTemplate` sees which of them a template expects.
"""

from __future__ import annotations

import json
from collections.abc import Callable


def as_objects(message: dict) -> dict:
    return message


def _as_text(message: dict) -> dict:
    """Writes the arguments of tool calls as JSON text."""
    if not message.get("tool_calls"):
        return message
    calls = [
        call
        | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in message["tool_calls"]
    ]
    return message | {"tool_calls": calls}


def _with_content(form: Callable[[dict], dict]) -> Callable[[dict], dict]:
    """Gives messages without a content an empty one."""
    return lambda message: {"content": ""} | form(message)


FORMS = (as_objects, _with_content(as_objects), _as_text, _with_content(_as_text))
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probed_tool",
        "description": "Looks up.",
        "parameters": {
            "type": "object",
            "properties": {"probed_city": {"type": "string", "description": "Where."}},
            "required": ["probed_city"],
        },
    },
}
QUESTION = "Where?"
PROBE = [
    {"role": "user", "content": QUESTION},
    {
        "role": "assistant",
        "tool_calls": [
            {
                "id": "call00001",  # as long as Mistral's templates want it
                "type": "function",
                "function": {"name": "probed_tool", "arguments": {"probed_city": "probed_place"}},
            }
        ],
    },
    {"role": "tool", "name": "probed_tool", "tool_call_id": "call00001", "content": "There."},
    {"role": "assistant", "content": "There."},
]
