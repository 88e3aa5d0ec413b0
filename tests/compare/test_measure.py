"""What is read off a batch, what an update's record says, and what training costs in FLOPs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig, DataCollatorWithFlattening

from packtrain.compare.flops import peak_flops, training_flops
from packtrain.compare.measure import Recorder, RunFailed, WriteUpdates, shape_of
from packtrain.packing.collator import PackCollator
from tests.tiny import CONFIGS, random_documents, tiny_model

DOCUMENTS = random_documents([5, 3, 4], prompt=2)  # 3 + 1 + 2 supervised positions
WIDTHS = {"flat": (12, [[5, 3, 4]]), "padded": (5, [[5], [3], [4]])}


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_a_batch_shows_its_documents(layout):
    shape = shape_of(PackCollator(layout=layout, padded_to="longest", max_length=8)(DOCUMENTS))
    assert (shape.width, shape.rows) == WIDTHS[layout]
    assert shape.supervised == 6 and shape.computed == (12 if layout == "flat" else 15)


def test_a_batch_of_transformers_own_collator_shows_them_too():
    for options in ({}, {"return_flash_attn_kwargs": True}):
        shape = shape_of(DataCollatorWithFlattening(**options)(DOCUMENTS))
        assert (shape.width, shape.rows, shape.supervised) == (12, [[5, 3, 4]], 6)


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_an_empty_micro_batch_is_padding(layout):
    shape = shape_of(PackCollator(layout=layout, padded_to="longest", max_length=8).empty())
    assert shape.rows == [[]] and shape.lengths.sum() == 0 and shape.computed == 2


def recorded(says_documents: bool = True, losses: tuple[float, ...] = (0.25, 0.5)):
    written = []
    recorder = Recorder(
        write=written.append,
        flops=lambda lengths, supervised: float((lengths**2).sum()),
        says_documents=says_documents,
        device=torch.device("cpu"),
    )
    batch = PackCollator(layout="padded", padded_to="longest")(DOCUMENTS)
    recorder.begin()
    recorder.fetched([batch] * len(losses))
    for loss in losses:
        start = recorder.clock.mark()
        recorder.forward(start, recorder.clock.mark())
        recorder.step(start, recorder.clock.mark(), torch.tensor(loss))
    return recorder, written


def test_an_update_sums_its_micro_batches():
    recorder, _ = recorded()
    update = recorder.end(7)
    assert (update.update, update.micro_batches, update.examples) == (7, 2, 6)
    assert (update.real_tokens, update.computed_tokens, update.supervised_tokens) == (24, 30, 12)
    assert (update.loss, update.flops) == (0.75, 100.0)
    parts = update.data_seconds + update.forward_seconds + update.backward_seconds + update.optimizer_seconds
    assert 0 < parts <= update.seconds + 1e-5


def test_where_documents_are_not_told_nothing_is_said_of_them():
    update = recorded(says_documents=False)[0].end(1)
    assert update.examples is None and update.flops is None and update.real_tokens == 24


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_fails_the_run(loss):
    recorder, written = recorded(losses=(1.0, loss))
    state = type("State", (), {"global_step": 3})()
    with pytest.raises(RunFailed, match="at update 3"):
        WriteUpdates(recorder).on_step_end(None, state, None)
    assert written[0].update == 3


def test_flops_are_those_that_torch_counts():
    """One document forward and back, counted by torch's own counter (which sees attention's full square)."""
    from torch.utils.flop_counter import FlopCounterMode

    length, supervised = 32, 31
    model = tiny_model("llama", attn_implementation="eager").train()
    ids = torch.randint(3, 60, (1, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    config = AutoConfig.for_model(**CONFIGS["llama"])
    counted = training_flops(config, frozen=False)(np.array([length]), supervised)
    heads, layers, head_dim = config.num_attention_heads, config.num_hidden_layers, config.head_dim
    masked_half = 3 * layers * 2 * heads * head_dim * length**2
    unscored = 6 * config.hidden_size * config.vocab_size * (length - supervised)
    assert counted + masked_half + unscored == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_attention_is_counted_per_document_and_frozen_weights_cost_less():
    config = AutoConfig.for_model(**CONFIGS["llama"])
    flops = training_flops(config, frozen=False)
    assert flops(np.array([64]), 0) > flops(np.array([32, 32]), 0)
    assert training_flops(config, frozen=True)(np.array([64]), 8) < flops(np.array([64]), 8)


def test_peaks_are_known_for_some_devices_and_half_precision_only():
    assert peak_flops("NVIDIA H200", "bfloat16") == 989.5e12
    assert peak_flops("NVIDIA H200", "float32") is None
    assert peak_flops("NVIDIA H100 PCIe", "float16") < peak_flops("NVIDIA H100 80GB HBM3", "float16")
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16") == 312e12
    assert peak_flops("NVIDIA L4", "bfloat16") < peak_flops("NVIDIA L40", "bfloat16")
    assert peak_flops("NVIDIA RTX A4000", "bfloat16") is None  # and no A40
    assert peak_flops("cpu", "bfloat16") is None and peak_flops(None, None) is None
