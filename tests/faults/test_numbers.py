"""NaN in the data, the weights or the gradients: no update from it, and who brought it is named."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from transformers import TrainerCallback

from packtrain.data.examples import Examples
from packtrain.errors import NonFiniteError
from packtrain.training.run import fit
from tests.faults.runs import log_of, run, write_recipe
from tests.tiny import VOCABULARY, random_documents
from tests.training.helpers import long_tailed_lengths, make_trainer

POISON, BAD_EXAMPLE = VOCABULARY - 1, 17


@pytest.fixture
def examples() -> Examples:
    """Sixty documents, of which one has a token that the others don't have."""
    rows = random_documents(long_tailed_lengths(60))
    for row in rows:
        row["input_ids"] = [min(token, POISON - 1) for token in row["input_ids"]]
        row["labels"] = [min(label, POISON - 1) for label in row["labels"]]
    rows[BAD_EXAMPLE]["input_ids"][1] = POISON
    return Examples.from_dataset(datasets.Dataset.from_list(rows))


def poisoned(output_dir, examples, **settings):
    """A trainer whose model answers the token with NaN."""
    trainer = make_trainer(output_dir, strategy="balanced", examples=examples, max_tokens=48, **settings)

    def answer(module, args, output):
        return torch.where((args[0] == POISON)[..., None], torch.nan, output)

    trainer.model.get_input_embeddings().register_forward_hook(answer)
    return trainer


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def records(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "nonfinite.jsonl").read_text().splitlines()]


def bad_update(plan, epoch=0) -> int:
    steps = [step for step in range(plan.total_steps) if plan.locate(step)[0] == epoch]
    return next(step for step in steps if BAD_EXAMPLE in plan.examples(step))


@pytest.mark.ci
@pytest.mark.slow
def test_a_nan_in_the_data_stops_before_the_update_and_is_traced_to_its_micro_batch(tmp_path, examples):
    trainer = poisoned(tmp_path, examples)
    step = bad_update(trainer.plan)
    unharmed = make_trainer(tmp_path / "control", strategy="balanced", examples=examples, max_tokens=48, num_epochs=2.0)

    class Leave(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == step

    unharmed.add_callback(Leave())
    if step:
        unharmed.train()  # a control as well: without the NaN nothing is stopped
    with pytest.raises(
        NonFiniteError, match=f"update {step} .*loss is not finite.*weights are those before this update"
    ):
        trainer.train()
    assert trainer.state.global_step == step
    assert all(torch.equal(value, weights(unharmed)[name]) for name, value in weights(trainer).items())
    (record,) = records(tmp_path)
    assert record["step"] == step and record["not_finite"] == "loss"
    (batch,) = record["micro_batches"]
    micro_batch = trainer.plan.micro_batches(step, 0)[batch["micro_batch"]]
    assert BAD_EXAMPLE in batch["example_ids"] == micro_batch.example_ids.tolist() == batch["rows"]
    assert len(batch["example_ids"]) < len(trainer.plan.examples(step))  # not the whole update is blamed


@pytest.mark.ci
@pytest.mark.slow
def test_skipped_updates_leave_weights_and_moments_alone(tmp_path, examples):
    trainer = poisoned(tmp_path, examples, on_nonfinite="skip", save_strategy="steps", save_steps=1)
    before = []

    class Compare(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            before.append(weights(trainer))

    trainer.add_callback(Compare())
    trainer.train()
    bad = {bad_update(trainer.plan, epoch) for epoch in (0, 1)}
    assert trainer.state.global_step == trainer.plan.total_steps and trainer.finite.skipped == 2
    before.append(weights(trainer))
    for step in range(trainer.plan.total_steps):
        moved = any(not torch.equal(value, before[step + 1][name]) for name, value in before[step].items())
        assert moved == (step not in bad), step
    steps = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == {trainer.plan.total_steps - 2}
    assert [record["step"] for record in records(tmp_path)] == sorted(bad)
    manifest = json.loads((tmp_path / f"checkpoint-{trainer.plan.total_steps}/packtrain_manifest.json").read_text())
    assert manifest["skipped_updates"] == 2


@pytest.mark.ci
@pytest.mark.slow
def test_skipping_has_an_end(tmp_path):
    trainer = make_trainer(tmp_path, strategy="balanced", on_nonfinite="skip", max_skipped_updates=3)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="update 3 .*after 3 skipped updates"):
        trainer.train()
    assert len(records(tmp_path)) == 4


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_an_infinite_gradient_of_a_finite_loss_stops(tmp_path, max_grad_norm):
    """1e30 everywhere: each element is finite, their norm is not, and clipping would make every gradient 0."""
    trainer = make_trainer(tmp_path, strategy="balanced", max_grad_norm=max_grad_norm)
    before = weights(trainer)
    next(trainer.model.parameters()).register_hook(lambda gradient: torch.full_like(gradient, 1e30))
    with pytest.raises(NonFiniteError, match="update 0 .*gradient is not finite"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    (record,) = records(tmp_path)
    assert record["not_finite"] == "gradient" and record["gradient_norm"] == "inf"
    assert record["example_ids"] == sorted(trainer.plan.examples(0).tolist())


@pytest.mark.ci
@pytest.mark.slow
def test_a_recipe_that_blows_up_ends_with_2_and_names_the_file_that_show_reads(tmp_path, capsys):
    from packtrain.cli import main

    recipe = write_recipe(tmp_path)
    assert run(recipe, "--set", "training.weight_decay=1e38") == 2, log_of(recipe)
    assert "is not finite" in log_of(recipe) and "Traceback" not in log_of(recipe)
    file = tmp_path / "run/nonfinite.jsonl"
    assert str(file) in log_of(recipe).replace("\n", "")
    with pytest.raises(SystemExit) as ended:
        main(["show", str(recipe), "--examples", str(file)])
    assert ended.value.code == 0
    ids = records(tmp_path / "run")[-1]["example_ids"]
    assert f"{len(ids)} examples" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["show", str(recipe), "--examples", str(tmp_path / "absent.jsonl")])
    assert ended.value.code == 2


@pytest.mark.ci
@pytest.mark.slow
def test_a_skipped_update_does_not_break_resuming(tmp_path, examples):
    """The optimizer has done fewer updates than the run, and the resumed run knows."""
    settings = dict(on_nonfinite="skip", save_strategy="steps", save_steps=1)
    first = poisoned(tmp_path, examples, **settings)
    fit(first)
    after = bad_update(first.plan) + 2
    resumed = poisoned(tmp_path, examples, **settings)
    fit(resumed, str(tmp_path / f"checkpoint-{after}"))
    assert resumed.finite.skipped == 2
    assert all(torch.equal(value, weights(first)[name]) for name, value in weights(resumed).items())


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite_are_named_instead_of_the_data(tmp_path, name):
    trainer = make_trainer(tmp_path, strategy="balanced")
    with torch.no_grad():
        trainer.model.get_parameter(name)[-1, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=f"is not finite, as its weights hold NaN or infinity: {name}") as error:
        trainer.train()
    assert "start from whole weights" in error.value.fix and "data" not in error.value.fix
