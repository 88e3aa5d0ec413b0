"""Assistant turns that a template marks with {% generation %}: exactly these tokens, whatever the tokenizer.

Each case has transformers' own mask (`return_assistant_tokens_mask`) next to it where that one is wrong.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from packtrain.data.chat_template import ChatTemplate
from packtrain.data.encoder import Encoder
from packtrain.data.messages import Chat
from packtrain.errors import DataError
from tests.data.helpers import shown
from tests.data.tokenizers import TOKENIZERS, byte_fallback, byte_level, expected_mask, unigram, word_piece, words

SAYS = "{% generation %}{{ m.content }}{% endgeneration %}"
BARE = (
    "{% for m in messages %}{% if m['role']=='assistant' %}{% generation %}{{m['content']}}{% endgeneration %}"
    "{% else %}{{'<|im_start|>'+m['content']}}{% endif %}{% endfor %}"
)
LINES = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>' }}"
    "{% generation %}{{ m.content + '\\n' }}{% endgeneration %}"
    "{% else %}{{ '<|user|>' + m.content + '\\n' }}{% endif %}{% endfor %}"
)
CLOSED = LINES.replace("{{ m.content + '\\n' }}{% endgeneration %}", "{{ m.content }}{% endgeneration %}<|end|>")


def conversation(*contents: str, first: str = "user") -> list[dict]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]


def transformers_mask(tokenizer: PreTrainedTokenizerFast, messages: list[dict]) -> str:
    """What transformers would supervise, written as `shown` does."""
    found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    pieces, before = [], 0
    for token, learnt in zip(found["input_ids"], found["assistant_masks"], strict=True):
        pieces.append(("[" if learnt > before else "]" if learnt < before else "") + tokenizer.decode([token]))
        before = learnt
    return "".join(pieces) + ("]" if before else "")


def learnt(build, tokenizer, messages, template=None) -> str:
    if template is not None:
        tokenizer.chat_template = template
    (text,) = shown(tokenizer, build([{"messages": messages}], tokenizer, assistant_only_loss=True))
    return text


def test_answer_at_the_very_start(build):
    """The first token of a sequence never has a label; that of the answer "I" is it."""
    messages = conversation("I", "Hello there", "fine", first="assistant")
    tokenizer = byte_level()
    assert learnt(build, tokenizer, messages, BARE) == "I<|im_start|>Hello there[fine]"
    tokenizer = unigram()  # "▁I" is two of its tokens
    assert tokenizer.tokenize("I") == ["▁", "I"]
    assert learnt(build, tokenizer, messages, BARE) == "[I]<|im_start|> Hello there[fine]"
    assert learnt(build, tokenizer, conversation("one", "I", "Hello there", "fine"), BARE) == (
        "<|im_start|> one[I]<|im_start|> Hello there[fine]"
    )


@pytest.mark.parametrize("make", [words, word_piece])
def test_answer_that_ends_in_a_dropped_newline(make, build):
    """The span ends in a newline that is in no token; transformers reads that as a span to the very end."""
    tokenizer = make()
    messages = conversation("one", "two", "is", "fine")
    text = learnt(build, tokenizer, messages, LINES)
    assert text == "<|user|> one <|assistant|>[two]<|user|> is <|assistant|>[fine]"
    messages += conversation("one")
    assert transformers_mask(tokenizer, messages).count("<|user|>") == 3
    ((_, after),) = [learnt(build, tokenizer, messages).split("[fine]")]
    assert "[" not in after and after.startswith("<|user|>")


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_answer_that_ends_in_an_emoji_of_four_tokens(make, build):
    tokenizer = make()
    assert len(tokenizer.encode("😀", add_special_tokens=False)) >= 4
    messages = conversation("one", "two 😀", "three", "fine 😀")
    text = learnt(build, tokenizer, messages, CLOSED).replace(" ", "")
    assert text == "<|user|>one\n<|assistant|>[two😀]<|end|><|user|>three\n<|assistant|>[fine😀]<|end|>"


@pytest.mark.parametrize("swallows", [[], ["lstrip"], ["rstrip"], ["lstrip", "rstrip"]])
def test_added_tokens_that_swallow_blanks_at_the_edges(swallows, build):
    edge = AddedToken("<|stop|>", special=True, normalized=False, **dict.fromkeys(swallows, True))
    outside = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|stop|>' }}"
        "{% generation %}{{ ' ' + m.content + ' ' }}{% endgeneration %}{{ '<|stop|>' }}"
        "{% else %}{{ '<|user|>' + m.content }}{% endif %}{% endfor %}"
    )
    tokenizer = byte_level(edge)
    text = learnt(build, tokenizer, conversation("one", "two", "three", "fine"), outside)
    before, behind = "" if "rstrip" in swallows else " ", "" if "lstrip" in swallows else " "
    answers = [f"<|stop|>[{before}{answer}{behind}]<|stop|>" for answer in ("two", "fine")]
    assert text == f"<|user|>one{answers[0]}<|user|>three{answers[1]}"
    inside = outside.replace(
        "' ' }}{% endgeneration %}{{ '<|stop|>' }}", "' <|stop|>' }}{% endgeneration %}{{ '\\n' }}"
    )
    text = learnt(build, byte_level(edge), conversation("one", "two", "three", "fine"), inside)
    stop, newline = f"{behind}<|stop|>", "" if "rstrip" in swallows else "\n"
    answers = [f"<|stop|>[{before}{answer}{stop}]{newline}" for answer in ("two", "fine")]
    assert text == f"<|user|>one{answers[0]}<|user|>three{answers[1]}"


_MACRO = (
    "{% macro say(m) %}<|assistant|>{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}{% endmacro %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ say(m) }}{% else %}{{ '<|user|>' + m.content }}"
    "{% endif %}{% endfor %}"
)
_CAPTURED = (
    "{% set text %}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
    "{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}{% else %}{{ '<|user|>' + m.content }}{% endif %}"
    "{% endfor %}{% endset %}{{ text }}"
)


@pytest.mark.parametrize("template", [_MACRO, _CAPTURED])
def test_markers_in_macros_and_captured_text(template, build):
    tokenizer = byte_level()
    messages = conversation("one", "two")
    assert learnt(build, tokenizer, messages, template) == "<|user|>one<|assistant|>[two<|end|>]"
    assert transformers_mask(tokenizer, messages) != "<|user|>one<|assistant|>[two<|end|>]"  # it takes the header
    later = conversation("one", "two", "three", "four")
    expected = "<|user|>one<|assistant|>[two<|end|>]<|user|>three<|assistant|>[four<|end|>]"
    assert learnt(build, tokenizer, later) == expected


@pytest.mark.parametrize("left", ["{%", "{%-", "{%+"])
@pytest.mark.parametrize("right", ["%}", "-%}", "+%}"])
def test_markers_cut_white_space_as_they_say(left, right, build):
    template = (
        "{% for m in messages %}\n  {% if m.role == 'assistant' %}\n<|assistant|>\n"
        f"  {left} generation {right}\n {{{{ m.content }}}}\n  {left} endgeneration {right}\n  "
        "{% else %}\n{{ '<|user|>' + m.content }}\n{% endif %}\n{% endfor %}"
    )
    tokenizer = byte_level()
    tokenizer.chat_template = template
    messages = conversation("one", "two", "three", "four")
    (text,), (spans,) = render_jinja_template([messages], chat_template=template, return_assistant_tokens_mask=True)
    found = ChatTemplate(tokenizer)
    rendered = found.render(Chat(messages=messages, prompt_messages=3))
    assert rendered.text == text
    assert found.generated(rendered) == [(*span, 1.0) for span in spans]
    assert tokenizer.chat_template == template  # the model's own is saved with it


def test_markers_whose_text_is_changed_afterwards_are_an_error(build):
    template = _CAPTURED.replace("{{ text }}", "{{ text | replace('two', 'seven') | trim }}").replace(
        "+ '<|end|>'", "+ '\\n'"
    )
    tokenizer = byte_level()
    tokenizer.chat_template = template
    row = {"messages": conversation("one", "two")}
    with pytest.raises(DataError, match=r"messages\[1\] cannot be located in what the chat template renders"):
        build([row], tokenizer, assistant_only_loss=True)
    assert len(build([row], tokenizer)) == 1


def test_end_of_turn_token_is_learnt_in_every_turn_or_in_none(build):
    messages = conversation("one", "two", "three", "fine")
    none = learnt(build, byte_level(), messages, CLOSED)
    every = learnt(
        build, byte_level(), messages, CLOSED.replace("{% endgeneration %}<|end|>", "<|end|>{% endgeneration %}")
    )
    assert (none.count("]<|end|>"), none.count("<|end|>]")) == (2, 0)
    assert (every.count("]<|end|>"), every.count("<|end|>]")) == (0, 2)


# --- any conversation ------------------------------------------------------------------------------------------------

_CONTENT = st.lists(
    st.sampled_from(
        ["one", "I", " two", "fine ", "\n", "😀", "中文é", "4.", "Hello there", "<|user|>", "<|end|>", "  "]
    ),
    min_size=1,
    max_size=4,
).map("".join)
_CONTENT = _CONTENT.filter(str.strip)
_HEADERS = st.sampled_from(["", "\n", "<|{}|>", "<|im_start|>{}\n", "{}: "])
_FOOTERS = st.sampled_from(["", "\n", "<|end|>", "<|im_end|>\n", "</s>"])


@pytest.fixture(scope="module", params=TOKENIZERS)
def any_tokenizer(request) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


@settings(max_examples=40, deadline=None)
@given(
    contents=st.lists(_CONTENT, min_size=2, max_size=5),
    first=st.sampled_from(["user", "assistant"]),
    header=_HEADERS,
    footer=_FOOTERS,
    footer_inside=st.booleans(),
)
def test_marked_tokens_are_learnt_and_no_others(any_tokenizer, contents, first, header, footer, footer_inside):
    def text(part: str) -> str:
        return "'" + part.replace("\n", "\\n").replace("{}", "' + m.role + '") + "'"

    end = "{{ " + text(footer) + " }}"
    said = "{% generation %}{{ m.content }}" + (
        end + "{% endgeneration %}" if footer_inside else "{% endgeneration %}" + end
    )
    any_tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ " + text(header) + " }}{% if m.role == 'assistant' %}" + said
        + "{% else %}{{ m.content }}" + end + "{% endif %}{% endfor %}"
    )  # fmt: skip
    messages = conversation(*contents, first=first)
    pieces = [("<s>", False)]
    for message in messages:
        own = message["role"] == "assistant"
        pieces += [(header.format(message["role"]), False), (message["content"], own), (footer, own and footer_inside)]
    (row,) = Encoder(any_tokenizer, "messages", assistant_only=True)([{"messages": messages}]).to_pylist()
    if row["problem"] is not None:
        assert "none of its" in row["problem"]
        ids = any_tokenizer.apply_chat_template(messages)["input_ids"]
        assert not any(expected_mask(any_tokenizer, ids, pieces))
        return
    expected = expected_mask(any_tokenizer, row["input_ids"], pieces)
    assert [
        bool(on) if want is not None else None for on, want in zip(row["learnt"], expected, strict=True)
    ] == expected
