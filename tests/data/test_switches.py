"""Switches of messages: which turns are learnt, how much each counts, and what of it reaches the loss."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from packtrain.data.examples import build_examples
from packtrain.data.messages import SWITCHES
from packtrain.data.sources import open_rows
from packtrain.errors import DataError
from packtrain.objectives.causal import causal_lm_losses
from packtrain.objectives.task import load_task
from packtrain.packing.collator import collate_flat, collate_padded
from packtrain.recipe.reader import load_recipe
from tests.data.helpers import CHAT_TEMPLATE, make_tokenizer, shown
from tests.data.templates import TEMPLATES
from tests.tiny import tiny_model

UNMARKED = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture(params=[CHAT_TEMPLATE, UNMARKED], ids=["markers", "no markers"])
def tokenizer(request):
    return make_tokenizer(chat_template=request.param)


def talk(*switches: object, key: str = "weight") -> list[dict]:
    words = ["one", "two", "three", "four"]
    return [
        {"role": ("user", "assistant")[n % 2], "content": word} | ({} if switch is None else {key: switch})
        for n, (word, switch) in enumerate(zip(words, switches, strict=True))
    ]


U1, A1, U2, A2 = "<|user|>one<|end|>", "<|assistant|>", "<|user|>three<|end|>", "<|assistant|>"


@pytest.mark.parametrize("key", SWITCHES)
@pytest.mark.parametrize(
    ("switches", "options", "expected"),
    [
        ((None, None, None, 0), {}, f"<s>[{U1}{A1}two</s>{U2}{A2}]four</s>"),
        ((0, None, None, None), {}, f"<s>[<|user|>]one<|end|>[{A1}two</s>{U2}{A2}four</s>]"),
        ((None, False, None, None), {}, f"<s>[{U1}{A1}]two</s>[{U2}{A2}four</s>]"),
        ((None, 0, None, None), {"assistant_only_loss": True}, f"<s>{U1}{A1}two</s>{U2}{A2}[four</s>]"),
        ((None, 1, None, 0), {"assistant_only_loss": True}, f"<s>{U1}{A1}[two</s>]{U2}{A2}four</s>"),
        (
            (None, 1, True, 1),
            {"assistant_only_loss": True},
            f"<s>{U1}{A1}[two</s>]<|user|>[three<|end|>]{A2}[four</s>]",
        ),
        ((None, 1, None, None), {"completion_only_loss": True}, f"<s>{U1}{A1}two</s>{U2}{A2}[four</s>]"),
    ],
)
def test_turns_are_switched(key, switches, options, expected, tokenizer, build):
    (text,) = shown(tokenizer, build([{"messages": talk(*switches, key=key)}], tokenizer, **options))
    assert text == expected


def test_switches_that_are_on_change_nothing(build):
    """Not even the tokens, where a prompt ends inside one: `Assistant: ` and `two`, as the model is prompted."""
    tokenizer = make_tokenizer(chat_template=TEMPLATES["plain"].template)
    on = build([{"messages": talk(None, 1, None, True)}], tokenizer, completion_only_loss=True)
    none = build([{"messages": talk(None, None, None, None)}], tokenizer, completion_only_loss=True)
    assert on[0]["input_ids"].tolist() == none[0]["input_ids"].tolist()
    assert shown(tokenizer, on) == shown(tokenizer, none)
    assert shown(tokenizer, on)[0].endswith("Assistant: [four\n]")


def test_completion_that_is_switched_off_leaves_nothing(tokenizer, build):
    with pytest.raises(DataError, match="none of its"):
        build([{"messages": talk(None, None, None, 0)}], tokenizer, completion_only_loss=True)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"weight": -1}, "'weight' of messages[1] is -1"),
        ({"weight": "0"}, "'weight' of messages[1] is '0'"),
        ({"weight": 1e39}, "'weight' of messages[1] is 1e+39, which 32 bits can't hold"),
        ({"weight": 1e-300}, "'weight' of messages[1] is 1e-300, which 32 bits can't hold"),
        ({"weight": 1, "train": False}, "messages[1] has switches that contradict each other"),
    ],
)
def test_switches_that_are_none_are_bad_rows(extra, reason, tokenizer, build):
    messages = talk(None, None, None, None)
    messages[1] |= extra
    with pytest.raises(DataError) as error:
        build([{"messages": messages}], tokenizer)
    assert reason in str(error.value)


@pytest.mark.parametrize("key", ["trainable", "wieght", "masked"])
def test_unknown_switches_are_noted(tokenizer, build, key):
    notes = build([{"messages": talk(None, 0, None, None, key=key)}], tokenizer).report.notes
    assert any(
        note.startswith(f"message key '{key}' looks like a switch, and is none (weight, train") for note in notes
    )
    for known in ("weight", "note"):  # a switch, and a key like none
        notes = build([{"messages": talk(None, 0, None, None, key=known)}], tokenizer).report.notes
        assert not any("switch" in note for note in notes)


# --- factors ---------------------------------------------------------------------------------------------------------

ROWS = [
    {"messages": talk(None, 0.25, None, None)},
    {"messages": talk(None, None, None, None)},
    {"messages": talk(None, 0, 0.5, 3)},
]


@pytest.fixture
def examples(tokenizer, build):
    return build(ROWS, tokenizer, assistant_only_loss=True)


def expected_factors(tokenizer, example, row) -> list[float]:
    """By the places of the turns' words among the tokens; 1 where the row says nothing."""
    tokens = tokenizer.convert_ids_to_tokens(example["input_ids"])
    factors, at = [1.0] * len(tokens), 0
    for message in row["messages"]:
        own = tokenizer.tokenize(message["content"]) + [{"assistant": "</s>"}.get(message["role"], "<|end|>")]
        at = next(n for n in range(at, len(tokens)) if tokens[n : n + len(own)] == own)
        factors[at : at + len(own)] = [message.get("weight", 1.0) or 1.0] * len(own)  # 0: no label, and no factor
        at += len(own)
    return factors


def test_factors_stand_at_the_tokens_of_their_turns(examples, tokenizer):
    assert examples.has_factors
    for number, row in enumerate(ROWS):
        expected = expected_factors(tokenizer, examples[number], row)
        assert examples.factors([number]).tolist() == expected
    every = np.concatenate([expected_factors(tokenizer, examples[n], ROWS[n]) for n in (2, 0)])
    for same in (examples.take([2, 0]), pickle.loads(pickle.dumps(examples.take([2, 0])))):
        assert same.factors([0, 1]).tolist() == every.tolist()
    assert sorted(set(every)) == [0.25, 0.5, 1, 3]


def test_without_fractions_there_are_no_factors(tokenizer, build):
    examples = build([{"messages": talk(None, 0, None, 1)}], tokenizer, assistant_only_loss=True)
    assert not examples.has_factors and examples.factors([0]) is None


@pytest.mark.parametrize("max_length", [3, 4, 5, 7])
def test_pieces_of_a_row_keep_their_factors(max_length, examples, tokenizer, write_rows):
    whole = {n: examples.factors([n]) for n in range(3)}
    rows = open_rows(write_rows(*ROWS))
    pieces = build_examples(rows, tokenizer, assistant_only_loss=True, max_length=max_length, overflow="split")
    starts = pieces._view.starts
    for piece in range(len(pieces)):
        row, start = pieces.rows[piece], starts[piece]
        assert pieces.factors([piece]).tolist() == whole[row][start : start + pieces.lengths[piece]].tolist()
        part = pieces.factors([piece], np.array([1]), np.array([pieces.lengths[piece]]))
        assert part.tolist() == whole[row][start + 1 : start + pieces.lengths[piece]].tolist()


@pytest.mark.parametrize("loss_weighting", ["token", "example"])
def test_factors_multiply_the_loss(loss_weighting, examples):
    """Both layouts give each token its factor, and the loss is what it is literally."""
    model = tiny_model("llama", vocab_size=512)
    ids = np.arange(3)
    tokens, labels = examples.gather(ids)
    arguments = dict(factors=examples.factors(ids), loss_weighting=loss_weighting)
    flat = collate_flat(tokens, labels, examples.lengths[ids], ids, **arguments)
    padded = collate_padded(tokens, labels, examples.lengths[ids], ids, pad_token_id=0, **arguments)

    total, denominator = 0.0, 0.0
    for number in range(3):
        example, factors = examples[number], examples.factors([number])
        with torch.no_grad():
            logits = model(torch.tensor(example["input_ids"])[None]).logits[0]
        targets = [at for at in range(1, len(factors)) if example["labels"][at] != -100]
        share = 1 / len(targets) if loss_weighting == "example" else 1.0
        for at in targets:
            weight = share * float(factors[at])
            total -= weight * logits[at - 1].log_softmax(-1)[example["labels"][at]].item()
            denominator += weight
        row = padded["loss_weights"][number]
        assert row[targets].tolist() == pytest.approx([share * float(factors[at]) for at in targets])
        assert row.sum().item() == pytest.approx(sum(share * float(factors[at]) for at in targets))
    for batch in (flat, padded):
        assert batch["loss_weights"].dtype == torch.float32
        assert batch["loss_weights"].sum().item() == pytest.approx(denominator)
    with torch.no_grad():
        found = causal_lm_losses(model, padded)
    loss = (found.nll * found.weights).sum() / found.weights.sum()
    assert loss.item() == pytest.approx(total / denominator, rel=1e-5)
    assert found.nll.mean().item() != pytest.approx(total / denominator, rel=1e-4)  # control: without factors


RECIPE = """
model: {config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4},
        tokenizer_name_or_path: TOKENIZER}
data: {path: ROWS, COLUMNS}
objective: {name: OBJECTIVE}
training: {output_dir: OUT, max_steps: 1}
"""


@pytest.mark.parametrize("objective", ["causal_lm", "masked_diffusion", "block_diffusion", "sequence_classification"])
def test_objectives_that_do_not_weigh_tokens_refuse(objective, write_rows, tmp_path):
    saved = make_tokenizer(chat_template=UNMARKED)
    saved.add_special_tokens({"mask_token": "<|tool|>"})
    saved.save_pretrained(tmp_path / "tokenizer")
    recipe = tmp_path / "recipe.yaml"

    def load(rows: list[dict]):
        path = write_rows(*({**row, "label": n % 2} for n, row in enumerate(rows)))
        text = RECIPE.replace("TOKENIZER", str(tmp_path / "tokenizer")).replace("ROWS", str(path))
        columns = "completion_only_loss: true" if "diffusion" in objective else "max_length: 512"
        recipe.write_text(
            text.replace("OBJECTIVE", objective).replace("COLUMNS", columns).replace("OUT", str(tmp_path / "out"))
        )
        return load_task(load_recipe(recipe))

    halves = [{"messages": talk(None, None, None, 0.5)}, {"messages": talk(None, 0, None, 0.5)}]
    if objective == "causal_lm":
        assert load(halves).train.has_factors
        return
    with pytest.raises(DataError, match="this objective does not weigh tokens") as error:
        load(halves)
    assert error.value.key == "objective.name"
    load([{"messages": talk(None, 0, None, 1)}] * 2)  # control
