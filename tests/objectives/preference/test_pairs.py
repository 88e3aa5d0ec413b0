"""Rows to pairs, and pairs to batches: what is laid out, in every layout, and which rows are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from packtrain.data.examples import build_examples
from packtrain.data.formats import IGNORED, find_format
from packtrain.data.sources import open_rows
from packtrain.errors import DataError, RecipeError
from packtrain.objectives.pairs import PairCollator, PairExamples
from packtrain.packing.collator import MicroBatches
from packtrain.packing.scopes import MicroBatch
from packtrain.recipe.reader import load_recipe
from tests.data.helpers import CHAT_TEMPLATE, make_tokenizer, shown

USER = {"role": "user", "content": "What is 2+2?"}
YES, NO = {"role": "assistant", "content": "It is 4."}, {"role": "assistant", "content": "the sum"}
CHAT = "<s><|user|>What is 2+2?<|end|><|assistant|>"

# a row, what it becomes
GOOD = {
    "text": (
        {"prompt": "What is 2+2?", "chosen": " It is 4.", "rejected": " the sum"},
        "<s>What is 2+2?[ It is 4.</s>]<s>What is 2+2?[ the sum</s>]",
    ),
    "text, no prompt set apart": (
        {"chosen": "What is 2+2? It is 4.", "rejected": "What is 2+2? the sum"},
        "<s>What is 2+2?[ It is 4.</s>]<s>What is 2+2?[ the sum</s>]",
    ),
    "conversation": (
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        f"{CHAT}[It is 4.</s>]{CHAT}[the sum</s>]",
    ),
    "conversation, no prompt set apart": (
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        f"{CHAT}[It is 4.</s>]{CHAT}[the sum</s>]",
    ),
    "the prompt holds an answer": (
        {"chosen": [USER, YES, USER, YES], "rejected": [USER, YES, USER, NO]},
        None,
    ),
}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(chat_template=CHAT_TEMPLATE)


def examples_of(tmp_path, tokenizer, *rows, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_examples(open_rows(path), tokenizer, completion_only_loss=True, kind="pair", **options)


@pytest.mark.parametrize("name", GOOD)
def test_a_row_becomes_two_documents(name, tmp_path, tokenizer):
    row, expected = GOOD[name]
    examples = examples_of(tmp_path, tokenizer, row)
    if expected is not None:
        assert shown(tokenizer, examples) == [expected]
    pairs = PairExamples(examples)
    (prompt,), (chosen,), (rejected,) = pairs.prompt, pairs.chosen, pairs.rejected
    ids, labels = examples.gather([0])
    assert prompt * 2 + chosen + rejected == len(ids) == pairs.lengths_in("flat")
    first, second = ids[: prompt + chosen], ids[prompt + chosen :]
    assert (first[:prompt] == second[:prompt]).all() and len(second) == prompt + rejected
    assert (labels[:prompt] == IGNORED).all() and (labels[prompt : prompt + chosen] == first[prompt:]).all()


BAD = {
    "equal answers": (
        {"prompt": "a", "chosen": " b", "rejected": " b"},
        "'chosen' and 'rejected' are the same, so neither is preferred",
    ),
    "equal messages": ({"prompt": [USER], "chosen": [YES], "rejected": [dict(YES)]}, "are the same"),
    "no prompt": ({"prompt": None, "chosen": "b", "rejected": "c"}, "'prompt' is null"),
    "an empty prompt": ({"prompt": " ", "chosen": "b", "rejected": "c"}, "'prompt' is empty"),
    "an empty answer": ({"prompt": "a", "chosen": "", "rejected": "c"}, "'chosen' is empty"),
    "a missing answer": ({"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
    "kinds that differ": (
        {"prompt": "a", "chosen": [USER, YES], "rejected": [USER, NO]},
        "must all be text or all be lists of messages, and only 'chosen', 'rejected' are",
    ),
    "a prompt twice": ({"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]}, "begins with the messages"),
    "a user's turn last": ({"prompt": [USER], "chosen": [YES, USER], "rejected": [NO]}, "'chosen': the last message"),
    "a switch": (
        {"prompt": [USER], "chosen": [YES | {"weight": 0}], "rejected": [NO]},
        "chosen[0] has a switch",
    ),
}
BAD_IMPLICIT = {
    "prompts that differ": (
        {"chosen": [NO | {"role": "user"}, YES], "rejected": [USER, NO]},
        "begin with different messages, so there is no prompt that both answer; set it apart in a column 'prompt'",
    ),
    "texts that differ": ({"chosen": "a b", "rejected": "c b"}, "begin differently, so there is no prompt"),
    "no answer": ({"chosen": [USER, YES], "rejected": [USER]}, "'rejected' has no answer: all its messages"),
    "no more text": ({"chosen": "one two", "rejected": "one"}, "'rejected' has no answer: it is the beginning of"),
}


@pytest.mark.parametrize("name", [*BAD, *BAD_IMPLICIT])
def test_bad_pairs_are_named_with_row_and_reason(name, tmp_path, tokenizer):
    row, reason = (BAD | BAD_IMPLICIT)[name]
    good = GOOD["text" if name in BAD else "text, no prompt set apart"][0]
    with pytest.raises(DataError) as refused:
        examples_of(tmp_path, tokenizer, good, row, good)
    said = str(refused.value)
    assert f"rows.jsonl, line 2: {reason}" in said or reason in said.split("line 2: ")[1]
    assert "line 1" not in said and "skip them with `data.on_bad_row: skip`" in said


# how a template begins, which trims what is said: with a letter that the answer decides, behind bos or alone, or with bos
TEMPLATES = {
    "prompts that differ": (
        "{{ bos_token }}{{ 'S' if 'sum' in messages[-1].content else 'N' }}",
        "the prompt of 'chosen' and that of 'rejected' are not the same tokens",
    ),
    "nothing in common": (
        "{{ 'S' if 'sum' in messages[-1].content else 'N' }}",
        "'chosen' and 'rejected' begin with different tokens, so there is no prompt that both answer",
    ),
    "equal answers": ("{{ bos_token }}", "'chosen' and 'rejected' are the same tokens, so neither is preferred"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_pairs_that_a_template_breaks_are_named_with_row_and_reason(name, tmp_path):
    begins, reason = TEMPLATES[name]
    template = CHAT_TEMPLATE.replace("{{ bos_token }}", begins).replace("message.content", "message.content | trim")
    rejected = YES | {"content": "It is 4. "} if name == "equal answers" else NO
    row = {"prompt": [USER], "chosen": [YES], "rejected": [rejected]}
    with pytest.raises(DataError) as refused:
        examples_of(tmp_path, make_tokenizer(chat_template=template), row)
    assert f"rows.jsonl, line 1: {reason}" in str(refused.value)
    assert len(examples_of(tmp_path, make_tokenizer(chat_template=CHAT_TEMPLATE), row)) == 1  # the control


def test_pairs_and_other_rows_are_not_taken_for_each_other():
    assert find_format(["prompt", "chosen", "rejected"], kind="pair") == ("preference", [])
    assert find_format(["chosen", "rejected"], kind="pair") == ("preference_implicit", [])
    for columns, kind in ((["prompt", "chosen", "rejected"], "example"), (["prompt", "completion"], "pair")):
        with pytest.raises(DataError, match="choose an objective for"):
            find_format(columns, kind=kind)
        with pytest.raises(DataError, match="which the objective does not learn from"):
            find_format(columns, "text" if kind == "pair" else "preference", kind=kind)


# ------------------------------------------------------------------------------------------------------ batches

ROWS = [
    {"prompt": "What is 2+2?", "chosen": " It is 4.", "rejected": " one"},
    {"prompt": "one", "chosen": " two", "rejected": " two three four"},
]


@pytest.fixture
def examples(tmp_path, tokenizer):
    return examples_of(tmp_path, tokenizer, *ROWS)


def batch_of(examples: PairExamples, *, layout="flat", shared=False, last_only=False) -> dict:
    ids = np.arange(len(examples))
    micro_batch = MicroBatch(example_ids=ids, starts=np.zeros_like(ids), stops=examples.lengths)
    collator = PairCollator(layout=layout, pad_token_id=0, shared=shared, last_only=last_only)
    return MicroBatches(examples, collator)[micro_batch]


def predictions(batch) -> list[tuple[int, list[int], int]]:
    """What the model is asked at every supervised position: (document, tokens that it sees, the token to predict)."""
    ids, found = batch["input_ids"], []
    labels = batch["labels"].flatten()
    width = ids.shape[1]
    for target, predictor, document in zip(
        batch["supervised_index"].tolist(),
        batch["predictors"].tolist(),
        batch["pairs"]["document"].tolist(),
        strict=True,
    ):
        row, column = divmod(predictor, width)
        if "cu_seq_lens_q" not in batch:
            seen = ids[row, : column + 1]
        elif "key_index" not in batch:
            seen = ids[0, batch["cu_seq_lens_q"][document] : column + 1]
        else:
            start, stop = batch["cu_seq_lens_k"][document : document + 2].tolist()
            keys = batch["key_index"][start:stop]
            seen = ids[0, keys[keys <= predictor]]
            first = int(batch["cu_seq_lens_q"][document])
            own = first if document % 2 else first + len(seen) - 1
            assert predictor >= own or predictor < first, "predicted from its own document or from the prompt"
        assert int(batch["position_ids"][row, column]) == len(seen) - 1
        found.append((document, seen.tolist(), int(labels[target])))
    return found


def test_every_layout_asks_the_same(examples):
    flat = batch_of(PairExamples(examples))
    padded = batch_of(PairExamples(examples, layout="padded"), layout="padded")
    shared = batch_of(PairExamples(examples, shared=True), shared=True)
    assert predictions(flat) == predictions(padded) == predictions(shared)
    assert (
        flat["example_ids"].tolist() == padded["example_ids"].tolist() == shared["example_ids"].tolist() == [0, 0, 1, 1]
    )
    assert padded["input_ids"].shape[0] == 4
    for batch in (flat, padded, shared):
        tokens = np.bincount(batch["pairs"]["document"], minlength=4)
        assert tokens.tolist() == batch["pairs"]["tokens"].tolist()
        assert batch["loss_weights"].sum() == len(batch["supervised_index"])
        assert (batch["labels"].flatten()[batch["supervised_index"]] != IGNORED).all()


def test_a_plan_counts_what_a_layout_computes(examples):
    for layout, shared in (("flat", False), ("padded", False), ("flat", True)):
        pairs = PairExamples(examples, layout=layout, shared=shared)
        one = batch_of(PairExamples(examples.take([0]), layout=layout, shared=shared), layout=layout, shared=shared)
        assert one["input_ids"].numel() == pairs.lengths[0]
    assert PairExamples(examples).longest == max(batch_of(PairExamples(examples))["cu_seq_lens_q"].diff().tolist())


def test_the_last_token_alone(examples):
    flat = batch_of(PairExamples(examples), last_only=True)
    assert flat["supervised_index"].tolist() == (flat["cu_seq_lens_q"][1:] - 1).tolist()
    shared = batch_of(PairExamples(examples, shared=True), shared=True, last_only=True)
    assert shared["supervised_index"].tolist() == (shared["cu_seq_lens_q"][1:] - 1).tolist()
    assert PairCollator(layout="flat", shared=True).empty()["pairs"]["of"].shape == (0, 2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["overflow=truncate"], "the answers to a prompt are needed whole"),
        (["shapes=2"], "this objective takes the answers to a prompt together"),
        (["strategy=pad_max"], "choose pad_longest"),
        (["strategy=wrapped"], "needs whole ones"),
        (["strategy=pad_longest"], "needs a flat layout"),
        (["model.attn_implementation=sdpa"], "knows of prompts that documents share"),
        (["completion_only_loss=false"], "answers are learnt from, and not their prompt"),
        (["assistant_only_loss=true"], "whole answers are learnt from"),
        (["label_smoothing=0.1"], "has no effect on the loss `sigmoid`"),
        (["loss_type=exo_pair"], "must be above 0"),
        (["label_smoothing=0.5"], "a number from 0 to below 0.5"),
        (["loss_type=dpo"], "one of sigmoid"),
    ],
)
def test_settings_that_contradict_pairs_are_refused(changes, reason):
    with pytest.raises(RecipeError) as refused:
        load_recipe("dpo_lora", changes)
    assert reason in str(refused.value)
    load_recipe("dpo_lora")
