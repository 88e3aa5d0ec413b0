"""`packtrain.attach` where batches can't be flat: every task takes the steps of the trainer untouched."""

from __future__ import annotations

import re

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer

import packtrain
from packtrain.errors import PacktrainError
from packtrain.modeling.unpad import Flatten
from packtrain.plugin.unpadded import models_of
from tests.plugin.trainers import LONG, QUICK, answering, classification, preference, tagging

IN_CI = ("question answering", "embedding", "token classification", "DPO with LoRA", "reward", "KTO")


def trained(trainer: Trainer) -> tuple[np.ndarray, list[torch.Tensor]]:
    """Returns losses and gradient norms of all updates, `[2, updates]`, and the weights."""
    torch.manual_seed(7)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    curve = np.array([[entry[key] for entry in logs] for key in ("loss", "grad_norm")])
    return curve, [weight.detach() for weight in trainer.model.parameters()]


def leaking(trainer: Trainer) -> Trainer:
    """Control: the rows of a flat batch are one document."""

    def one_document(module, args, kwargs):
        bounds = kwargs.get("cu_seq_lens_q")
        if bounds is not None:
            whole = bounds[[0, -1]].contiguous()
            whole._packtrain_rows = bounds._packtrain_rows
            length = int(whole[-1])
            kwargs |= dict(cu_seq_lens_q=whole, cu_seq_lens_k=whole, max_length_q=length, max_length_k=length)
        return args, kwargs

    for module in trainer.model.modules():
        if any(isinstance(hook, Flatten) for hook in module._forward_pre_hooks.values()):
            module.register_forward_pre_hook(one_document, with_kwargs=True)
    return trainer


def apart(one: np.ndarray, other: np.ndarray) -> float:
    return float((np.abs(one - other) / np.maximum(np.abs(one), 1e-6)).max())


def marks_of(name: str) -> list[pytest.MarkDecorator]:
    """Marks the tasks that take seconds; CI runs one with each kind of loss."""
    return [pytest.mark.slow, *([pytest.mark.ci] if name in IN_CI else [])]


@pytest.mark.parametrize(
    "make",
    [pytest.param(make, id=name) for name, make in QUICK.items()]
    + [pytest.param(make, id=name, marks=marks_of(name)) for name, make in LONG.items()],
)
def test_every_task_takes_the_same_steps(tmp_path, make, caplog):
    curve, weights = trained(make(tmp_path))
    assert curve.size and np.isfinite(curve).all()
    caplog.clear()
    attached = packtrain.attach(make(tmp_path))
    assert f"packtrain: {type(attached).__name__} with " in caplog.text
    assert "run without padding" in caplog.text and "as before, and so are the gradients" in caplog.text
    ours, our_weights = trained(attached)
    assert apart(curve, ours) < 2e-5
    for mine, theirs in zip(our_weights, weights, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-4)
    assert apart(curve, trained(leaking(packtrain.attach(make(tmp_path))))[0]) > 3e-4  # control


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["reference", "lora"])
def test_trls_own_settings_are_no_reason_to_refuse(tmp_path, lora):
    """bfloat16 and gradient checkpointing; the reference model's `forward` is wrapped in autocast already."""

    def trainer() -> Trainer:
        return preference(tmp_path, reference=not lora, lora=lora, bf16=True, gradient_checkpointing=True)

    attached = trainer()
    wrapped = {name: vars(model).get("forward") for name, model in models_of(attached).items()}
    packtrain.attach(attached)
    assert wrapped == {name: vars(model).get("forward") for name, model in models_of(attached).items()}
    before, ours = trained(trainer())[0], trained(attached)[0]
    assert apart(before[0], ours[0]) < 1e-2 and apart(before[1], ours[1]) < 5e-2


def test_the_log_says_what_runs_how_and_why(tmp_path, caplog):
    """One sentence for what is done, one for why; no error of a library, and no name of a column alone."""

    def told(trainer: Trainer, **options) -> str:
        caplog.clear()
        packtrain.attach(trainer, **options)
        (line,) = [record.getMessage() for record in caplog.records if record.name == "packtrain.plugin.unpadded"]
        return re.sub(r"\d\.\d{4}", "0.6931", line)

    classified = "packtrain: Trainer with BertForSequenceClassification (sequence classification) keeps its own batches"
    proved = "run without padding; the loss of its first micro-batch is 0.6931, as before, and so are the gradients"
    assert told(classification(tmp_path), layout="unpad") == f"{classified}, and the layers of model.bert {proved}"
    assert told(classification(tmp_path)) == (
        f"{classified}, and the layers of model.bert {proved}. Its batches are not flat because its loss cannot be computed "
        "from one row that holds several documents"
    )
    assert told(preference(tmp_path, reference=True)) == (
        f"packtrain: DPOTrainer with LlamaForCausalLM keeps its own batches, and the layers of model.model and "
        f"ref_model.model {proved}. Its batches are not flat because its rows are not token ids with one label per token"
    )


def test_a_loss_that_reads_padding_is_refused(tmp_path):
    """The softmax of question answering is over all positions of a row; control: `MaskedSpans` leaves padding out."""
    with pytest.raises(
        PacktrainError,
        match=r"Trainer with BertForQuestionAnswering \(question answering\) cannot run without padding: "
        r"BertForQuestionAnswering reads padding: its `loss` differs",
    ):
        packtrain.attach(answering(tmp_path, Trainer), layout="unpad")
    with pytest.raises(PacktrainError, match=r"\(question answering\) takes no flat batches \(.*\), and cannot run"):
        packtrain.attach(answering(tmp_path, Trainer))


class MeanOverColumns(Trainer):
    """A classifier that takes the mean of a row with its padding, which is zero where the layers don't compute it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        hidden = model.bert(**inputs).last_hidden_state
        return torch.nn.functional.cross_entropy(model.classifier(hidden.mean(1)), labels)


def equal_rows_first(output_dir, cls: type = MeanOverColumns, full: int = 3) -> Trainer:
    """A trainer whose first batches have no padding."""
    trainer = classification(output_dir, cls=cls, train_sampling_strategy="sequential")
    rows = trainer.train_dataset.to_list()
    for row in rows[: 4 * full]:
        row["input_ids"] = (rows[0]["input_ids"] * 9)[:9]
    trainer.train_dataset = datasets.Dataset.from_list(rows)
    return trainer


def test_batches_with_padding_are_compared_wherever_the_first_ones_are(tmp_path, caplog):
    with pytest.raises(PacktrainError, match="reads the outputs at padding"):
        packtrain.attach(equal_rows_first(tmp_path), layout="unpad")
    packtrain.attach(equal_rows_first(tmp_path, cls=Trainer), layout="unpad")  # control: pools the first token
    assert "have no padding" not in caplog.text
    packtrain.attach(equal_rows_first(tmp_path, cls=Trainer, full=6), layout="unpad")
    assert "as before, and so are the gradients; the batches that were compared have no padding" in caplog.text


def test_a_classifier_in_shards_keeps_its_rows(tmp_path, caplog):
    """ZeRO-3 marks weights like this; its loss cannot be computed before training, and is none of a flat batch."""

    def sharded() -> Trainer:
        trainer = classification(tmp_path)
        next(trainer.model.parameters()).ds_id = 0
        return trainer

    before, _ = trained(classification(tmp_path))
    attached = packtrain.attach(sharded())
    assert "the layers of model.bert run without padding" in caplog.text
    assert "not checked: weights are sharded already" in caplog.text
    assert apart(before, trained(attached)[0]) < 2e-5
    with pytest.raises(PacktrainError, match="a loss that is not that of a causal language model"):
        packtrain.attach(sharded(), layout="flat")


def test_a_refusal_names_trainer_and_task(tmp_path):
    for make in (classification, preference):
        with pytest.raises(PacktrainError) as refused:
            packtrain.attach(make(tmp_path), layout="flat")
        name = "Trainer with BertForSequenceClassification (sequence classification): "
        assert str(refused.value).startswith(name if make is classification else "DPOTrainer with LlamaForCausalLM: ")


def test_a_refused_trainer_is_as_it_was(tmp_path):
    before, _ = trained(answering(tmp_path, Trainer))
    refused = answering(tmp_path, Trainer)
    with pytest.raises(PacktrainError):
        packtrain.attach(refused)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in refused.model.modules())
    np.testing.assert_array_equal(trained(refused)[0], before)


@pytest.mark.parametrize(
    "strategy", ["batch_rebalance", pytest.param("group_by_length", marks=[pytest.mark.slow, pytest.mark.ci])]
)
def test_samplers_of_transformers_keep_their_order(tmp_path, strategy):
    changes = dict(train_sampling_strategy=strategy)
    before, _ = trained(classification(tmp_path, **changes))
    assert apart(before, trained(packtrain.attach(classification(tmp_path, **changes)))[0]) < 2e-5
    assert apart(before, trained(classification(tmp_path))[0]) > 1e-3  # control: another order


def test_a_resumed_trainer_ends_with_the_same_weights(tmp_path):
    settings = dict(save_strategy="steps", save_steps=2)
    _, unbroken = trained(packtrain.attach(tagging(tmp_path, **settings)))
    resumed = packtrain.attach(tagging(tmp_path, **settings))
    torch.manual_seed(7)  # as in `trained`: the order of examples is drawn from it
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for mine, theirs in zip(resumed.model.parameters(), unbroken, strict=True):
        assert torch.equal(mine, theirs)


def test_evaluation_during_training_and_prediction_are_the_same(tmp_path):
    def run(attached: bool) -> tuple[list[float], np.ndarray]:
        trainer = classification(tmp_path, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=5)
        if attached:
            packtrain.attach(trainer)
        trainer.train()
        evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        return evaluated, trainer.predict(trainer.eval_dataset).predictions

    (before, predicted), (after, ours) = run(attached=False), run(attached=True)
    assert len(before) == 2
    np.testing.assert_allclose(after, before, rtol=1e-5)
    np.testing.assert_allclose(ours, predicted, rtol=1e-4, atol=1e-5)


def test_what_is_saved_is_the_plain_model(tmp_path):
    trainer = packtrain.attach(classification(tmp_path))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert "packtrain" not in (tmp_path / "saved/config.json").read_text()
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in plain.modules())
    assert plain.config._attn_implementation == "sdpa"
    batch = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
    batch.pop("labels")
    with torch.no_grad():
        torch.testing.assert_close(
            plain.eval()(**batch).logits, trainer.model.eval()(**batch).logits, rtol=1e-4, atol=1e-5
        )


def test_asking_leaves_no_trace(tmp_path):
    """Random numbers, a collator's generator, TRL's metrics, and the zeros of adapters are as before."""
    trainer = preference(tmp_path, reference=False, lora=True)
    state, weights = torch.get_rng_state(), [weight.clone() for weight in trainer.model.parameters()]
    kept = {name: value for name, value in vars(trainer).items() if name != "data_collator"}
    metrics = {name: {**value} for name, value in trainer._metrics.items()}
    packtrain.attach(trainer)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer._metrics == metrics
    assert vars(trainer).keys() - {"data_collator"} == kept.keys()
    for now, before in zip(trainer.model.parameters(), weights, strict=True):
        assert torch.equal(now, before)


def test_a_collator_that_fails_is_reported(tmp_path):
    def fails(features):
        raise KeyError("image")

    trainer = classification(tmp_path)
    trainer.data_collator = fails
    for layout, message in (("flat", "cannot be compared: the trainer's own"), ("auto", "either .its own")):
        with pytest.raises(PacktrainError, match=f"{message} batch raised KeyError: 'image'"):
            packtrain.attach(trainer, layout=layout)
