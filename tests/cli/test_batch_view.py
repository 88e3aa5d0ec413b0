"""The batch that `packtrain show` prints: its documents, its text, and that training sees the very same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from packtrain.cli.batch_view import PADDING, PROMPT, SUPERVISED, documents_of, runs_of, text_of
from packtrain.modeling.tokenizer import train_bpe
from packtrain.packing.collator import collate_flat, collate_padded
from tests.cli.helpers import QUICKSTART, SMALL, run, sets

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([], vocab_size=262)  # one token per byte


@pytest.fixture
def batches(tokenizer):
    """Two documents, `ask?yes` and `no`, the answers supervised, in both layouts."""
    ids = np.array(tokenizer("ask?yes")["input_ids"] + tokenizer("no")["input_ids"])
    labels = ids.copy()
    labels[:4] = -100
    parts = (ids, labels, np.array([7, 2]), np.array([5, 3]))
    return collate_flat(*parts), collate_padded(*parts, pad_token_id=tokenizer.pad_token_id)


def test_documents_of_both_layouts_are_the_same(batches):
    flat, padded = (documents_of(batch) for batch in batches)
    assert [document.example_id for document in flat] == [5, 3]
    assert [document.positions for document in flat] == [[0, 1, 2, 3, 4, 5, 6], [0, 1]]
    assert [document.supervised for document in flat] == [3, 1]
    assert [document.padding for document in flat] == [0, 0]
    assert [document.padding for document in padded] == [0, 5]
    for one, other in zip(flat, padded, strict=True):
        assert (one.input_ids, one.labels, one.weights) == (other.input_ids, other.labels, other.weights)


def test_text_is_coloured_by_what_is_learnt(batches, tokenizer):
    def runs(document):
        text = text_of(runs_of(document, tokenizer), ("[[", "]]"))
        return [(text.plain[span.start : span.end], span.style) for span in text.spans]

    first, second = documents_of(batches[1])
    assert runs(first) == [("ask?", PROMPT), ("[[yes]]", SUPERVISED)]
    # The first token of a document is never learnt: nothing stands before it.
    assert runs(second) == [("n", PROMPT), ("[[o]]", SUPERVISED)]


def test_control_characters_in_data_do_not_reach_the_terminal(tokenizer):
    ids = np.array(tokenizer("a\x1b[2Jb\tc\n")["input_ids"])
    (document,) = documents_of(collate_flat(ids, ids, np.array([len(ids)]), np.array([0])))
    assert "".join(run.text for run in runs_of(document, tokenizer)) == "a\\x1b[2Jb\tc\n"


def test_filler_micro_batches_are_shown_as_such(tokenizer):
    ids, labels = np.zeros(2, dtype=np.int64), np.full(2, -100)
    (document,) = documents_of(collate_flat(ids, labels, np.array([2]), np.array([-1])))
    text = text_of(runs_of(document, tokenizer), ("[[", "]]"), padding=True)
    assert document.supervised == 0 and {span.style for span in text.spans} == {PADDING}


@pytest.mark.parametrize("strategy", ["balanced", "pad_longest"])
def test_show_prints_the_batch_that_training_would_see(capsys, wide, strategy):
    from packtrain.objectives.task import load_task
    from packtrain.recipe.reader import load_recipe

    overrides = [*SMALL, f"strategy={strategy}"]
    assert run("show", str(QUICKSTART), "--step", "2", "--documents", "16", *sets(overrides)) == 0
    out = capsys.readouterr().out
    assert "step 2 of 7 (epoch 0), rank 0 of 1, micro-batch 0 of" in out
    task = load_task(load_recipe(QUICKSTART, overrides))
    shown = [
        int(line.split("example ")[1].split()[0])
        for line in out.splitlines()
        if line.startswith("document ") and "· example" in line
    ]
    assert shown
    for example_id in shown:
        text = task.tokenizer.decode(task.train[example_id]["input_ids"])
        assert text.strip() in out.replace("[[", "").replace("]]", "")


def test_show_of_given_examples_and_of_what_is_not_there(capsys, wide):
    assert run("show", str(QUICKSTART), "--examples", "3, 17", *sets(SMALL)) == 0
    out = capsys.readouterr().out
    assert "\n2 examples: flat [1, " in out and "example 3 " in out and "example 17 " in out
    for args, part in (
        (["--step", "7"], "choose one from 0 to 6"),
        (["--rank", "1"], "--gpus sets their number"),
        (["--micro-batch", "99"], "there is no such micro-batch"),
        (["--examples", "3,100"], "there is no example 100, only 100 of them"),
        (["--examples", "3,100"], "give numbers from 0 to 99"),
        (["--examples", "three"], "is not a list of examples"),
    ):
        assert run("show", str(QUICKSTART), *args, *sets(SMALL)) == 2
        assert part in capsys.readouterr().err


@pytest.fixture
def mixed(tmp_path, monkeypatch) -> str:
    """A recipe over two sources, with a file that is not read next to one of them."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(name).mkdir()
        Path(f"{name}/rows.jsonl").write_text(f'{{"text": "{name} one two three"}}\n' * 4)
    Path("b/notes.txt").write_text("")
    text = QUICKSTART.read_text()
    Path("mixed.yaml").write_text(
        text.replace("path: packtrain:arithmetic", "mixture: [{path: a, weight: 3}, {path: b, weight: 1}]")
        .replace("num_rows: ", "# num_rows: ")
        .replace("eval_size: ", "# eval_size: ")
    )
    return "mixed.yaml"


def test_plan_says_which_files_were_read_before_and_after_they_are_tokenised(capsys, wide, mixed):
    for tokenised in (False, True):
        assert run("plan", mixed) == 0
        out = capsys.readouterr().out
        assert ("tokenising:" in out) != tokenised
        assert "read: a/rows.jsonl (4 rows), b/rows.jsonl (4 rows)" in out
        assert "not read (not a supported kind of file): b/notes.txt" in out
        assert "75.0% a (4 rows): 6 examples, each of its 4 is read 1 or 2 times" in out
        assert "25.0% b (4 rows): 2 examples, chosen from 4, the same in every epoch" in out


def test_show_names_the_row_of_its_source(capsys, wide, mixed):
    assert run("show", mixed, "--examples", "0,7") == 0
    out = capsys.readouterr().out
    assert "a/rows.jsonl, line 1" in out and "b/rows.jsonl, line " in out


def what_show_prints(monkeypatch, recipe: Path, *args: str) -> dict:
    """The batch that `show` makes visible."""
    printed = []
    monkeypatch.setattr("packtrain.cli.batch_view.print_batch", lambda batch, *_, **__: printed.append(batch))
    assert run("show", str(recipe), *args) == 0
    return printed[0]


def what_training_sees(recipe: Path, overrides: list[str], step: int) -> dict:
    """The first micro-batch of an update, from the trainer's own loader."""
    from packtrain.recipe.reader import load_recipe
    from packtrain.training.run import build

    trainer = build(load_recipe(recipe, overrides), console=Console(quiet=True))
    trainer.state.global_step = step
    return next(iter(trainer.get_train_dataloader()))


ROBERTA = (
    "config={model_type: roberta, is_decoder: true, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, "
    "num_attention_heads: 2, max_position_embeddings: 2050}"
)


@pytest.mark.parametrize(
    ("name", "step", "overrides"),
    [
        ("quickstart", 9, []),
        ("quickstart", 0, [ROBERTA]),
        ("quickstart", 0, [ROBERTA, "strategy=pad_longest"]),
        ("rainbow_cpu", 1, []),
        ("rainbow_cpu", 9, []),
    ],
)
def test_show_prints_the_very_batch(tmp_path, monkeypatch, name, step, overrides):
    """Masks are those of the update's epoch, positions begin where the model's do."""
    recipe = QUICKSTART.parent / f"{name}.yaml"
    small = [*SMALL, "num_train_epochs=3", "use_cpu=true", f"training.output_dir={tmp_path}", *overrides]
    shown = what_show_prints(monkeypatch, recipe, "--step", str(step), *sets(small))
    seen = what_training_sees(recipe, small, step)
    assert shown.keys() == seen.keys()
    for key, value in seen.items():
        assert torch.equal(shown[key], value) if isinstance(value, torch.Tensor) else shown[key] == value, key
    assert (shown["position_ids"].min() > 0) == (ROBERTA in overrides)
