"""Several answers to one prompt: what is laid out, and that losses and gradients are those of the rows written out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from packtrain.cli import main
from packtrain.data.examples import build_examples
from packtrain.data.formats import IGNORED
from packtrain.data.sources import open_rows
from packtrain.errors import DataError, RecipeError
from packtrain.modeling.attention.prefixes import KEY as SHARED
from packtrain.modeling.attention.prefixes import SharedPrefixes
from packtrain.objectives.groups import GroupCollator, GroupExamples
from packtrain.packing.collator import MicroBatches
from packtrain.packing.scopes import MicroBatch
from packtrain.recipe.reader import load_recipe
from packtrain.training.run import build, fit
from tests.data.helpers import CHAT_TEMPLATE, make_tokenizer, shown
from tests.objectives.preference.helpers import WORDS, curves, pair_recipe

USER = {"role": "user", "content": "What is 2+2?"}
YES, NO = {"role": "assistant", "content": "It is 4."}, {"role": "assistant", "content": "the sum"}
CHAT = "<s><|user|>What is 2+2?<|end|><|assistant|>"
FIGURES = ("loss", "grad_norm")


def answered_rows(count: int) -> list[dict]:
    """Prompts of 2 to 20 words, with 1 to 4 answers of 1 to 12."""
    draw = np.random.default_rng(0)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choice(WORDS, size=draw.integers(low, high)))

    return [
        {"prompt": text(2, 21) + "\n", "completions": [text(1, 13) for _ in range(draw.integers(1, 5))]}
        for _ in range(count)
    ]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("rows") / "rows.jsonl", answered_rows(24))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(chat_template=CHAT_TEMPLATE)


def examples_of(tmp_path, tokenizer, *rows):
    path = write(tmp_path / "rows.jsonl", list(rows))
    return build_examples(open_rows(path), tokenizer, completion_only_loss=True, kind="answers")


# ------------------------------------------------------------------------------------------------- rows and batches


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"prompt": "What is 2+2?", "completions": [" It is 4.", " the sum", " It is 4."]},
            "<s>What is 2+2?[ It is 4.</s>]<s>What is 2+2?[ the sum</s>]<s>What is 2+2?[ It is 4.</s>]",
        ),
        ({"prompt": "What is 2+2?", "completions": [" the sum"]}, "<s>What is 2+2?[ the sum</s>]"),
        ({"prompt": [USER], "completions": [[YES], [NO]]}, f"{CHAT}[It is 4.</s>]{CHAT}[the sum</s>]"),
    ],
)
def test_a_row_becomes_a_document_for_each_answer(row, expected, tmp_path, tokenizer):
    assert shown(tokenizer, examples_of(tmp_path, tokenizer, row)) == [expected]


GOOD = {"prompt": "one", "completions": [" two", " three"]}
BAD = {
    "no prompt": (GOOD | {"prompt": None}, "'prompt' is null"),
    "an empty prompt": (GOOD | {"prompt": " "}, "'prompt' is empty"),
    "no answers": (GOOD | {"completions": []}, "'completions' is empty"),
    "one text": (GOOD | {"completions": " two"}, "'completions' is text, not a list of answers"),
    "an empty answer": (GOOD | {"completions": [" two", ""]}, "'completions[1]' is empty"),
    "a number": (GOOD | {"completions": [" two", 3]}, "'completions[1]' is a number, not text"),
    "kinds that differ": (GOOD | {"completions": [" two", [YES]]}, "'prompt' and 'completions[1]' must both be text"),
    "a user's turn last": (
        {"prompt": [USER], "completions": [[YES], [NO, USER]]},
        "'completions[1]': the last message",
    ),
    "a switch": ({"prompt": [USER], "completions": [[YES | {"weight": 0}]]}, "completions[0][0] has a switch"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named_with_row_and_reason(name, tmp_path, tokenizer):
    row, reason = BAD[name]
    with pytest.raises(DataError) as refused:
        examples_of(tmp_path, tokenizer, GOOD, row, GOOD)
    said = str(refused.value)
    assert f"rows.jsonl, line 2: {reason}" in said
    assert "line 1" not in said and "skip them with `data.on_bad_row: skip`" in said


def test_rows_name_the_objective_that_learns_from_them(rows, tokenizer):
    with pytest.raises(DataError) as refused:
        build_examples(open_rows(rows), tokenizer)
    assert "several answers to one prompt (`several_answers`)" in str(refused.value)


def batch_of(examples, *, layout="flat", shared=False, **options) -> dict:
    groups = GroupExamples(examples, layout=layout, shared=shared)
    ids = np.arange(len(groups))
    batch = MicroBatches(groups, GroupCollator(layout=layout, pad_token_id=0, shared=shared, **options))[
        MicroBatch(example_ids=ids, starts=np.zeros_like(ids), stops=groups.lengths)
    ]
    if layout == "flat":
        assert batch["input_ids"].numel() == groups.lengths.sum()
    longest = (batch["cu_seq_lens_k"].diff() if layout == "flat" else batch["attention_mask"].sum(dim=1)).max()
    assert groups.longest == longest
    return batch


def asked(batch) -> list[tuple[list[int], int, float]]:
    """What the model is asked at every supervised position: tokens that it sees, the token to predict, its weight."""
    ids, found = batch["input_ids"], []
    for target, predictor in zip(batch["supervised_index"].tolist(), batch["predictors"].tolist(), strict=True):
        row, column = divmod(predictor, ids.shape[1])
        if "cu_seq_lens_q" not in batch:
            seen = ids[row, : column + 1]
        else:
            document = int(torch.searchsorted(batch["cu_seq_lens_q"], target, right=True)) - 1
            start, stop = batch["cu_seq_lens_k"][document : document + 2].tolist()
            keys = batch["key_index"][start:stop] if "key_index" in batch else torch.arange(start, stop)
            seen = ids[0, keys[keys <= predictor]]
        assert int(batch["position_ids"][row, column]) == len(seen) - 1
        label, weight = (batch[name].flatten()[target] for name in ("labels", "loss_weights"))
        found.append((seen.tolist(), int(label), float(weight)))
    return found


@pytest.mark.parametrize("weighting", ["token", "example"])
def test_every_layout_asks_what_the_rows_written_out_ask(weighting, tmp_path, tokenizer):
    rows = answered_rows(6)
    examples = examples_of(tmp_path, tokenizer, *rows)
    flat = batch_of(examples, loss_weighting=weighting)
    expected = asked(flat)
    assert expected == asked(batch_of(examples, layout="padded", loss_weighting=weighting))
    shared = batch_of(examples, shared=True, loss_weighting=weighting)
    assert expected == asked(shared)
    assert shared["input_ids"].numel() < flat["input_ids"].numel()
    counts = [len(row["completions"]) for row in rows]
    assert {1, 2, 3} <= {*counts}
    assert shared["example_ids"].tolist() == np.repeat(np.arange(6), counts).tolist()
    written = [{"prompt": row["prompt"], "completion": text} for row in rows for text in row["completions"]]
    single = build_examples(open_rows(write(tmp_path / "written.jsonl", written)), tokenizer)
    ids, labels = single.gather(np.arange(len(single)))
    assert torch.equal(flat["input_ids"][0], torch.from_numpy(ids)) and torch.equal(
        flat["labels"][0], torch.from_numpy(labels)
    )
    total = sum(weight for _, _, weight in expected)
    assert total == pytest.approx(6 if weighting == "example" else np.count_nonzero(labels != IGNORED))
    assert not len(GroupCollator(layout="flat", shared=True).empty()["predictors"])


# ----------------------------------------------------------------------------------------------------------- training


def made(rows, output_dir, *, name="several_answers", shared=False, weighting="token", **changes):
    objective = {"name": name, "loss_weighting": weighting} | ({"shared_prefix": True} if shared else {})
    recipe = pair_recipe(rows, output_dir, **changes).to_dict(given=True)
    return build(type(pair_recipe(rows, output_dir)).model_validate(recipe | {"objective": objective}))


def gradients(trainer, batch) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.model.zero_grad()
    losses = trainer.loss.losses(trainer.model, batch, head=trainer._head)
    loss = losses.weighted_sum() / trainer.loss.denominator(batch).float()
    loss.backward()
    return float(loss), {name: weight.grad.clone() for name, weight in trainer.model.named_parameters()}


def whole_batch(trainer, collator=None) -> dict:
    examples, ids = trainer.train_dataset, np.arange(len(trainer.train_dataset))
    stops = np.asarray(examples.lengths, dtype=np.int64)
    part = MicroBatch(example_ids=ids, starts=np.zeros_like(ids), stops=stops)
    return MicroBatches(examples, collator or trainer.collator)[part]


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(float((found[name] - one).norm() / one.norm()) for name, one in expected.items())


class Leaking(GroupCollator):
    """Shared prompts in which later answers also see the first one; nothing else is changed."""

    def collate(self, *args, **kwargs):
        batch = super().collate(*args, **kwargs)
        groups = batch[SHARED].groups
        leaking = SharedPrefixes(groups, [group[0] for group in groups])
        return batch | {SHARED: leaking, **leaking.entries()}


def test_losses_and_gradients_are_those_of_the_rows_written_out(rows, tmp_path):
    written = [
        {"prompt": row["prompt"], "completion": text}
        for row in map(json.loads, rows.read_text().splitlines())
        for text in row["completions"]
    ]
    single = made(write(tmp_path / "written.jsonl", written), tmp_path / "run", name="causal_lm")
    loss, expected = gradients(single, whole_batch(single))
    for options in ({"shared": True}, {}, {"batching__strategy": "pad_longest"}):
        trainer = made(rows, tmp_path / "run", **options)
        batch = whole_batch(trainer)
        assert (SHARED in batch) == ("shared" in options)
        found, grads = gradients(trainer, batch)
        assert abs(found / loss - 1) < 1e-6 and worst(grads, expected) < 1e-6, options
        if "shared" in options:
            leaking, grads = gradients(trainer, whole_batch(trainer, Leaking(layout="flat", shared=True)))
            assert abs(leaking / loss - 1) > 1e-4 and worst(grads, expected) > 1e-3


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("weighting", ["token", "example"])
def test_layouts_train_the_same_and_rows_are_one_example(rows, tmp_path, weighting):
    changes = {"weighting": weighting, "training__max_steps": 8, "batching__max_tokens": 300, "data__max_length": 300}
    expected = curves(made(rows, tmp_path / "run", batching__strategy="pad_longest", **changes), FIGURES)
    shared = made(rows, tmp_path / "run", shared=True, **changes)
    assert [len(shared.plan.examples(step)) for step in range(4)] == [6] * 4  # prompts, whatever their answers
    assert shared.plan.gradient_accumulation_steps > 1
    np.testing.assert_allclose(curves(shared, FIGURES), expected, rtol=1e-5)
    np.testing.assert_allclose(curves(made(rows, tmp_path / "run", **changes), FIGURES), expected, rtol=1e-5)
    other = {"token": "example", "example": "token"}[weighting]  # the control
    differing = curves(made(rows, tmp_path / "run", shared=True, **changes | {"weighting": other}), FIGURES)
    assert np.abs(differing[:, 0] / expected[:, 0] - 1).max() > 1e-4


@pytest.mark.slow
@pytest.mark.ci
def test_a_resumed_run_ends_with_bitwise_the_same_weights(rows, tmp_path):
    changes = {"training__max_steps": 6, "training__save_strategy": "steps", "training__save_steps": 3}
    unbroken, resumed = (made(rows, tmp_path / "run", shared=True, **changes) for _ in range(2))
    fit(unbroken)
    fit(resumed, str(tmp_path / "run" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    for (name, weight), other in zip(unbroken.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(weight, other), name


@pytest.fixture
def recipe(rows, tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    objective = {"name": "several_answers", "shared_prefix": True}
    written = pair_recipe(rows, tmp_path / "run", data__max_length=400).to_dict(given=True)
    path.write_text(json.dumps(written | {"objective": objective}))
    return path


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["overflow=truncate"], "the answers to a prompt are needed whole"),
        (["shapes=2"], "takes the answers to a prompt together"),
        (["strategy=wrapped"], "needs whole ones"),
        (["strategy=pad_longest"], "needs a flat layout"),
        (["completion_only_loss=false"], "answers are learnt from, and not their prompt"),
    ],
)
def test_settings_that_contradict_answers_are_refused(recipe, changes, reason):
    with pytest.raises(RecipeError) as refused:
        load_recipe(recipe, changes)
    assert reason in str(refused.value)
    load_recipe(recipe)


def test_plan_and_show_draw_answers_and_prefixes(recipe, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")

    def printed(*args: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*args])
        assert not ended.value.code
        return capsys.readouterr().out

    out = printed("show", str(recipe), "--documents", "30")
    assert (
        "answer 1 of 3, after a prompt of" in out and "tokens that all share" in out and "tokens that both share" in out
    )
    assert "answer 3 of 3, goes on from the prompt of document" in out and "· answer 1 of 1\n" in out.replace(
        " ─", "\n"
    )
    out = printed("show", str(recipe), "--set", "objective.shared_prefix=false", "--set", "strategy=pad_longest")
    assert "· answer 1 of" in out and "share" not in out
    out = printed("plan", str(recipe), "--all")
    assert "to 24 prompts, 1 to 4 to each" in out and "laid out once" in out
