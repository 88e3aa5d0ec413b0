"""Conversations of which every turn is an answer: what is laid out, and that it trains as the turns written out as rows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from packtrain.cli import main
from packtrain.data.examples import build_examples
from packtrain.data.sources import open_rows
from packtrain.errors import DataError
from packtrain.modeling.attention.prefixes import KEY as SHARED
from tests.data.helpers import CHAT_TEMPLATE, make_tokenizer, shown
from tests.launch.helpers import run
from tests.objectives.helpers import Leaking, answers_of, asked, batch_of, gradients, made, whole_batch, worst, write
from tests.objectives.preference.helpers import WORDS, leaking, pair_recipe

# as templates of thinking models: what was thought before the last question is left out
THINKING = (
    "{{ bos_token }}"
    "{% set ns = namespace(last=-1) %}"
    "{% for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{{ '<|' + message.role + '|>' }}"
    "{% if message.role == 'assistant' and loop.index0 < ns.last %}{{ message.content.split('</think>')[-1] + eos_token }}"
    "{% elif message.role == 'assistant' %}{{ message.content + eos_token }}"
    "{% else %}{{ message.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

LONG = {"data__max_length": 2000, "batching__max_tokens": 2000}


def said(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content} | more


def conversations(count: int) -> list[dict]:
    """Of one to four turns, a thought in each; every third begins with a system prompt."""
    draw = np.random.default_rng(0)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choice(WORDS, size=draw.integers(low, high)))

    rows = []
    for number in range(count):
        messages = [said("system", text(3, 9))] if number % 3 == 0 else []
        for _ in range(number % 4 + 1):
            messages += [said("user", text(2, 15)), said("assistant", f"<think>{text(2, 9)}</think>{text(1, 12)}")]
        rows.append({"messages": messages})
    return rows


def written_out(rows: list[dict]) -> list[dict]:
    """A row for every turn of the assistant, its prompt all that was said before."""
    return [
        {"prompt": row["messages"][:number], "completion": [message]}
        for row in rows
        for number, message in enumerate(row["messages"])
        if message["role"] == "assistant"
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(chat_template=THINKING)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("rows") / "rows.jsonl", conversations(12))


@pytest.fixture(scope="module")
def options(tokenizer, tmp_path_factory) -> dict:
    """Of recipes whose tokenizer is the same, whatever the rows are."""
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return {"model__tokenizer_name_or_path": str(path), "model__tokenizer_vocab_size": None} | LONG


# ------------------------------------------------------------------------------------------------- rows and batches

TWO = [
    said("user", "one?"),
    said("assistant", "<think>two</think>three"),
    said("user", "four?"),
    said("assistant", "five"),
]
FIRST = "<s><|user|>one?<|end|><|assistant|>"
SECOND = f"{FIRST}three</s><|user|>four?<|end|><|assistant|>"
SYSTEM = FIRST.replace("<s>", "<s><|system|>six<|end|>")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": TWO}, f"{FIRST}[<think>two</think>three</s>]{SECOND}[five</s>]"),
        (
            {"conversations": [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "two"}]},
            f"{FIRST}[two</s>]",
        ),
        ({"messages": [TWO[0], TWO[1] | {"weight": 0}, *TWO[2:]]}, f"{SECOND}[five</s>]"),
        (
            {"messages": TWO[:3], "system": "six"},
            f"{SYSTEM}[<think>two</think>three</s>]",
        ),
    ],
)
def test_every_turn_becomes_a_document_after_all_before_it(row, expected, tmp_path, tokenizer):
    examples = answers_of(tmp_path / "rows.jsonl", tokenizer, row)
    assert shown(tokenizer, examples) == [expected]
    left_out = "the messages behind the last answer are left out: 1 row (the first is rows.jsonl, line 1)"
    assert (left_out in examples.report.notes) == ("system" in row)


BAD = {
    "no answer": ([TWO[0]], "none of its messages is an answer of the assistant that is learnt"),
    "all switched off": ([TWO[0], TWO[1] | {"weight": 0}], "none of its messages is an answer"),
    "an answer to nothing": (
        [said("assistant", "hello"), *TWO],
        'messages[0] has no message before it that it answers (give it "weight": 0, or leave it out)',
    ),
    "a factor": (
        [TWO[0], TWO[1] | {"weight": 0.5}],
        "messages[1] has the weight 0.5, and an answer is learnt whole or not",
    ),
    "a question switched on": (
        [TWO[0] | {"train": True}, TWO[1]],
        "messages[0] has a switch that is on, and only what",
    ),
    "an empty answer": ([TWO[0], said("assistant", " ")], "the content of messages[1] is empty"),
    "a template that fails": ([*TWO[:3], said("assistant", "five"), said("developer", "six"), *TWO], "messages[4]: "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_conversations_are_named_with_row_and_reason(name, tmp_path):
    messages, reason = BAD[name]
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE)  # which takes no developers
    good = {"messages": TWO}
    with pytest.raises(DataError) as refused:
        answers_of(tmp_path / "rows.jsonl", tokenizer, good, {"messages": messages}, good)
    text = str(refused.value)
    assert reason in text.split("rows.jsonl, line 2: ")[1]
    assert "line 1" not in text and "skip them with `data.on_bad_row: skip`" in text


def test_rows_of_another_objective_are_tokenised_anew(tmp_path, tokenizer):
    rows = open_rows(write(tmp_path / "rows.jsonl", [{"messages": TWO}]))
    whole = build_examples(rows, tokenizer, completion_only_loss=True)
    turns = build_examples(rows, tokenizer, completion_only_loss=True, kind="answers", format="messages")
    assert shown(tokenizer, whole) == [f"{SECOND}[five</s>]"] != shown(tokenizer, turns)


@pytest.mark.parametrize("weighting", ["token", "example"])
def test_every_layout_asks_what_the_turns_written_out_ask(weighting, tmp_path, tokenizer):
    rows = conversations(8)
    examples = answers_of(tmp_path / "rows.jsonl", tokenizer, *rows)
    flat, shared = (batch_of(examples, shared=shared, loss_weighting=weighting) for shared in (False, True))
    expected = asked(flat)
    assert expected == asked(batch_of(examples, layout="padded", loss_weighting=weighting)) == asked(shared)
    with pytest.raises(AssertionError):  # the control: turns that see the answers of others
        asked(shared | leaking(shared))
    single = build_examples(open_rows(write(tmp_path / "written.jsonl", written_out(rows))), tokenizer)
    ids, labels = single.gather(np.arange(len(single)))
    assert np.array_equal(flat["input_ids"][0], ids) and np.array_equal(flat["labels"][0], labels)
    assert len(shared["example_ids"]) == len(single) == 20
    assert sum(weight for _, _, weight in expected) == pytest.approx(
        8 if weighting == "example" else (labels >= 0).sum()
    )


def test_turns_take_the_tokens_of_the_conversation_where_the_template_leaves_nothing_out(tmp_path, tokenizer):
    rows, found = conversations(8), {}
    for name, template in {"all": CHAT_TEMPLATE, "thinking": THINKING}.items():
        chosen = make_tokenizer(chat_template=template)
        found[name] = batch_of(answers_of(tmp_path / f"{name}.jsonl", chosen, *rows), shared=True)["input_ids"].numel()
        whole = build_examples(open_rows(tmp_path / f"{name}.jsonl"), chosen, assistant_only_loss=True).lengths.sum()
        assert (found[name] == whole) == (name == "all")


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.slow
@pytest.mark.ci
def test_losses_and_gradients_are_those_of_the_turns_written_out(rows, tmp_path, options):
    table = [json.loads(line) for line in rows.read_text().splitlines()]
    single = made(write(tmp_path / "written.jsonl", written_out(table)), tmp_path / "run", name="causal_lm", **options)
    loss, expected = gradients(single, whole_batch(single))
    for more in ({"shared": True}, {}, {"batching__strategy": "pad_longest"}):
        trainer = made(rows, tmp_path / "run", **options, **more)
        batch = whole_batch(trainer)
        assert (SHARED in batch) == ("shared" in more)
        found, grads = gradients(trainer, batch)
        assert abs(found / loss - 1) < 1e-6 and worst(grads, expected) < 1e-6, more
        if "shared" in more:
            before, prefixes = np.array(batch[SHARED].prefixes[:-1]), np.array(batch[SHARED].prefixes[1:])
            assert ((prefixes > before) & (before > 0)).any()  # a prefix that has one itself
            leaks, grads = gradients(trainer, whole_batch(trainer, Leaking(layout="flat", shared=True)))
            assert abs(leaks / loss - 1) > 1e-5 and worst(grads, expected) > 1e-2
    # the control: the conversation as one document, in which the template leaves earlier thoughts out
    other = made(rows, tmp_path / "run", name="causal_lm", data__assistant_only_loss=True, **options)
    found, grads = gradients(other, whole_batch(other))
    assert abs(found / loss - 1) > 1e-3 and worst(grads, expected) > 1e-2


def test_plan_and_show_draw_turns(rows, tmp_path, options, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    recipe = tmp_path / "recipe.yaml"
    given = pair_recipe(rows, tmp_path / "run", **options).to_dict(given=True)
    recipe.write_text(json.dumps(given | {"objective": {"name": "several_answers", "shared_prefix": True}}))

    def printed(*args: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*args])
        assert not ended.value.code
        return capsys.readouterr().out

    out = printed("show", str(recipe), "--examples", "3")
    assert "12 rows (messages)" in out and "· answer 1 of 4 ─" in out
    goes_on = re.findall(r"answer \d of 4, goes on from the first (\d+) tokens of document (\d)", out)
    assert [document for _, document in goes_on] == ["0", "1", "2"]
    shared = [int(tokens) for tokens, _ in goes_on]
    assert shared == sorted({*shared})  # each goes on from more than the one before it
    out = printed("plan", str(recipe))
    assert "answers: 30 in 12 examples, 1 to 4 in each" in out and "what they share is laid out once" in out


@pytest.mark.slow
def test_two_ranks_do_what_one_does(rows, tmp_path):
    """One process, and two that `accelerate launch` starts."""
    template = tmp_path / "template.jinja"
    template.write_text(THINKING)
    options = (
        f"data.path={rows}", f"model.chat_template={template}", "data.max_length=1400", "batching.max_tokens=1400",
        "objective.name=several_answers", "objective.shared_prefix=true", "batching.examples_per_step=6",
    )  # fmt: skip
    (alone,) = run(tmp_path / "alone", None, 1, *options)
    assert alone["examples"] == 12
    both = run(tmp_path / "both", "ddp", 2, *options)
    for rank in both:
        for figure in ("losses", "norms"):
            np.testing.assert_allclose([*rank[figure].values()], [*alone[figure].values()], rtol=1e-4)
    read = [{step: sorted(ids) for step, ids in each["read"].items()} for each in (alone, *both)]
    assert read[0] == {step: sorted(read[1][step] + read[2][step]) for step in read[0]}
    for ids in read[0].values():  # every row with all its turns, of which the four kinds have one to four
        assert {ids.count(one) for one in ids} <= {1, 2, 3, 4} and len({*ids}) == 6 < len(ids)
    assert all(set(one) < set(ids) for one, ids in zip(read[1].values(), read[0].values(), strict=True))
