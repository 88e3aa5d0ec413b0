"""Models whose arithmetic depends on the longest row, or on places in a row: each document as it is alone."""

from __future__ import annotations

import copy
import pickle

import datasets
import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import Trainer, TrainingArguments

from packtrain.errors import ModelError
from packtrain.modeling.attention.varlen import NAME
from packtrain.modeling.audit import probe
from packtrain.modeling.audit.audit import audit_model, quick_check
from packtrain.modeling.audit.models import tiny_model
from packtrain.modeling.isolation import check_isolation
from packtrain.modeling.per_document import compute_per_document, document_lengths, small_thresholds, threshold_of
from packtrain.modeling.unpad import unpad
from packtrain.plugin.attach import attach
from packtrain.recipe.reader import load_recipe
from packtrain.training.run import build
from tests.plugin.helpers import pad
from tests.tiny import random_documents

LENGTHS = (
    9,
    40,
    3,
    20,
    33,
    1,
)  # thresholds of these models are 16: documents on both sides of it, and beyond the audit's
FACTORS = {"short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [1.5, 3.0, 6.0, 9.0]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, **FACTORS}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
MODELS = {
    "phi3": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}),
    "phimoe": ("phimoe", {"rope_parameters": LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.4}}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}),
    "llama4": ("llama4_text", {"floor_scale": 16, "attn_scale": 1.0, "attn_temperature_tuning": True}),
}


def model_of(name: str) -> nn.Module:
    architecture, fields = MODELS[name]
    return tiny_model(architecture, **fields)


def documents_of(model: nn.Module) -> list[torch.Tensor]:
    return probe.sample_documents(model, LENGTHS)


def alone(name: str) -> list[torch.Tensor]:
    """Computes every document by itself, on a model that has met no other."""
    with torch.no_grad():
        return [probe.alone(model_of(name), [document])[0] for document in documents_of(model_of(name))]


def together(model: nn.Module, layout: str, **options) -> list[torch.Tensor]:
    laid = getattr(probe, layout)(documents_of(model), 0, 0, **options)
    with torch.no_grad():
        return probe.each(probe.outputs(model, laid), laid.places)


def apart(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max(map(probe.largest, ours, theirs))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attention", ["sdpa", NAME])
def test_every_document_is_what_it_is_alone(name, attention):
    model, expected = model_of(name), alone(name)
    model.set_attn_implementation(attention)
    layouts = {"flat": {}, "padded": {}} | ({"left": {}} if attention == "sdpa" else {})
    before = {layout: _laid(model, layout) for layout in layouts}
    assert max(apart(found, expected) for found in before.values()) > 1e-2  # control
    installed = compute_per_document(model)
    assert installed.what and installed.threshold == 16
    assert compute_per_document(model).what == []  # once is enough
    for layout in layouts:
        assert apart(_laid(model, layout), expected) < 2e-5
        assert apart(_laid(model, layout), expected) < 2e-5  # nothing is remembered of the longest
    installed.remove()
    assert apart(_laid(model, "flat"), before["flat"]) < 1e-6


def _laid(model: nn.Module, layout: str) -> list[torch.Tensor]:
    return together(model, "padded", left=True) if layout == "left" else together(model, layout)


@pytest.mark.parametrize("name", ["phi3", "dynamic"])
@pytest.mark.parametrize("left", [False, True])
def test_padded_rows_without_position_ids(name, left):
    """As a trainer's own collator makes them: the mask alone says how long a row is."""
    model, expected = model_of(name), alone(name)
    laid = probe.padded(documents_of(model), 0, 0, left=left)
    batch = {key: value for key, value in laid.batch.items() if key != "position_ids"}

    def outputs():
        with torch.no_grad():
            return probe.each(model(**batch, use_cache=False).logits, laid.places)

    assert apart(outputs(), expected) > 1e-2  # control
    with compute_per_document(model):
        assert apart(outputs(), expected) < 2e-5


@pytest.mark.parametrize("name", MODELS)
def test_gradients_checkpointing_and_copies(name):
    model = model_of(name)
    compute_per_document(model)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    laid = probe.flat(documents_of(model), 0, 0)
    expected = sum(_gradient(model_of(name), document[None]) for document in documents_of(model))
    for own in (model, copied):
        own.set_attn_implementation(NAME)
        found = _gradient(own, **laid.batch, places=laid.places)
        assert float((found - expected).norm() / expected.norm()) < 1e-5
    model.train()
    model.gradient_checkpointing_enable()
    found = _gradient(model, **laid.batch, places=laid.places)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def _gradient(model: nn.Module, input_ids: torch.Tensor, places=None, **batch) -> torch.Tensor:
    logits = model(input_ids=input_ids, use_cache=False, **batch).logits
    places = places or [(0, 0, input_ids.shape[1])]
    loss = sum(logits[row, start:stop].square().mean() for row, start, stop in places)
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([grad.flatten() for grad in grads if grad is not None])


def test_lengths_of_documents():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3], [0, 0, 0, 1, 2, 2, 2, 2]])
    assert document_lengths(positions)[0].tolist() == [3, 3, 3, 1, 4, 4, 4, 4]
    assert document_lengths(positions)[1, 2:5].tolist() == [3, 3, 3]


@pytest.mark.parametrize("name", MODELS)
def test_the_audit_checks_on_both_sides_of_thresholds(name):
    """The thresholds of real models are thousands of tokens; here, above what the audit's documents have."""
    architecture, fields = MODELS[name]
    far = {"floor_scale": 8192} if name == "llama4" else {"max_position_embeddings": 8192}
    if "rope_type" in fields.get("rope_parameters", {}) and name != "dynamic":
        far = {"rope_parameters": LONGROPE | fields["rope_parameters"] | {"original_max_position_embeddings": 4096}}
        far["max_position_embeddings"] = 8192
        far |= {"original_max_position_embeddings": 4096} if name == "phi3" else {}
    model = tiny_model(architecture, **fields | far)
    threshold = threshold_of(model)
    assert threshold in (4096, 8192)
    before = quick_check(model, "flat", NAME)
    assert before.verdict == "wrong" and before.threshold == threshold and "longest row" in before.cause
    assert quick_check(model, "flat", NAME, longest=threshold).safe  # no row gets there
    with pytest.raises(ModelError, match=f"data.max_length: .*{threshold:,} tokens"):
        check_isolation(model.train(), "flat", torch.device("cpu"), longest=threshold + 1)
    compute_per_document(model.eval())
    assert quick_check(model, "flat", NAME).safe and quick_check(model, "padded", "sdpa").safe
    report = audit_model(
        tiny_model(architecture, **fields | far),
        implementations=["sdpa", NAME],
        layouts=["flat"],
        modes=["eval", "train"],
    )
    assert all(finding.safe for finding in report.findings)
    assert any(f"above {threshold:,} tokens" in note and "elsewhere outputs differ" in note for note in report.notes)


def test_a_scale_by_position_ids_is_right_already():
    """Ministral's, of the same formula as Llama 4's."""
    model = tiny_model("ministral3")
    with small_thresholds(model) as threshold:
        assert threshold == threshold_of(tiny_model("ministral3"))
        assert compute_per_document(model).what == []
    assert quick_check(model, "flat").safe


def test_models_without_thresholds_are_left_alone():
    model = tiny_model("llama")
    assert threshold_of(model) is None and compute_per_document(model).what == []
    assert not model._forward_pre_hooks and not model.model.rotary_emb._forward_hooks


def test_unpadded_rows_have_the_scale_of_padded_ones():
    """Rows end to end are at other places than padded ones, which Llama 4 would scale by."""
    model = model_of("llama4")
    laid = probe.padded(documents_of(model), 0, 0)
    batch = {name: laid.batch[name] for name in ("input_ids", "attention_mask")}

    def outputs():
        with torch.no_grad():
            return probe.each(model(**batch, use_cache=False).logits, laid.places)

    padded = outputs()
    if Version(transformers.__version__) < Version("5.23"):  # scales by places in another way, which is refused
        with pytest.raises(ModelError):
            unpad(model)
        return
    with unpad(model) as unpadding:
        assert apart(outputs(), padded) < 2e-5
        unpadding._places.remove()
        assert apart(outputs(), padded) > 1e-2  # control
    assert apart(outputs(), padded) < 1e-6 and not model.model.layers[3]._forward_pre_hooks


RECIPE = """
model:
  config: {model_type: phi3, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
    num_key_value_heads: 2, pad_token_id: 0, original_max_position_embeddings: 100, max_position_embeddings: 512,
    resid_pdrop: 0.0, initializer_range: 0.1,
    rope_parameters: {rope_type: longrope, rope_theta: 10000.0, original_max_position_embeddings: 100,
      short_factor: [1.0, 1.2, 1.5, 2.0], long_factor: [1.5, 3.0, 6.0, 9.0]}}
  tokenizer_vocab_size: 300
data: {path: "packtrain:arithmetic", num_rows: 120, eval_size: 20, max_length: 512, overflow: truncate}
batching: {strategy: STRATEGY, examples_per_step: 12, max_tokens: 512}
training: {output_dir: OUT, use_cpu: true, learning_rate: 3e-3, max_steps: 4, logging_steps: 1, report_to: none,
  save_strategy: 'no'}
"""


def test_recipes_take_the_same_steps_in_every_layout(tmp_path):
    def losses(strategy: str) -> list[float]:
        path = tmp_path / f"{strategy}.yaml"
        path.write_text(RECIPE.replace("OUT", str(tmp_path / strategy)).replace("STRATEGY", strategy))
        trainer = build(load_recipe(path))
        lengths = trainer.train_dataset.lengths
        assert lengths.min() < 100 < lengths.max()
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    flat, padded, widest = losses("balanced"), losses("pad_longest"), losses("pad_max")
    assert len(flat) == 4 and flat == pytest.approx(padded, rel=1e-5) and flat == pytest.approx(widest, rel=1e-5)


def test_attach_says_that_frequencies_are_those_of_each_document(tmp_path, caplog):
    rows = datasets.Dataset.from_list(random_documents([5, 30, 9, 40, 12, 20, 7, 33]))

    def trainer():
        model = model_of("phi3")
        args = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=2, logging_steps=1, report_to="none",
            use_cpu=True, learning_rate=1e-2, save_strategy="no", remove_unused_columns=False, disable_tqdm=True,
        )  # fmt: skip
        return Trainer(model, args, train_dataset=rows, data_collator=pad)

    def losses(trained: Trainer) -> list[float]:
        trained.train()
        return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]

    by_hand = trainer()
    compute_per_document(by_hand.model)
    ours = attach(trainer())
    assert "rotary frequencies (longrope): of the longest row -> of each document" in caplog.text
    assert losses(ours) == pytest.approx(losses(by_hand), rel=1e-4)
    assert losses(trainer()) != pytest.approx(
        ours.state.log_history[0]["loss"], rel=1e-4
    )  # control: by the longest row
