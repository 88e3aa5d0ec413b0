"""Loss masks: where prompts end, what the assistant says, and special tokens that must stand exactly once."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from packtrain.errors import DataError
from tests.data.helpers import CHAT_TEMPLATE, make_tokenizer, shown

USER, ASSISTANT = {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}
TWO_TURNS = {
    "messages": [USER, ASSISTANT, {"role": "user", "content": "three"}, {"role": "assistant", "content": "four"}]
}
PROMPTED = {"prompt": "one two", "completion": " three"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "<s>[<|user|>one<|end|><|assistant|>two</s><|user|>three<|end|><|assistant|>four</s>]"),
        (
            {"assistant_only_loss": True},
            "<s><|user|>one<|end|><|assistant|>[two</s>]<|user|>three<|end|><|assistant|>[four</s>]",
        ),
        (
            {"completion_only_loss": True},  # the last message is the completion
            "<s><|user|>one<|end|><|assistant|>two</s><|user|>three<|end|><|assistant|>[four</s>]",
        ),
    ],
)
def test_conversation(options, expected, build, chat_tokenizer):
    assert shown(chat_tokenizer, build([TWO_TURNS], chat_tokenizer, **options)) == [expected]


@pytest.mark.parametrize(
    ("completion_only", "expected"),
    [(None, "<s>one two[ three</s>]"), (True, "<s>one two[ three</s>]"), (False, "<s>[one two three</s>]")],
)
def test_completion(completion_only, expected, build, tokenizer):
    examples = build([PROMPTED], tokenizer, completion_only_loss=completion_only)
    assert shown(tokenizer, examples) == [expected]


def test_assistant_only_and_completion_only_intersect(build, chat_tokenizer):
    """As TRL does: an assistant turn of the prompt is not learnt, and no user turn of the completion."""
    messages = TWO_TURNS["messages"]
    later = "<s><|user|>one<|end|><|assistant|>two</s><|user|>three<|end|><|assistant|>[four</s>]"
    row = {"prompt": messages[:3], "completion": messages[3:]}
    assert shown(chat_tokenizer, build([row], chat_tokenizer, assistant_only_loss=True)) == [later]
    row = {"prompt": messages[:1], "completion": messages[1:]}
    both = "<s><|user|>one<|end|><|assistant|>[two</s>]<|user|>three<|end|><|assistant|>[four</s>]"
    assert shown(chat_tokenizer, build([row], chat_tokenizer, assistant_only_loss=True)) == [both]
    options = dict(assistant_only_loss=True, completion_only_loss=True)
    assert shown(chat_tokenizer, build([TWO_TURNS], chat_tokenizer, **options)) == [later]
    options = dict(assistant_only_loss=True, completion_only_loss=False)
    assert shown(chat_tokenizer, build([row], chat_tokenizer, **options)) == [both]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "one"}, "<s>[one</s>]"),
        ({"text": "<s>one"}, "<s>[one</s>]"),  # a BOS of the row's own is not doubled
        ({"text": "one</s>"}, "<s>[one</s>]"),  # neither is an eos
        ({"text": "<s>one</s>"}, "<s>[one</s>]"),
        ({"prompt": "<s>one", "completion": " two</s>"}, "<s>one[ two</s>]"),
        ({"prompt": "one</s>", "completion": " two"}, "<s>one</s>[ two</s>]"),  # an eos elsewhere stays
    ],
)
def test_special_tokens_stand_once(row, expected, build, tokenizer):
    assert shown(tokenizer, build([row], tokenizer)) == [expected]


def test_tokenizer_without_bos_gets_none(build):
    tokenizer = make_tokenizer(bos=False)
    assert shown(tokenizer, build([PROMPTED], tokenizer)) == ["one two[ three</s>]"]


def test_pad_that_is_eos_hides_nothing(build, tokenizer):
    makeshift = make_tokenizer(pad_token="</s>")
    assert makeshift.pad_token_id == makeshift.eos_token_id
    (example,) = build([PROMPTED], makeshift)
    assert example["labels"][-1] == makeshift.eos_token_id
    assert shown(makeshift, build([PROMPTED], makeshift)) == shown(tokenizer, build([PROMPTED], tokenizer))


# --- where a prompt ends -----------------------------------------------------------------------------------------


def tokens_of(tokenizer, example) -> list[str]:
    return tokenizer.convert_ids_to_tokens(example["input_ids"])


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Knows single letters, and merges `b c` into one token wherever they meet."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "a", "b", "c", "d", "bc"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("b", "c")]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def test_prompt_that_ends_inside_a_token(build):
    """`ab|cd` is `a bc d` as a whole; the model will be prompted with `a b`, so that is what it is trained on."""
    tokenizer = merging_tokenizer()
    assert tokenizer.tokenize("abcd") == ["a", "bc", "d"]
    examples = build([{"prompt": "ab", "completion": "cd"}], tokenizer)
    assert tokens_of(tokenizer, examples[0]) == ["a", "b", "c", "d", "</s>"]
    assert shown(tokenizer, examples) == ["ab[cd</s>]"]
    assert examples.report.notes == (
        "prompts that end inside a token of the whole text: 1 (tokenised separately from their completions)",
    )


def test_prompt_that_ends_between_tokens_is_tokenised_with_its_completion(build):
    tokenizer = merging_tokenizer()
    examples = build([{"prompt": "a", "completion": "bcd"}], tokenizer)
    assert tokens_of(tokenizer, examples[0]) == ["a", "bc", "d", "</s>"]
    assert examples.report.notes == ()


def test_no_blank_before_a_continuation(build):
    """A SentencePiece-like tokenizer puts a blank before every text; the completion is not the start of one."""
    pieces = ["<pad>", "</s>", "▁", "a", "b", "c", "d", "bc", "\n"]
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[("b", "c")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    assert tokenizer.tokenize("cd") == ["▁", "c", "d"]  # what a naive split would append
    (example,) = build([{"prompt": "ab", "completion": "cd"}], tokenizer)
    assert tokens_of(tokenizer, example) == ["▁", "a", "b", "c", "d", "</s>"]


def test_template_that_renders_a_prompt_otherwise_when_an_answer_follows(build):
    """As some thinking models do: the generation prompt opens a block that a finished turn does not have."""
    template = CHAT_TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|>seven{% endif %}")
    assert template != CHAT_TEMPLATE
    tokenizer = make_tokenizer(chat_template=template)
    examples = build([{"question": "one", "answer": "two"}], tokenizer)
    assert shown(tokenizer, examples) == ["<s><|user|>one<|end|><|assistant|>[two</s>]"]
    assert any("renders differently" in note for note in examples.report.notes)


def test_thinking_header_inside_the_rendered_answer_is_prompt(build):
    """Where generation prompt and finished turn agree (Qwen3's empty thinking block), the header is not learnt."""
    template = CHAT_TEMPLATE.replace("{% generation %}", "{% generation %}{{ 'six' }}").replace(
        "<|assistant|>{% endif %}", "<|assistant|>six{% endif %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    examples = build([{"question": "one", "answer": " two"}], tokenizer)
    assert shown(tokenizer, examples) == ["<s><|user|>one<|end|><|assistant|>six[ two</s>]"]
    assert not any("renders differently" in note for note in examples.report.notes)


def test_template_that_never_ends_a_turn_is_noted(build, chat_tokenizer):
    endless = make_tokenizer(chat_template=CHAT_TEMPLATE.replace(" + eos_token", ""))
    row = {"question": "one", "answer": "two"}
    assert any("without a supervised eos_token (</s>): 1" in note for note in build([row], endless).report.notes)
    assert build([row], chat_tokenizer).report.notes == ()


# --- options that don't go together ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"text": "one"}, {"completion_only_loss": True}, "rows of format `text` have none"),
        ({"input_ids": [1, 2]}, {"completion_only_loss": True}, "rows of format `input_ids` have none"),
        ({"text": "one"}, {"assistant_only_loss": True}, "needs conversations"),
    ],
)
def test_options_that_contradict(row, options, message, build, chat_tokenizer):
    with pytest.raises(DataError, match=message):
        build([row], chat_tokenizer, **options)


def test_plain_text_needs_an_eos(build, tokenizer):
    endless = make_tokenizer()
    endless.eos_token = None
    with pytest.raises(DataError, match="no eos_token"):
        build([PROMPTED], endless)
