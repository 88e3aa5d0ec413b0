"""Static shapes in training: the updates stay the same, and a compiler makes no more graphs than there are shapes."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from tests.training.helpers import Curve, curve, make_trainer


@pytest.fixture(autouse=True)
def no_graphs():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class CountGraphs(TrainerCallback):
    """Notes how many graphs there are after every update."""

    def __init__(self):
        self.graphs: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.graphs.append(counters["stats"]["unique_graphs"])


def run(tmp_path, **settings) -> tuple[Curve, list[int], set[int]]:
    count, sizes = CountGraphs(), set()
    trainer = make_trainer(tmp_path, **{"strategy": "balanced", "max_tokens": 64, "num_epochs": 1.0} | settings)
    trainer.add_callback(count)
    get = trainer.collator.collate
    trainer.collator.collate = lambda ids, *rest, **more: (sizes.add(len(ids)), get(ids, *rest, **more))[1]
    return curve(trainer), count.graphs, sizes


@pytest.mark.parametrize("loss_weighting", ["token", "example"])
def test_padding_to_shapes_does_not_change_the_updates(tmp_path, loss_weighting):
    plain, _, any_size = run(tmp_path, loss_weighting=loss_weighting)
    shaped, _, sizes = run(tmp_path, loss_weighting=loss_weighting, shapes=3)
    assert shaped.difference(plain) < 1e-4
    assert len(sizes) == 3 < len(any_size)


COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}


def test_no_more_graphs_than_shapes(tmp_path):
    plain, graphs, _ = run(tmp_path)
    assert not any(graphs), "control: nothing is compiled"
    compiled, graphs, sizes = run(tmp_path, shapes=3, **COMPILED)
    assert compiled.difference(plain) < 1e-4
    assert graphs[-1] == len(sizes) == 3 and not counters["graph_break"]


def test_one_graph_for_any_number_of_tokens(tmp_path):
    plain, *_ = run(tmp_path)
    compiled, graphs, sizes = run(tmp_path, **COMPILED)
    assert compiled.difference(plain) < 1e-4 and len(sizes) > 8
    assert graphs[-1] <= 2 and not counters["graph_break"]


@pytest.mark.ci
@pytest.mark.slow
def test_checkpointing_and_adapters_are_compiled_too(tmp_path):
    settings = {"lora": True, "gradient_checkpointing": True, "shapes": 2}
    plain, *_ = run(tmp_path, **settings)
    compiled, graphs, _ = run(tmp_path, **settings, **COMPILED)
    assert compiled.difference(plain) < 1e-4
    assert graphs[-1] <= 4


@pytest.mark.ci
@pytest.mark.slow
def test_inductor(tmp_path):
    plain, *_ = run(tmp_path, max_steps=4)
    compiled, graphs, _ = run(tmp_path, max_steps=4, shapes=2, torch_compile=True)
    assert compiled.difference(plain) < 1e-4 and graphs[-1] <= 2
