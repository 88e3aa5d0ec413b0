"""Columns next to a conversation, other names for columns and speakers, and that each of them makes tokens of its own."""

from __future__ import annotations

import datasets
import pytest
from trl import SFTConfig, SFTTrainer

from packtrain.data.formats import rename_columns
from packtrain.data.loading import find_examples, prepare_examples
from packtrain.data.sources import open_rows
from packtrain.errors import DataError, RecipeError
from packtrain.recipe.reader import load_recipe
from packtrain.recipe.sections import DataSection
from tests.data.helpers import make_tokenizer, shown
from tests.data.templates import TEMPLATES
from tests.data.tokenizers import byte_level
from tests.tiny import tiny_model

USER, ASSISTANT = {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}
TALK = "<|user|>one<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, ASSISTANT], "system": "six"}, "<s>[<|system|>six<|end|>" + TALK + "two</s>]"),
        ({"messages": [USER, ASSISTANT], "system": ""}, "<s>[" + TALK + "two</s>]"),
        ({"prompt": [USER], "completion": [ASSISTANT], "system": "six"}, "<s><|system|>six<|end|>" + TALK + "[two</s>]"),
        ({"question": "one", "answer": "two", "system": "six"}, "<s><|system|>six<|end|>" + TALK + "[two</s>]"),
        (
            {"instruction": "one", "output": "two", "system": "six", "history": [["three", "four"], ["five", "seven"]]},
            "<s><|system|>six<|end|><|user|>three<|end|><|assistant|>four</s><|user|>five<|end|><|assistant|>seven</s>"
            + TALK + "[two</s>]",
        ),
        ({"instruction": "one", "output": "two", "history": []}, "<s>" + TALK + "[two</s>]"),
    ],
)  # fmt: skip
def test_columns_next_to_a_conversation(row, expected, build, chat_tokenizer):
    assert shown(chat_tokenizer, build([row], chat_tokenizer)) == [expected]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [USER | {"role": "system"}, USER], "system": "six"}, "a column 'system' and a system message"),
        ({"messages": [USER], "system": 5}, "'system' is a number, not text: 5"),
        ({"instruction": "one", "output": "two", "history": "x"}, "'history' is text, not a list of pairs"),
        ({"instruction": "one", "output": "two", "history": [["x"]]}, r"history\[0\] is not a pair of texts"),
        ({"messages": [USER], "chat_template_kwargs": [1]}, "'chat_template_kwargs' is a list, not an object"),
        ({"messages": [USER], "chat_template_kwargs": "{"}, "'chat_template_kwargs' is not valid JSON"),
        ({"messages": [USER], "chat_template_kwargs": {"tokenize": True}}, "contains 'tokenize', which is not an argument"),
        ({"prompt": "one", "completion": " two", "system": "six"}, "'system' needs a conversation, .*`data.columns"),
    ],
)  # fmt: skip
def test_columns_that_are_wrong(row, reason, build, chat_tokenizer):
    with pytest.raises(DataError, match=reason):
        build([row], chat_tokenizer)


def test_arguments_of_the_template_go_by_row(build):
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATES["qwen3"].template
    talk = {"messages": [USER, ASSISTANT]}
    rows = [talk, talk | {"chat_template_kwargs": {"enable_thinking": False}}]
    rows += [talk | {"chat_template_kwargs": '{"enable_thinking": false}'}]
    thinking, *quiet = shown(tokenizer, build(rows, tokenizer, assistant_only_loss=True))
    assert thinking.endswith("assistant\n[<think>\n\n</think>\n\ntwo<|im_end|>\n]")
    assert set(quiet) == {thinking.replace("[", "").replace("two", "[two")}


def test_speakers_and_calls_of_sharegpt(build):
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}"
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ m.content or '' }}"
        "{% for c in m.tool_calls %}{{ c.function.name + ' ' + c.function.arguments | tojson }}{% endfor %}"
        "<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    turns = [
        ("human", "one"),
        ("function_call", '{"name": "two", "arguments": "{\\"of\\": 4}"}'),
        ("observation", "four"),
    ]
    row = {"conversations": [{"from": speaker, "value": value} for speaker, value in [*turns, ("gpt", "seven")]]}
    (text,) = shown(tokenizer, build([row | {"tools": '[{"name": "two"}]'}], tokenizer, assistant_only_loss=True))
    call = '<|assistant|>[two {"of": 4}<|end|>]<|tool|>four<|end|>'
    assert text == '[{"name": "two"}]<|user|>one<|end|>' + call + "<|assistant|>[seven<|end|>]"


# --- names -------------------------------------------------------------------------------------------------------------


def test_columns_under_other_names(build, chat_tokenizer):
    row = {"query": "one", "response": "two", "system": "six", "answer": "not this"}
    columns = {"question": "query", "answer": "response"}
    assert shown(chat_tokenizer, build([row], chat_tokenizer, columns=columns)) == [
        "<s><|system|>six<|end|>" + TALK + "[two</s>]"
    ]
    columns["system"] = None
    assert shown(chat_tokenizer, build([row], chat_tokenizer, columns=columns)) == ["<s>" + TALK + "[two</s>]"]
    swapped = {"question": "answer", "answer": "question"}
    row = {"question": "two", "answer": "one"}
    assert shown(chat_tokenizer, build([row], chat_tokenizer, columns=swapped)) == ["<s>" + TALK + "[two</s>]"]


@pytest.mark.parametrize(
    ("mapping", "message", "fix"),
    [
        ({"qestion": "query"}, "`qestion` is not a column that a format reads", "did you mean `question`?"),
        (
            {"spam": "query"},
            "`spam` is not a column that a format reads",
            "the columns that formats read are input_ids",
        ),
        ({"question": "qery"}, "the rows have no column `qery`", "the columns are query, response"),
    ],
)
def test_names_that_are_wrong(mapping, message, fix):
    with pytest.raises(DataError) as error:
        rename_columns(["query", "response"], mapping)
    assert message in str(error.value) and fix in error.value.fix and error.value.key == "data.columns"
    assert rename_columns(["query", "response"], {"question": "query", "system": None}) == ["response", "question"]


RECIPE = """
model: {config: {model_type: llama}, tokenizer_vocab_size: 300}
data: {path: rows.jsonl, DATA}
training: {output_dir: out}
"""


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ("roles: {customer: robot}", "data.roles"),
        ("roles: [customer]", "data.roles"),
        ("columns: {question: 5}", "data.columns"),
        ("columns: query", "data.columns"),
        ("on_lost_content: ignore", "data.on_lost_content"),
    ],
)
def test_recipes_with_wrong_names(data, key, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("DATA", data))
    with pytest.raises(RecipeError, match=key):
        load_recipe(path)


def test_names_through_a_recipe(write_rows, tmp_path, chat_tokenizer):
    turns = [{"from": "customer", "value": "one"}, {"from": "agent", "value": "two"}]
    rows = open_rows(write_rows({"talk": turns, "system": "six"}))
    path = tmp_path / "recipe.yaml"
    names = "columns: {conversations: talk, system: null}, roles: {customer: user, agent: assistant}"
    path.write_text(RECIPE.replace("DATA", names + ", assistant_only_loss: true"))
    section = load_recipe(path).data
    examples, _ = prepare_examples(section, rows, chat_tokenizer, seed=0)
    assert shown(chat_tokenizer, examples) == ["<s>" + TALK + "[two</s>]"]
    path.write_text(RECIPE.replace("DATA", names.partition(", roles")[0]))
    with pytest.raises(DataError, match=r"conversations\[0\] has the unknown role 'customer'"):
        prepare_examples(load_recipe(path).data, rows, chat_tokenizer, seed=0)


def test_every_option_has_tokens_of_its_own(write_rows, chat_tokenizer, cache_dir):
    """In the store, and where `find_examples` looks without rows and tokenizer."""
    row = {"question": "one", "answer": "two", "query": "three", "system": "six"}
    path = str(write_rows(row))
    options = [
        {},
        {"columns": {"question": "query"}},
        {"columns": {"system": None}},
        {"columns": {"question": "query", "system": None}},
        {"roles": {"customer": "user"}},
        {"roles": {"customer": "assistant"}},
        {"on_lost_content": "warn"},
        {"assistant_only_loss": True},
    ]
    made = []
    for chosen in options:
        found, why = find_examples(DataSection(path=path, **chosen), "tiny", seed=0)
        assert found is None and why
        made.append(
            prepare_examples(
                DataSection(path=path, **chosen), open_rows(path), chat_tokenizer, seed=0, tokenizer_key="tiny"
            )[0]
        )
    assert len(list((cache_dir / "tokens").iterdir())) == len(options)
    for chosen, examples in zip(options, made, strict=True):
        found, _ = find_examples(DataSection(path=path, **chosen), "tiny", seed=0)
        assert found.fingerprint == examples.fingerprint
        assert shown(chat_tokenizer, found) == shown(chat_tokenizer, examples)


# --- as TRL does ---------------------------------------------------------------------------------------------------------

ROWS = [
    {"prompt": [USER], "completion": [ASSISTANT]},
    {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
    {"prompt": [USER], "completion": [ASSISTANT, USER, ASSISTANT]},
]


@pytest.mark.parametrize("completion_only", [None, True, False])
def test_assistant_only_and_completion_only_are_trls(completion_only, build, chat_tokenizer, tmp_path):
    options = dict(assistant_only_loss=True, completion_only_loss=completion_only)
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], **options)
    model = tiny_model("llama", vocab_size=512)
    trainer = SFTTrainer(model, args, train_dataset=datasets.Dataset.from_list(ROWS), processing_class=chat_tokenizer)
    for number, example in enumerate(build(ROWS, chat_tokenizer, **options)):
        batch = trainer.data_collator([trainer.train_dataset[number]])
        assert example["input_ids"].tolist() == batch["input_ids"][0].tolist()
        assert example["labels"].tolist() == batch["labels"][0].tolist()


def test_empty_prompts_are_trained_as_trl_does(build, tokenizer, tmp_path):
    rows = [{"prompt": "", "completion": "one two"}, {"prompt": "one", "completion": " two"}]
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], completion_only_loss=True)
    model = tiny_model("llama", vocab_size=512)
    trainer = SFTTrainer(model, args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    examples = build(rows, tokenizer)
    assert shown(tokenizer, examples) == ["<s>[one two</s>]", "<s>one[ two</s>]"]
    for number, example in enumerate(examples):
        batch = trainer.data_collator([trainer.train_dataset[number]])
        assert example["input_ids"].tolist() == batch["input_ids"][0].tolist()
        assert example["labels"][1:].tolist() == batch["labels"][0][1:].tolist()
    with pytest.raises(DataError, match="'completion' is empty"):
        build([{"prompt": "one", "completion": ""}], tokenizer)
