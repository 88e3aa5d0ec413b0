"""What real chat templates do to turns, each found by `results/templates`: written down small, with what is to be learnt."""

from __future__ import annotations

import pytest

from packtrain.errors import DataError
from tests.data.helpers import make_tokenizer, shown

ENDS_WITH_EOS = (  # Phi-3: what stops without a generation prompt ends with an eos
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}</s>{% endif %}"
)
OPENS_A_THOUGHT = (  # Nemotron 3: the generation prompt opens a block that a turn without thoughts closes at once
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}<s><|system|>{% endif %}{{ m.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><s>\n{% endif %}"
)
MARKS_THE_HEADER = (  # gpt-oss: the markers enclose the header of a turn
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|assistant|>{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MOVES_ANSWERS = (  # Gemma 4: what a tool answers comes before the words of the turn that called it
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{% for k, v in c.function.arguments.items() %}{{ k }}{{ v }}{% endfor %}<|tool|>"
    "{{ messages[2].content if messages[2:] else '' }}{% endfor %}"
    "{{ m.content }}<|end|>{% elif m.role == 'user' %}<|user|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def learnt(build, template: str, *messages: tuple, **options) -> list[str]:
    tokenizer = make_tokenizer(chat_template=template)
    rows = [{"messages": [{"role": role, "content": content, **dict(*more)} for role, content, *more in messages]}]
    return shown(tokenizer, build(rows, tokenizer, assistant_only_loss=True, **options))


@pytest.mark.parametrize("answer", ["two", "  two", "\n two\n", "<think>one</think>two"])
def test_blanks_and_tags_before_the_words_are_learnt(answer, build):
    expected = [f"<|user|>\none<|end|><|assistant|>\n[{answer}<|end|></s>]"]
    assert learnt(build, ENDS_WITH_EOS, ("user", "one"), ("assistant", answer)) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (ENDS_WITH_EOS, "<|assistant|>\n[  one<|end|>]<|user|>\ntwo<|end|><|assistant|>\n[four<|end|></s>]"),
        (
            OPENS_A_THOUGHT,
            "<|assistant|><s>[<|system|>  one<|end|>]<|user|>two<|end|><|assistant|><s>[<|system|>four<|end|>]",
        ),
    ],
)
def test_a_conversation_that_the_assistant_begins(template, expected, build):
    turns = [("assistant", "  one"), ("user", "two"), ("assistant", "four")]
    assert learnt(build, template, *turns) == [expected]


def test_a_switch_turns_off_the_header_that_markers_enclose(build):
    turns = [("user", "one"), ("assistant", "two", {"weight": 0}), ("user", "one"), ("assistant", "four")]
    off = "<|user|>one<|end|><|assistant|>two<|end|><|user|>one<|end|>[<|assistant|>four<|end|>]"
    assert learnt(build, MARKS_THE_HEADER, *turns) == [off]
    turns[1] = ("assistant", "two")  # control
    on = off.replace("<|assistant|>two<|end|>", "[<|assistant|>two<|end|>]")
    assert learnt(build, MARKS_THE_HEADER, *turns) == [on]


def test_a_factor_holds_for_the_header_that_markers_enclose(build):
    tokenizer = make_tokenizer(chat_template=MARKS_THE_HEADER)
    rows = [{"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two", "weight": 0.5}]}]
    examples = build(rows, tokenizer, assistant_only_loss=True)
    assert shown(tokenizer, examples) == ["<|user|>one<|end|>[<|assistant|>two<|end|>]"]
    assert set(examples.factors([0])[examples[0]["labels"] != -100].tolist()) == {0.5}


def test_a_turn_with_another_message_inside_is_refused(build):
    call = {"type": "function", "function": {"name": "two", "arguments": {"six": "three"}}}
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "four", "tool_calls": [call]},
        {"role": "tool", "content": "five"},
        {"role": "assistant", "content": "six"},
    ]
    tokenizer = make_tokenizer(chat_template=MOVES_ANSWERS)
    with pytest.raises(DataError, match=r"messages\[1\]: .* renders messages\[2\] between .* leave out"):
        build([{"messages": messages}], tokenizer, assistant_only_loss=True)
    messages[1] = {"role": "assistant", "content": "", "tool_calls": [call]}  # control: nothing behind the answer
    (text,) = shown(tokenizer, build([{"messages": messages}], tokenizer, assistant_only_loss=True))
    assert text.startswith("<|user|>one<|end|><|assistant|>[twosixthree<|tool|>]five")
