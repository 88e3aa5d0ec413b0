"""Templates without markers: where turns stand, what is left out, and tool calls in the form that each template takes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from packtrain.data.chat_template import ChatTemplate
from packtrain.data.encoder import Encoder
from packtrain.data.messages import Chat
from packtrain.errors import DataError
from tests.data.helpers import shown
from tests.data.templates import TEMPLATES, Parts, random_parts
from tests.data.tokenizers import TOKENIZERS, byte_level, expected_mask

QUESTION, ANSWER = {"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4."}
TURNS = [QUESTION, ANSWER, {"role": "user", "content": "And three?"}, {"role": "assistant", "content": "fine"}]
SYSTEM = {"role": "system", "content": "Be brief, please."}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture
def masked(tokenizer, build):
    """Examples of one row under a template, written by `shown`, and the notes of the report."""

    def masked(template: str, row: dict | list, **options) -> tuple[str, tuple[str, ...]]:
        tokenizer.chat_template = template
        examples = build([row if isinstance(row, dict) else {"messages": row}], tokenizer, **options)
        assert tokenizer.chat_template == template
        (text,) = shown(tokenizer, examples)
        return text, examples.report.notes

    return masked


# --- turns -----------------------------------------------------------------------------------------------------------

EXPECTED = {
    "chatml": "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n[It is 4.<|im_end|>\n]"
    "<|im_start|>user\nAnd three?<|im_end|>\n<|im_start|>assistant\n[fine<|im_end|>\n]",
    "qwen3": "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n[It is 4.<|im_end|>\n]"
    "<|im_start|>user\nAnd three?<|im_end|>\n<|im_start|>assistant\n[<think>\n\n</think>\n\nfine<|im_end|>\n]",
    "mistral": "<s>[INST] What is 2+2? [/INST][ It is 4.</s>][INST] And three? [/INST][ fine</s>]",
    "phi3": "<|user|>\nWhat is 2+2?<|end|>\n<|assistant|>\n[It is 4.<|end|>\n]"
    "<|user|>\nAnd three?<|end|>\n<|assistant|>\n[fine<|end|>\n</s>]",
    "plain": "User: What is 2+2?\nAssistant:[ It is 4.\n]User: And three?\nAssistant:[ fine\n]",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_turns_read_as_they_stand(name, masked):
    text, notes = masked(TEMPLATES[name].template, TURNS, assistant_only_loss=True)
    assert text == EXPECTED[name]
    assert not any("leaves out" in note for note in notes)


def test_thinking_header_of_the_prompt_is_not_learnt(masked):
    """Qwen3 asked not to think is prompted with the empty block; it must be given back as it is, and not learnt."""
    row = {"messages": TURNS, "chat_template_kwargs": {"enable_thinking": False}}
    text, _ = masked(TEMPLATES["qwen3"].template, row, assistant_only_loss=True)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n[fine<|im_end|>\n]")
    assert "assistant\n[It is 4.<|im_end|>\n]" in text


_CONTENT = st.lists(
    st.sampled_from(
        [
            "one",
            "I",
            "a",
            " two",
            "fine ",
            "\n",
            "4",
            "User: ",
            "Assistant: ",
            "😀",
            "  ",
            'it\'s "x"',
            "&<>",
            "{{ x }}",
        ]
        + ["assistant\n", "\n\nAI: ", "</s>", "<|im_end|>", "### Response:\n", "[INST]", "[/INST]", "<think>", "model"]
    ),
    min_size=1,
    max_size=4,
).map("".join)
_CONTENT = _CONTENT.filter(str.strip)


@st.composite
def conversations(draw, system: bool = True) -> list[dict]:
    contents = draw(st.lists(_CONTENT, min_size=2, max_size=6))
    messages = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    before = [{"role": "system", "content": draw(_CONTENT)}] if system and draw(st.booleans()) else []
    return [*before, *messages]


def check(
    tokenizer: PreTrainedTokenizerFast, template: str, messages: list[dict], pieces: list[tuple[str, bool]]
) -> None:
    """Compares text, turns and tokens with the literal reference."""
    tokenizer.chat_template = template
    text, ours = "".join(part for part, _ in pieces), [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    rendered = ChatTemplate(tokenizer).render(Chat(messages=messages, prompt_messages=1), ours)
    assert rendered.text == text and not rendered.lost
    own = {at for start, end in rendered.turns.values() for at in range(start, end)}
    expected = [on for part, on in pieces for _ in part]
    assert [at in own for at in range(len(text))] == expected
    (row,) = Encoder(tokenizer, "messages", assistant_only=True)([{"messages": messages}]).to_pylist()
    if row["problem"] is not None:  # an answer that is the first token of the sequence, or is no token at all
        assert "none of its" in row["problem"]
        assert (
            sum(
                filter(
                    None, expected_mask(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"], pieces)[1:]
                )
            )
            == 0
        )
        return
    tokens = expected_mask(tokenizer, row["input_ids"], pieces)
    found = [bool(on) if want is not None else None for on, want in zip(row["learnt"], tokens, strict=True)]
    assert found[1:] == tokens[1:]


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=30, deadline=None)
@given(messages=conversations())
def test_answers_and_their_footers_are_learnt_and_nothing_else(name, tokenizer, messages):
    check(tokenizer, TEMPLATES[name].template, messages, TEMPLATES[name].pieces(messages))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(parts=random_parts(), messages=conversations())
def test_any_template_under_any_tokenizer(name, parts: Parts, messages):
    check(_MADE.setdefault(name, TOKENIZERS[name]()), parts.template, messages, parts.pieces(messages))


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=1000, deadline=None)
@given(parts=random_parts(), messages=conversations())
def test_many_templates_under_any_tokenizer(name, parts: Parts, messages):
    check(_MADE.setdefault(name, TOKENIZERS[name]()), parts.template, messages, parts.pieces(messages))


_MADE: dict[str, PreTrainedTokenizerFast] = {}


@settings(max_examples=40, deadline=None)
@given(parts=random_parts(), messages=conversations(), data=st.data())
def test_references_are_told_apart(parts, messages, data, tokenizer):
    """Control: the comparison fails where one character more or less were learnt."""
    pieces = parts.pieces(messages)
    where = data.draw(st.sampled_from([n for n, (text, _) in enumerate(pieces) if text]))
    wrong = [*pieces[:where], (pieces[where][0], not pieces[where][1]), *pieces[where + 1 :]]
    with pytest.raises(AssertionError):
        check(tokenizer, parts.template, messages, wrong)


def test_turn_that_cannot_be_located_is_named(masked):
    """The marks change what this template does, and what it renders of earlier messages depends on the later ones."""
    template = (
        "{{ messages | length }}{% for m in messages %}{{ '<|' + m.role + '|>' }}"
        "{{ m.content if m.content in ['What is 2+2?', 'It is 4.'] else 'x' }}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"messages\[1\] cannot be located in what the chat template"):
        masked(
            template.replace("{% for", "{{ messages | length }}{% for"), TURNS[:2] + TURNS[:2], assistant_only_loss=True
        )


def test_words_of_others_behind_the_last_answer_are_not_learnt(masked):
    template = (
        "{% for m in messages if m.role != 'system' %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if not add_generation_prompt %}{{ messages[0].content }}{% else %}<|assistant|>{% endif %}"
    )
    text, _ = masked(template, [SYSTEM | {"content": "six"}, *TURNS], assistant_only_loss=True)
    assert text.endswith("<|assistant|>[It is 4.<|end|>]<|user|>And three?<|end|><|assistant|>[fine<|end|>]six")


def test_markers_in_a_comment_are_none(masked):
    template = "{# as with {% generation %}\nand {% endgeneration %} #}" + TEMPLATES["chatml"].template
    assert masked(template, TURNS, assistant_only_loss=True)[0] == EXPECTED["chatml"]


# --- what a template leaves out ----------------------------------------------------------------------------------------

FRAME = (
    "{%- for m in messages %}{{ '<|' + m.role + '|>' }}BODY<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CALL = {"type": "function", "function": {"name": "get_sum", "arguments": {"of": "2+2"}}}
CALLING = [QUESTION, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "four, exactly"}, ANSWER]
SAYS = FRAME.replace("BODY", "{{ m.content or '' }}")
CALLS = FRAME.replace("BODY", "{{ m.content or '' }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}")
TOOL = {"type": "function", "function": {"name": "get_sum", "description": "Adds.", "parameters": {"type": "object"}}}


def test_dropped_tool_call(masked):
    message = (
        r"messages\[1\]: the chat template leaves out or changes the tool call 'get_sum'; set `model.chat_template` to a "
        r"template that renders tool calls, or train without it \(`data.on_lost_content: warn`\)"
    )
    for options in ({}, {"assistant_only_loss": True}, {"completion_only_loss": True}):
        with pytest.raises(DataError, match=message):
            masked(SAYS, CALLING, **options)
        masked(CALLS, CALLING, **options)  # control
    text, notes = masked(SAYS, CALLING, assistant_only_loss=True, on_lost_content="warn")
    assert "<|assistant|><|end|>\n<|tool|>four" in text  # the empty turn is not learnt
    assert text.endswith("<|assistant|>[It is 4.<|end|>\n]")
    assert any("the chat template leaves out tool calls: 1 row (the first is rows.jsonl, line 1)" in n for n in notes)
    text, _ = masked(CALLS, CALLING, assistant_only_loss=True)
    assert '<|assistant|>[{"name": "get_sum", "arguments": {"of": "2+2"}}<|end|>\n]<|tool|>' in text


@pytest.mark.parametrize("option", ["assistant_only_loss", "completion_only_loss"])
def test_empty_turn_is_not_learnt(option, masked):
    """A completion of which nothing is rendered would teach to end the turn at once."""
    with pytest.raises(DataError, match=r"none of its|renders nothing of messages\[1\]"):
        masked(SAYS, CALLING[:2], on_lost_content="warn", **{option: True})


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (FRAME.replace("BODY", "{{ m.content if m.role != 'system' }}"), [SYSTEM, *TURNS], r"messages\[0\].* 'Be brief"),
        (FRAME.replace("BODY", "{{ m.content if m.role != 'tool' }}{{ m.tool_calls | string }}"), CALLING,
         r"messages\[2\]: the chat template leaves out or changes the tool answer 'four, exactly'"),
        (FRAME.replace("BODY", "{{ m.content | replace('2', 'two') }}"), TURNS,
         r"messages\[0\]: .* changes the content 'What"),
        (FRAME.replace("BODY", "{{ m.content[:10] }}"), TURNS, r"messages\[0\]: .* leaves out or changes the content 'What"),
        (FRAME.replace("BODY", "{{ m.content | truncate(9, true, '', 0) }}"), TURNS, r"messages\[0\].*content 'What is 2"),
    ],
)  # fmt: skip
def test_dropped_words(template, messages, message, masked):
    with pytest.raises(DataError, match=message):
        masked(template, messages)
    _, notes = masked(template, messages, on_lost_content="warn")
    assert any("leaves out" in note and ": 1 row" in note for note in notes)


def test_dropped_tools(masked):
    row = {"messages": CALLING, "tools": [TOOL]}
    with pytest.raises(DataError, match="the chat template leaves out or changes the tools 'get_sum'"):
        masked(CALLS.replace("get_sum", ""), row)
    masked("{{ tools | tojson }}" + CALLS, row)  # control
    # the name of the tool stands in the text all the same, by the call
    assert "get_sum" in masked(CALLS, CALLING)[0]


def test_words_that_occur_elsewhere_do_not_hide_a_loss(masked):
    last = FRAME.replace("BODY", "{{ m.content if not loop.last else '' }}")
    for answer in ("I", "2", "What is 2+2?", "user", "end"):
        messages = [QUESTION, {"role": "assistant", "content": answer}]
        with pytest.raises(DataError, match=r"messages\[1\]: the chat template leaves out or changes the content"):
            masked(last, messages)
        masked(SAYS, messages)  # control


@pytest.mark.parametrize("options", [{}, {"assistant_only_loss": True}])
def test_words_of_the_template_do_not_hide_a_loss(options, masked):
    """A template that has a system prompt of its own, and puts it in the place of the row's."""
    own = "{{ 'You are a helpful assistant.' }}" + FRAME.replace("BODY", "{{ m.content if m.role != 'system' }}")
    says = "{{ 'You are a helpful assistant.' }}" + SAYS
    for system in ("You are a helpful", "You are a helpful assistant."):
        messages = [SYSTEM | {"content": system}, QUESTION, {"role": "assistant", "content": "It is four."}]
        with pytest.raises(DataError, match=r"messages\[0\]: the chat template leaves out or changes the content 'You"):
            masked(own, messages, **options)
        masked(says, messages, **options)  # control


THINKS = {"role": "assistant", "content": "It is 4.", "reasoning_content": "two and two"}
LAST_ONLY = FRAME.replace(
    "BODY",
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}",
)


def test_dropped_reasoning(masked):
    """Of earlier turns a note, since many templates do so; of the turn that is learnt an error."""
    text, notes = masked(LAST_ONLY, [QUESTION, THINKS], assistant_only_loss=True)
    assert "[<think>two and two</think>It is 4.<|end|>\n]" in text and not notes_of_lost(notes)
    _, notes = masked(LAST_ONLY, [QUESTION, THINKS, *TURNS[2:]], assistant_only_loss=True)
    assert notes_of_lost(notes) == [
        "the chat template leaves out the reasoning of earlier turns: 1 row (the first is rows.jsonl, line 1)"
    ]
    with pytest.raises(
        DataError, match=r"messages\[1\]: the chat template leaves out or changes the reasoning 'two and two'"
    ):
        masked(SAYS, [QUESTION, THINKS], assistant_only_loss=True)
    text, notes = masked(SAYS, [QUESTION, THINKS], assistant_only_loss=True, on_lost_content="warn")
    assert text.endswith("[It is 4.<|end|>\n]") and len(notes_of_lost(notes)) == 1


def test_dropped_reasoning_inside_the_content(masked):
    strips = FRAME.replace("BODY", "{{ m.content.split('</think>')[-1] }}")
    inside = {"role": "assistant", "content": "<think>two and two</think>It is 4."}
    with pytest.raises(
        DataError, match=r"messages\[1\]: the chat template leaves out or changes the reasoning 'two and two'"
    ):
        masked(strips, [QUESTION, inside])
    assert (
        "[<think>two and two</think>It is 4.<|end|>\n]" in masked(SAYS, [QUESTION, inside], assistant_only_loss=True)[0]
    )
    assert notes_of_lost(masked(strips, [QUESTION, inside, *TURNS[2:]])[1])


def notes_of_lost(notes: tuple[str, ...]) -> list[str]:
    return [note for note in notes if "leaves out" in note]


@pytest.mark.parametrize("change", ["trim", "e", "upper", "replace('2', 'two')"])
def test_templates_that_change_words(change, masked):
    """Blanks at the ends are a template's to cut; other changes are what the row does not say."""
    template = FRAME.replace("BODY", "{{ m.content | " + change + " }}")
    messages = [QUESTION | {"content": "  <What> is 2+2?\n"}, ANSWER | {"content": " It's <4> & 2. "}]
    if change != "trim":
        with pytest.raises(
            DataError, match=r"messages\[0\]: the chat template leaves out or changes the content '<What>"
        ):
            masked(template, messages, assistant_only_loss=True)
    text, notes = masked(template, messages, assistant_only_loss=True, on_lost_content="warn")
    assert bool(notes_of_lost(notes)) == (change != "trim")
    said = {"trim": "It's <4> & 2.", "e": " It&#39;s &lt;4&gt; &amp; 2. ", "upper": " IT'S <4> & 2. "}
    said |= {"replace('2', 'two')": " It's <4> & two. "}
    assert text.endswith(f"[{said[change]}<|end|>\n]")


def test_system_prompt_in_the_last_question_only(masked):
    """The prompt is rendered otherwise when an answer follows; the completion is the answer, without the question."""
    row = {"prompt": [SYSTEM, *TURNS[:3]], "completion": TURNS[3:]}
    text, notes = masked(TEMPLATES["mistral"].template, row)
    assert text == (
        "<s>[INST] What is 2+2? [/INST] It is 4.</s>[INST] Be brief, please.\n\nAnd three? [/INST][ fine</s>]"
    )
    two = {"prompt": [SYSTEM, QUESTION], "completion": [ANSWER, *TURNS[2:]]}
    text, notes = masked(TEMPLATES["mistral"].template, two)
    assert (
        text == "<s>[INST] What is 2+2? [/INST][ It is 4.</s>[INST] Be brief, please.\n\nAnd three? [/INST] fine</s>]"
    )
    assert any("renders differently" in note for note in notes)


# --- forms of tool calls -------------------------------------------------------------------------------------------------

ARGUMENTS = {"city": "Oslo", "days": 3, "near": {"it's": ['a "b"\n', "ø"]}, "none": {}}
FORMS = {
    "objects": "{{ c.function.name }} {{ c.function.arguments | tojson }};",
    "whole": "{{ c.function.name }} {{ (c.function | tojson)[LENGTH:-1] }};",
    "text": "{{ c.function.name + ' ' + c.function.arguments + ';' }}",
    "Python": "{{ c.function.name }} {{ c.function.arguments }};",
    "either": "{{ c.function.name }} {{ c.function.arguments if c.function.arguments is string "
    "else c.function.arguments | tojson }};",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("given", [dict, json.dumps])
def test_arguments_are_written_as_the_template_takes_them(form, given, masked):
    """As JSON, once: neither quoted a second time nor as Python writes a dict."""
    length = len('{"name": "get_days", "arguments": ')
    template = FRAME.replace("BODY", "{{ m.content or '' }}{% for c in m.tool_calls %}" + FORMS[form] + "{% endfor %}")
    calls = [{"function": {"name": name, "arguments": given(ARGUMENTS)}} for name in ("get_days", "get_rain")]
    messages = [
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "rain"},
        ANSWER,
    ]
    text, notes = masked(template.replace("LENGTH", str(length)), messages, assistant_only_loss=True)
    written = json.dumps(ARGUMENTS, ensure_ascii=False)
    assert (
        f"[get_days {written};get_rain {written};<|end|>\n]<|tool|>rain<|end|>\n<|assistant|>[It is 4.<|end|>\n]"
        in text
    )
    assert not notes_of_lost(notes)


def test_template_that_prints_python_would_print_a_dict(tokenizer):
    """Control of the above."""
    tokenizer.chat_template = "{% for c in messages[0].tool_calls %}" + FORMS["Python"] + "{% endfor %}"
    messages = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": "b"}}}]}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "f {'a': 'b'};"
