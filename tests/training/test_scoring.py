"""An example's scores are those of it alone, in any layout; a run trains on the share of them that its recipe keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from packtrain.cli import main
from packtrain.errors import CheckpointError, LaunchError, ModelError, PacktrainError
from packtrain.modeling.audit.models import enlarge
from packtrain.objectives.task import load_task
from packtrain.packing.bounds import KEY as BOUNDS
from packtrain.recipe.reader import load_recipe
from packtrain.training import scoring
from packtrain.training.run import build, train
from packtrain.training.scoring import score, score_examples
from tests.objectives.test_difficulty import literal
from tests.training.test_run import RECIPE

SCORES = ("loss", "perplexity", "el2n")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The recipe of a run of two updates, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("scored")
    (folder / "tiny.yaml").write_text(RECIPE.replace("OUT", str(folder / "run")).replace("epochs: 2", "epochs: 0.2"))
    train(load_recipe(folder / "tiny.yaml"))
    return folder / "tiny.yaml"


def main_code(words: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return ended.value.code or 0


def columns(file: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(file)
    return {name: table[name].to_numpy() for name in table.column_names}


def one_by_one(model, examples) -> tuple[np.ndarray, np.ndarray]:
    """Mean nll and EL2N of each example by itself, with softmax in float64."""
    found = []
    for example in examples:
        ids, labels = (torch.from_numpy(example[name])[None] for name in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model.eval()(ids, use_cache=False).logits[0, :-1]
        scored = labels[0, 1:] != -100
        found.append([values.mean().item() for values in literal(logits[scored], labels[0, 1:][scored])])
    return tuple(np.array(found).T)


def test_layouts_do_not_change_scores_which_are_those_of_each_example_alone(run, tmp_path):
    """Control: where attention leaks between documents they are others."""
    recipe, large = load_recipe(run), str(tmp_path / "large")
    task = load_task(recipe)
    model = build(load_recipe(run, ["strategy=pad_longest"])).model
    torch.manual_seed(0)
    enlarge(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)  # so that examples differ
    model.save_pretrained(large)
    task.tokenizer.save_pretrained(large)
    alone = one_by_one(model, task.train)
    flat = score(recipe, out=tmp_path / "flat.parquet", models=[large]).scores
    padded = load_recipe(run, ["strategy=pad_longest"])
    padded = score(padded, out=tmp_path / "padded.parquet", models=[large]).scores
    for name, exact in zip(SCORES, (alone[0], np.exp(alone[0]), alone[1]), strict=True):
        np.testing.assert_allclose(flat[name], padded[name], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(flat[name], exact, rtol=1e-6, atol=1e-6)
        assert np.ptp(exact) > 2e-3

    plan = scoring._plan(recipe, task)
    args = scoring._arguments(recipe, plan)
    model = scoring._load_saved(large, recipe, task, plan, args, Console(quiet=True)).eval()

    def leak(_module, _args, given):
        offsets = torch.tensor([0, given["input_ids"].shape[1]], dtype=torch.int32)
        positions = torch.arange(given["input_ids"].shape[1])[None]
        given = {name: value for name, value in given.items() if name != BOUNDS}
        return _args, given | {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "position_ids": positions}

    kept = score_examples(model, task, plan, args, max_length=512)
    np.testing.assert_allclose(kept, [flat["loss"], flat["el2n"]], rtol=1e-6)
    model.register_forward_pre_hook(leak, with_kwargs=True)
    leaked = score_examples(model, task, plan, args, max_length=512)
    assert (np.abs(leaked - kept).max(axis=1) > 1e-3).all()


def test_the_command_writes_the_mean_over_checkpoints(run, capsys):
    """Each against a literal loop; rows are named, and those held out are not among them."""
    checkpoints = [run.parent / f"run/checkpoint-{step}" for step in (1, 2)]
    assert main_code(["score", str(run), "--set", "max_tokens=600", *(f"--model={path}" for path in checkpoints)]) == 0
    printed, table = capsys.readouterr().out, columns(run.parent / "run/scores.parquet")
    assert f"wrote {run.parent}/run/scores.parquet" in printed and "100 examples, 2 models: " in printed
    assert "rank correlation with length" in printed and "120 rows" in printed
    examples = load_task(load_recipe(run)).train
    alone = [one_by_one(AutoModelForCausalLM.from_pretrained(path), examples) for path in checkpoints]
    assert np.abs(alone[0][0] - alone[1][0]).max() > 1e-2  # the two differ
    np.testing.assert_allclose(table["loss"], np.mean([one[0] for one in alone], axis=0), rtol=1e-6)
    np.testing.assert_allclose(table["el2n"], np.mean([one[1] for one in alone], axis=0), rtol=1e-6)
    np.testing.assert_allclose(table["perplexity"], np.exp(table["loss"]), rtol=1e-12)
    assert table["row"].tolist() == examples.rows.tolist() and len(set(table["row"].tolist())) == 100
    assert (table["length"] == examples.lengths).all() and (table["supervised"] == examples.supervised).all()


@pytest.mark.ci
@pytest.mark.slow  # trains, and builds four trainers
def test_a_run_trains_on_what_is_kept_and_resumes_with_that_only(run, tmp_path, capsys):
    """The other choices are refused by what they keep, whether the recipe says otherwise or the file does."""
    file = tmp_path / "scores.parquet"
    keep = [f"data.keep={{by: el2n, share: 0.6, scores: {file}}}", f"training.output_dir={tmp_path}/pruned"]
    with pytest.raises(PacktrainError, match="there is no such file"):
        train(load_recipe(run, keep))
    score(load_recipe(run, keep), out=file)  # all examples, though 60 are kept
    el2n = columns(file)["el2n"]
    assert len(el2n) == 100
    assert main_code(["train", str(run), *(f"--set={each}" for each in keep)]) == 0
    printed = capsys.readouterr().out
    assert "kept 60 of 100 training examples (those with the highest el2n, from " in printed
    assert "40 are left out" in printed
    trainer = build(load_recipe(run, keep), resume=True)  # control
    hardest = np.sort(np.argsort(el2n, kind="stable")[-60:])
    everything = load_task(load_recipe(run)).train
    first = build(load_recipe(run, ["strategy=pad_longest"])).model  # what training begins with
    np.testing.assert_allclose(el2n, one_by_one(first, everything)[1], rtol=1e-6)
    assert trainer.train_dataset.rows.tolist() == everything.rows[hardest].tolist()
    other = [keep[0].replace("0.6", "0.6, which: low"), keep[1]]
    with pytest.raises(CheckpointError, match="data.keep: was .*is now") as refused:
        build(load_recipe(run, other), resume=True, allow_changes=True)
    assert "the tokenised examples" in str(refused.value)
    score(load_recipe(run, keep), out=file, models=[str(run.parent / "run/checkpoint-2")])
    with pytest.raises(CheckpointError, match="the tokenised examples"):
        build(load_recipe(run, keep), resume=True, allow_changes=True)


def test_what_cannot_be_scored_is_refused(run, tmp_path, monkeypatch):
    out = tmp_path / "scores.parquet"
    for recipe in ("dpo_lora", "rainbow_cpu"):
        with pytest.raises(PacktrainError, match="no next token of single examples"):
            score(load_recipe(recipe), out=out)
    with pytest.raises(ModelError, match="is not a folder") as refused:
        score(load_recipe(run), out=out, models=[str(tmp_path / "nothing")])
    assert refused.value.key == "--model"
    with pytest.raises(ModelError, match="another vocabulary"):
        score(load_recipe(run, ["tokenizer_vocab_size=290"]), out=out, models=[str(run.parent / "run")])
    with pytest.raises(PacktrainError, match="it would be replaced"):
        score(load_recipe(run), out=run)
    examples = load_task(load_recipe(run)).train
    losses = np.ones((2, len(examples)))
    scoring._refuse_not_finite(losses, examples, "model")
    losses[1, 7] = np.nan
    with pytest.raises(ModelError, match="gives 1 examples a loss that is not finite, such as that of packtrain:arith"):
        scoring._refuse_not_finite(losses, examples, "model")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="one process, and 2 were launched"):
        score(load_recipe(run), out=out)
    assert not out.exists()
