"""`global_step` is the whole data state: a resumed run ends with bitwise the weights of an unbroken one."""

from __future__ import annotations

import re

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback, get_scheduler

from packtrain.errors import CheckpointError
from packtrain.training.run import fit
from tests.training.helpers import make_trainer

DROPOUT = {"gpt2": dict(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1), "llama": dict(attention_dropout=0.1)}
STEPS_PER_EPOCH = 10
SLOW = [pytest.mark.slow, pytest.mark.ci]


def trainer_at(output_dir, family, strategy, **settings):
    return make_trainer(
        output_dir,
        family=family,
        strategy=strategy,
        num_epochs=3.0,
        model_changes=DROPOUT[family],
        **{"save_strategy": "steps", "save_steps": 1, "save_total_limit": None} | settings,
    )


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        ("llama", "random"),
        pytest.param("gpt2", "balanced", marks=SLOW),
        pytest.param("llama", "padding_free", marks=SLOW),
        pytest.param("gpt2", "pad_longest", marks=SLOW),
    ],
)
def test_resumed_weights_are_bitwise_those_of_an_unbroken_run(tmp_path, family, strategy):
    unbroken = trainer_at(tmp_path, family, strategy)
    unbroken.train()
    expected, total = weights(unbroken), unbroken.state.global_step
    per_epoch = unbroken.plan.steps_in_epoch(0)
    assert total > 2 * per_epoch
    for killed_after in (3, per_epoch, 2 * per_epoch + 4, total - 1):  # epochs 1 and 3, and on a border
        resumed = trainer_at(tmp_path, family, strategy, save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{killed_after}"))
        assert resumed.state.global_step == total
        assert resumed.state.epoch == pytest.approx(3.0)
        for name, value in weights(resumed).items():
            assert torch.equal(value, expected[name]), f"{name} after resuming from step {killed_after}"


SCHEDULE = [(0.2, 10), (0.5, 15)]


@pytest.mark.parametrize("strategy", ["balanced", pytest.param("pad_longest", marks=SLOW)])
def test_a_run_with_a_schedule_resumes_in_its_middle(tmp_path, strategy):
    """After one update and in each phase. Control: a plan without the schedule is refused."""
    unbroken = trainer_at(tmp_path, "llama", strategy, schedule=SCHEDULE)
    unbroken.train()
    expected, plan = weights(unbroken), unbroken.plan
    first, second, _ = (phase.updates for phase in plan.scope.phases)
    assert first == 2 and len(plan.examples(0)) > len(plan.examples(first)) > len(plan.examples(first + second))
    assert unbroken.state.global_step == plan.total_steps > 2 * STEPS_PER_EPOCH
    for killed_after in (1, first + 1, first + second + 1):
        checkpoint = str(tmp_path / f"checkpoint-{killed_after}")
        resumed = trainer_at(tmp_path, "llama", strategy, save_strategy="no", schedule=SCHEDULE)
        resumed.train(resume_from_checkpoint=checkpoint)
        assert resumed.state.global_step == plan.total_steps and resumed.state.epoch == pytest.approx(3.0)
        assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items()), killed_after
    with pytest.raises(CheckpointError, match="which examples share a step"):
        trainer_at(tmp_path, "llama", strategy).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_dropout_is_at_work(tmp_path):
    """Control: without the saved random state the weights would differ."""
    one, other = (trainer_at(tmp_path / str(seed), "gpt2", "balanced", seed=seed, max_steps=4) for seed in (1, 2))
    one.train()
    other.train()
    assert any(not torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


def test_a_resumed_run_reads_on_where_it_stopped(tmp_path):
    read = []

    def record(trainer):
        fetch = trainer.get_batch_samples

        def fetch_and_record(*args):
            batches, total = fetch(*args)
            read.extend(i for batch in batches for i in batch["example_ids"].tolist())
            return batches, total

        trainer.get_batch_samples = fetch_and_record
        return trainer

    first = record(trainer_at(tmp_path, "gpt2", "balanced", max_steps=4))
    first.train()
    resumed = record(trainer_at(tmp_path, "gpt2", "balanced", max_steps=STEPS_PER_EPOCH))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert sorted(read) == list(range(len(first.train_dataset)))


def test_updates_that_a_gradient_scaler_left_out_do_not_break_resuming(tmp_path):
    """In float16 the first gradients overflow: the optimizer has done fewer updates than the run."""

    def scaled():
        trainer = trainer_at(tmp_path, "llama", "balanced", max_steps=8, max_grad_norm=0.0)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-20)
        return trainer

    first = scaled()
    fit(first)
    (steps,) = {int(state["step"]) for state in first.optimizer.state.values()}
    assert 0 < steps < 8
    resumed = scaled()
    fit(resumed, str(tmp_path / "checkpoint-6"))
    assert all(torch.equal(value, weights(first)[name]) for name, value in weights(resumed).items())


def test_parameters_that_had_no_gradient_in_some_update_do_not_break_resuming(tmp_path):
    """As an expert that got no token: its counter is behind the others'."""

    def partly():
        trainer = trainer_at(tmp_path, "llama", "balanced", max_steps=4)

        class Leave(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                if state.global_step == 1:
                    next(trainer.model.parameters()).grad = None

        trainer.add_callback(Leave())
        return trainer

    first = partly()
    fit(first)
    assert {int(state["step"]) for state in first.optimizer.state.values()} == {3, 4}
    resumed = partly()
    fit(resumed, str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(value, weights(first)[name]) for name, value in weights(resumed).items())


class Rates(TrainerCallback):
    """The learning rate of every update, as the optimizer has it when it makes it."""

    def __init__(self):
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("linear", {}),
        ("cosine", {}),
        ("cosine_with_restarts", {"num_cycles": 2}),
        ("polynomial", {"power": 2.0}),
        ("cosine_with_min_lr", {"min_lr": 1e-5}),
        ("warmup_stable_decay", {"num_decay_steps": 2}),
        ("constant_with_warmup", {}),
        ("inverse_sqrt", {}),
    ],
)
def test_a_longer_run_has_the_rates_of_its_own_schedule_from_the_first_update(tmp_path, kind, options):
    """A restored optimizer has that of the old schedule's end: 0 for `linear`."""
    common = dict(lr_scheduler_type=kind, lr_scheduler_kwargs=options, warmup_steps=1, save_steps=4)
    trainer_at(tmp_path, "llama", "balanced", max_steps=4, **common).train()
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1e-3)
    schedule = get_scheduler(kind, optimizer, 1, 8, scheduler_specific_kwargs=options)
    expected = []
    for _ in range(8):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()

    longer, rates = trainer_at(tmp_path, "llama", "balanced", max_steps=8, **common), Rates()
    longer.add_callback(rates)
    fit(longer, str(tmp_path / "checkpoint-4"), console=(console := Console(record=True, width=200)))
    assert rates.seen == pytest.approx(expected[4:], abs=1e-12)
    said = re.sub(r"\s+", " ", console.export_text())
    jumps = kind not in ("constant_with_warmup", "inverse_sqrt")
    assert (f"it now ends at update 8: the learning rate continues at {expected[4]:.1e}" in said) == jumps

    same = trainer_at(tmp_path, "llama", "balanced", max_steps=8, **common)  # control: nothing has jumped
    fit(same, str(tmp_path / "checkpoint-8"), console=(console := Console(record=True, width=200)))
    assert "the learning rate continues" not in console.export_text()
