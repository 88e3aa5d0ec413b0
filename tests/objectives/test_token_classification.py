"""Token classification: labels where transformers' examples put them, and its own padded training in every layout."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from packtrain.data.examples import build_examples
from packtrain.data.formats import IGNORED
from packtrain.data.sources import open_rows
from packtrain.errors import DataError, ModelError, RecipeError
from packtrain.objectives import TokenClassification
from packtrain.objectives.token_classification import token_head
from packtrain.packing.strategies import resolve_strategy
from packtrain.recipe.reader import load_recipe
from packtrain.recipe.recipe import Recipe
from packtrain.training.run import build, train
from tests.data.helpers import make_tokenizer
from tests.objectives.preference.helpers import CONFIG as LLAMA
from tests.objectives.preference.helpers import LORA
from tests.objectives.test_masked_lm import BERT
from tests.training.helpers import LeakingCollator

UPDATES, PER_UPDATE, RATE = 12, 6, 1e-3
FIGURES = ("loss", "grad_norm")
KINDS = {
    "B-PER": ("Ada", "Benedikta", "Olga"),
    "B-LOC": ("Ulm", "Reykjavik"),
    "O": ("lives", "in", "misunderstood", ","),
}
ROW = {"tokens": ["Ada", "lives", "in", "Reykjavik", "."], "label": ["B-PER", "O", "O", "B-LOC", "O"]}


def tagged_rows(count: int) -> list[dict[str, list[str]]]:
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        tags = draw.choice([*KINDS], size=draw.integers(1, 15)).tolist()
        rows.append({"tokens": [str(draw.choice(KINDS[tag])) for tag in tags], "label": tags})
    return rows


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("rows") / "rows.jsonl", tagged_rows(UPDATES * PER_UPDATE))


def word_pieces() -> PreTrainedTokenizerFast:
    """BERT's kind of tokenizer: [CLS] and [SEP] around a text, and words in pieces."""
    pieces = (
        "[PAD] [UNK] [CLS] [SEP] Ada A ##da lives in Rey ##kja ##vik . , Bene ##dik ##ta mis ##under ##stood".split()
    )
    backend = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def task_of(path: Path, tokenizer, **options):
    examples = build_examples(open_rows(path), tokenizer, kind="words", **options)
    return TokenClassification().task(tokenizer, examples, None, seed=0)


# ------------------------------------------------------------------------------------------------- rows and labels


def as_transformers(row: dict, tokenizer, numbers: dict[str, int]) -> tuple[list[int], list[int]]:
    """The ids and labels of transformers' example of token classification (`run_ner.py`)."""
    encoded = tokenizer(row["tokens"], is_split_into_words=True)
    labels, before = [], None
    for word in encoded.word_ids():
        labels.append(IGNORED if word is None or word == before else numbers[row["label"][word]])
        before = word
    return encoded["input_ids"], labels


def test_labels_stand_where_transformers_puts_them(tmp_path):
    tokenizer = word_pieces()
    rows = [ROW, *tagged_rows(20)]
    task = task_of(write(tmp_path / "rows.jsonl", rows), tokenizer)
    assert task.config_fields["label2id"] == {"B-LOC": 0, "B-PER": 1, "O": 2}
    several = 0
    for number, row in enumerate(rows):
        ids, labels = as_transformers(row, tokenizer, task.config_fields["label2id"])
        found = task.train[number]
        assert found["input_ids"].tolist() == ids and found["labels"].tolist() == labels
        assert task.train.supervised[number] == len(row["tokens"])
        several += len(ids) > len(row["tokens"]) + 2
    assert several > 10, "words of one piece say nothing of the others"


@pytest.mark.parametrize("bos", [True, False])
def test_words_are_the_tokens_of_the_text(tmp_path, bos):
    """A byte-level tokenizer would glue words that it gets one by one; the first token may be a word's."""
    tokenizer = make_tokenizer(bos=bos)
    task = task_of(write(tmp_path / "rows.jsonl", [ROW, {"tokens": ["Ulm"], "label": ["B-LOC"]}]), tokenizer)
    first = task.train[0]
    assert tokenizer.decode(first["input_ids"]) == "<s>" * bos + "Ada lives in Reykjavik .</s>"
    labelled = np.flatnonzero(first["labels"] != IGNORED)
    assert labelled[0] == bos and first["labels"][labelled].tolist() == [1, 2, 2, 0, 2]
    begun = [tokenizer.decode(first["input_ids"][: place + 1]).removeprefix("<s>") for place in labelled]
    assert all(text.split()[-1][0] == word[0] for text, word in zip(begun, ROW["tokens"], strict=True))
    for strategy in ("balanced", "pad_longest"):
        collator = task.collator(resolve_strategy(strategy), max_length=64)
        batch = collator.collate(*task.train.gather([0, 1]), task.train.lengths.astype(np.int64), np.arange(2))
        index = batch["supervised_index"]
        assert batch["labels"].flatten()[index].tolist() == [1, 2, 2, 0, 2, 0]
        assert batch["loss_weights"].sum() == 6


def test_text_with_white_space_is_words_too(tmp_path):
    rows = [{"words": "Ada lives", "tags": [3, 0]}, {"words": "in Ulm", "tags": [1, 1]}]
    path = write(tmp_path / "rows.jsonl", rows)
    examples = build_examples(open_rows(path), make_tokenizer(), kind="words", columns={"tokens": "words"})
    task = TokenClassification(label_column="tags").task(make_tokenizer(), examples, None, seed=0)
    assert task.train.classes.tolist() == [3, 0, 1, 1] and task.config_fields["num_labels"] == 4
    assert not any("not used" in note for note in task.train.report.notes)


def test_a_row_that_is_cut_keeps_its_first_labels(tmp_path):
    task = task_of(write(tmp_path / "rows.jsonl", [ROW] * 3), make_tokenizer(), max_length=8, overflow="truncate")
    assert len(task.train[0]["input_ids"]) == 8
    kept = task.train[1]["labels"]
    assert kept[kept != IGNORED].tolist() == [1, 2, 2, 0, 2][: task.train.supervised[1]]
    assert 0 < task.train.supervised[1] < 5


BAD = {
    "too few": ({"label": ["O"]}, "'label' has 1 classes for 5 words"),
    "too many": ({"label": ["O"] * 6}, "'label' has 6 classes for 5 words"),
    "none": ({"label": None}, "'label' is not a list of classes"),
    "a fraction": ({"label": ["O", 1.5, "O", "O", "O"]}, "label[1] is neither text nor a whole number: 1.5"),
    "below 0": ({"label": [0, -100, 0, 0, 0]}, "label[1] is below 0: -100"),
}
BAD_WORDS = {
    "no words": ({"tokens": []}, "'tokens' is empty"),
    "null": ({"tokens": None}, "'tokens' is null"),
    "a number": ({"tokens": ["Ada", 7]}, "tokens[1] is a number, not text: 7"),
    "an empty word": ({"tokens": ["Ada", ""]}, "tokens[1] is empty"),
    "a blank": ({"tokens": [" Ada", "lives"]}, "tokens[0] begins or ends with white space"),
}


@pytest.mark.parametrize("name", [*BAD, *BAD_WORDS])
def test_bad_rows_are_named_with_row_reason_and_fix(name, tmp_path):
    change, reason = (BAD | BAD_WORDS)[name]
    path = write(tmp_path / "rows.jsonl", [ROW, ROW | change, ROW])
    with pytest.raises(DataError) as refused:
        task_of(path, make_tokenizer())
    said = str(refused.value)
    assert f"rows.jsonl, line 2: {reason}" in said and "line 1" not in said and "line 3" not in said
    assert ("skip them with `data.on_bad_row: skip`" if name in BAD_WORDS else "one class for each word") in said
    assert "1 of 3 rows" in said


def test_a_word_that_is_no_token_is_named(tmp_path):
    tokenizer = make_tokenizer()
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("@", "")
    path = write(tmp_path / "rows.jsonl", [ROW, {"tokens": ["Ada", "@"], "label": ["O", "O"]}, ROW])
    with pytest.raises(DataError, match=r"line 2: tokens\[1\] (becomes no token|and)"):
        task_of(path, tokenizer)


def test_rows_and_objectives_that_do_not_fit_are_refused(rows, tmp_path):
    for row, said in (
        ({"text": "a"}, "(format `text`) are single examples, and the objective learns from words with labels"),
        ({"words": ["a"]}, "map them with `data.columns: {tokens: theirs}`"),
    ):
        with pytest.raises(DataError) as refused:
            task_of(write(tmp_path / "rows.jsonl", [row]), make_tokenizer())
        assert said in str(refused.value)
    with pytest.raises(DataError, match="choose an objective for words with labels"):
        build_examples(open_rows(rows), make_tokenizer())


# ---------------------------------------------------------------------------------------------------------- training


def recipe_of(path: Path, output_dir: Path, config: dict, strategy: str = "balanced", **training) -> Recipe:
    lora = training.pop("lora", None)
    return Recipe.model_validate({
        "model": {"config": config, "tokenizer_vocab_size": 300},
        "data": {"path": str(path), **training.pop("data", {})},
        "batching": {"strategy": strategy, "examples_per_step": PER_UPDATE, "max_tokens": 60},
        "objective": {"name": "token_classification"},
        "training": {
            "output_dir": str(output_dir), "seed": 42, "max_steps": UPDATES, "logging_steps": 1, "learning_rate": RATE,
            "save_strategy": "no", "report_to": "none", "use_cpu": True, **training,
        },
        **({"lora": lora} if lora else {}),
    })  # fmt: skip


def without_dropout(trainer):
    """transformers' decoders drop a tenth of what the head reads unless told otherwise; layouts would draw other tenths."""
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return trainer


def curve(trainer) -> np.ndarray:
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return np.array([[entry[name] for name in FIGURES] for entry in logs])


class InOrder(Trainer):
    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(self.train_dataset)


def theirs(ours, directory) -> np.ndarray:
    """transformers' Trainer and collator with our model's weights, on the same examples in the order of our plan."""
    model = AutoModelForTokenClassification.from_config(deepcopy(ours.model.config), attn_implementation="sdpa")
    model.load_state_dict(ours.model.state_dict())
    order = np.concatenate([ours.plan.examples(step) for step in range(UPDATES)])
    table = [{name: ids.tolist() for name, ids in ours.train_dataset[int(i)].items()} for i in order]
    args = TrainingArguments(
        output_dir=str(directory), use_cpu=True, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
        learning_rate=RATE, max_steps=UPDATES, per_device_train_batch_size=PER_UPDATE,
    )  # fmt: skip
    collator = DataCollatorForTokenClassification(ours.processing_class)
    dataset = datasets.Dataset.from_list(table)
    return curve(without_dropout(InOrder(model, args, train_dataset=dataset, data_collator=collator)))


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("config", [pytest.param(LLAMA, id="llama"), pytest.param(BERT, id="bert")])
def test_every_update_is_that_of_transformers(rows, tmp_path, config):
    def made(strategy="balanced"):
        return without_dropout(build(recipe_of(rows, tmp_path / "run", config, strategy)))

    ours = made()
    expected = theirs(ours, tmp_path / "theirs")
    assert len(expected) == UPDATES and ours.plan.gradient_accumulation_steps > 1
    assert ours.train_dataset.first, "the first token of a row has a label, which a causal loss would not score"
    np.testing.assert_allclose(curve(ours), expected, rtol=1e-5)
    np.testing.assert_allclose(curve(made("pad_longest")), expected, rtol=1e-5)
    leaking = made()
    leaking.collator = LeakingCollator(layout="flat", pad_token_id=0, first_labels=True)
    assert np.abs(curve(leaking)[:, 0] / expected[:, 0] - 1).max() > 1e-3
    firstless = made()  # the control of labels: without those of first tokens
    firstless.collator.first_labels = False
    assert np.abs(curve(firstless)[:, 0] / expected[:, 0] - 1).max() > 1e-3


def test_a_recipe_trains_saves_and_is_read_again(rows, tmp_path):
    recipe = recipe_of(rows, tmp_path / "run", BERT, data={"eval_size": 12}, max_steps=3)
    trainer = build(recipe)
    found, right, words = trainer.evaluate(), 0, 0
    model = trainer.model.eval()
    for number in range(len(trainer.eval_dataset)):
        row = trainer.eval_dataset[number]
        with torch.no_grad():
            answers = model(torch.tensor(row["input_ids"])[None]).logits[0].argmax(-1).numpy()
        labelled = row["labels"] != IGNORED
        right, words = right + (answers == row["labels"])[labelled].sum(), words + labelled.sum()
    assert found["eval_accuracy"] == pytest.approx(right / words) and found["eval_tokens"] == words
    summary = train(recipe, console=Console(quiet=True))
    assert math.isfinite(summary.held_out_loss_after)
    saved = AutoModelForTokenClassification.from_pretrained(summary.model_dir)
    assert saved.config.id2label == {0: "B-LOC", 1: "B-PER", 2: "O"}


@pytest.mark.slow
@pytest.mark.ci
def test_an_adapter_trains_with_its_head(rows, tmp_path):
    trainer = build(recipe_of(rows, tmp_path / "run", BERT, lora=dict(LORA), max_steps=3))
    trained = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    assert any("classifier" in name for name in trained) and any("lora" in name for name in trained)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(weight, before[name]) != (name in trained), name


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("batching.strategy=wrapped", "batching.strategy"),
        ("data.overflow=split", "data.overflow"),
        ("objective.loss_weighting=example", "objective.loss_weighting"),
    ],
)
def test_contradictions_are_problems_of_the_recipe(rows, tmp_path, override, key):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe_of(rows, tmp_path / "run", BERT).to_dict(given=True)))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [override, "data.max_length=60"])
    assert [problem.key for problem in caught.value.problems] == [key]


def test_a_held_out_class_that_is_not_trained_is_named(tmp_path):
    path = write(tmp_path / "rows.jsonl", [ROW, ROW | {"label": ["O", "O", "O", "B-MISC", "O"]}])
    examples = build_examples(open_rows(path), make_tokenizer(), kind="words")
    with pytest.raises(DataError) as refused:
        TokenClassification().task(make_tokenizer(), examples.take([0]), examples.take([1]), seed=0)
    assert "line 2: no training row has the class 'B-MISC'" in str(refused.value)


def test_a_model_without_a_head_for_tokens_is_refused():
    with pytest.raises(ModelError, match="no head that scores tokens"):
        token_head(torch.nn.Linear(2, 2))
