"""Out of memory: told with the micro-batch and the knob, in minute one; trying it changes nothing."""

from __future__ import annotations

import pytest
import torch

from packtrain.errors import OutOfMemory
from packtrain.packing.collator import MicroBatches
from packtrain.training.guards.out_of_memory import is_out_of_memory
from packtrain.training.meters import count_batch
from packtrain.training.run import fit
from tests.faults.runs import log_of, run, write_recipe
from tests.training.helpers import make_trainer

DROPOUT = {"gpt2": dict(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1), "llama": dict(attention_dropout=0.1)}
MORE_THAN_ANY = 2**60  # bytes; torch's allocator refuses them by itself


def trainer_of(output_dir, **settings):
    return make_trainer(output_dir, **{"strategy": "balanced", "max_tokens": 48, "num_epochs": 1.0} | settings)


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def micro_batches(trainer) -> list[tuple[int, int, dict]]:
    """(update, number, batch) of the whole run."""
    batches = MicroBatches(trainer.train_dataset, trainer.collator)
    steps = range(trainer.plan.total_steps)
    return [(step, m, batches[b]) for step in steps for m, b in enumerate(trainer.plan.micro_batches(step, 0))]


def seen_by(trainer) -> list[int]:
    """Tokens of every forward pass, as they come."""
    seen: list[int] = []
    trainer.model.get_input_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0].numel()))
    return seen


def out_of_memory_above(trainer, tokens: int, *, backward: bool = False) -> None:
    """The device has no room for micro-batches of more than so many tokens."""

    def allocate(*_):
        torch.empty(MORE_THAN_ANY, dtype=torch.uint8)

    def hook(module, args, output):
        if args[0].numel() <= tokens:
            return
        if backward:
            output.register_hook(allocate)
        else:
            allocate()

    trainer.model.get_input_embeddings().register_forward_hook(hook)


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["balanced", "pad_longest"])
@pytest.mark.parametrize("family", DROPOUT)
def test_trying_changes_no_bit(tmp_path, family, strategy):
    runs = []
    for probe_memory in (True, False):
        settings = dict(family=family, strategy=strategy, model_changes=DROPOUT[family], probe_memory=probe_memory)
        trainer = trainer_of(tmp_path / str(probe_memory), **settings)
        trainer.seen = seen_by(trainer)
        fit(trainer)
        runs.append(trainer)
    tried, untried = runs
    assert all(torch.equal(value, weights(untried)[name]) for name, value in weights(tried).items())
    assert [log.get("loss") for log in tried.state.log_history] == [
        log.get("loss") for log in untried.state.log_history
    ]
    assert tried.plan.gradient_accumulation_steps > 1
    assert len(tried.seen) == len(untried.seen) + 4  # control: twice before, and twice after the first update


def test_the_largest_comes_first_and_again_with_the_optimizers_states(tmp_path, capsys):
    trainer = trainer_of(tmp_path, probe_memory=True)
    seen, largest = seen_by(trainer), max(batch["labels"].numel() for _, _, batch in micro_batches(trainer))
    fit(trainer)
    per_update = trainer.plan.gradient_accumulation_steps
    assert seen[:2] == [largest, largest] == seen[2 + per_update : 4 + per_update]
    assert sum(tokens == largest for tokens in seen[4 + per_update :]) < len(seen) - 4 - per_update  # control
    assert f"{largest:,} tokens in" in capsys.readouterr().out


def test_by_default_a_cpu_is_not_tried(tmp_path):
    assert trainer_of(tmp_path).probe is None


def test_a_resumed_run_tries_once(tmp_path):
    saving = dict(probe_memory=True, save_strategy="steps", save_steps=2)
    fit(trainer_of(tmp_path, **saving))
    trainer = trainer_of(tmp_path, **saving)
    seen = seen_by(trainer)
    fit(trainer, str(tmp_path / "checkpoint-4"))
    updates = trainer.plan.total_steps - 4
    assert len(seen) == updates * trainer.plan.gradient_accumulation_steps + 2


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("strategy", ["balanced", "pad_longest"])
def test_the_micro_batch_is_named_with_the_knob(tmp_path, strategy, backward):
    trainer = trainer_of(tmp_path, strategy=strategy)
    found = micro_batches(trainer)
    sizes = [batch["labels"].numel() for _, _, batch in found]
    limit = max(sizes) - 1
    step, number, batch = found[next(i for i, size in enumerate(sizes) if size > limit)]
    out_of_memory_above(trainer, limit, backward=backward)
    with pytest.raises(OutOfMemory) as error:
        fit(trainer)
    counted, message = count_batch(batch), str(error.value)
    assert f"update {step} (rank 0, micro-batch {number})" in message and trainer.state.global_step == step
    assert f"{max(sizes)} tokens" in message and f"in {counted.documents} document" in message
    assert f"{counted.supervised} supervised" in message
    assert ("with padding" in message) == ("without padding" in message) == (strategy == "pad_longest")
    knob = "lower batching.max_tokens (it is 48" if counted.documents > 1 else "lower data.max_length"
    assert knob in message and "gradient_checkpointing" in message


def test_trying_says_it_before_the_first_update(tmp_path):
    trainer = trainer_of(tmp_path, probe_memory=True)
    sizes = [batch["labels"].numel() for _, _, batch in micro_batches(trainer)]
    assert max(sizes) > sizes[0]  # control: the first micro-batch would have fitted
    out_of_memory_above(trainer, max(sizes) - 1)
    with pytest.raises(OutOfMemory, match="update 0, the run's largest micro-batch, tried before it: out of memory"):
        fit(trainer)


def test_the_optimizers_states_are_named(tmp_path):
    trainer = trainer_of(tmp_path)

    class Hungry(torch.optim.SGD):
        def step(self, closure=None):
            torch.empty(MORE_THAN_ANY, dtype=torch.uint8)

    trainer.optimizer = Hungry(trainer.model.parameters())
    with pytest.raises(OutOfMemory, match="(?s)update 0: .*optimizer states.*lora"):
        fit(trainer)


def test_only_running_out_of_memory_is_one():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("CUDA out of memory"))


@pytest.mark.ci
@pytest.mark.slow
def test_a_process_without_room_ends_with_2(tmp_path):
    """A real one: the process may have 128 MiB more than it has, and the micro-batch needs some."""
    recipe = write_recipe(tmp_path)
    large = ("num_rows=900", "on_bad_row=skip", "examples_per_step=1000", "max_tokens=400000", "max_steps=1")
    words = [part for setting in large for part in ("--set", setting)]
    assert run(recipe, *words, "--set", "probe_memory=true", more_memory=2**27) == 2, log_of(recipe)
    said = log_of(recipe).replace("\n", " ")
    assert "update 0, the run's largest micro-batch" in said and "out of memory with" in said
    assert "lower batching.max_tokens (it is 400,000" in said and "Traceback" not in said
    assert run(recipe, *words) == 0, log_of(recipe)  # control: with room it trains
