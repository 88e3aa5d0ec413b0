"""The three copies that block diffusion learns from: what they contain, and what a plan is told of them."""

from __future__ import annotations

import datasets
import numpy as np
import pytest

from packtrain.data.examples import Examples
from packtrain.objectives.block_diffusion.blocks import ViewedExamples, occupied

FILL = 99
ROWS = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    {"input_ids": [8, 9, 10, 11], "labels": [-100, -100, 10, 11]},
]


@pytest.fixture
def viewed() -> ViewedExamples:
    return ViewedExamples(Examples.from_dataset(datasets.Dataset.from_list(ROWS)), FILL, block_size=2)


def test_copies_literally(viewed):
    ids, labels = viewed.gather(np.array([0, 1]))
    assert ids.tolist() == [5, 6, 7, FILL] * 3 + [8, 9, 10, 11] * 3
    assert labels.tolist() == [-100, 6, 7, -100] * 3 + [-100, -100, 10, 11] * 3
    assert viewed[1]["input_ids"].tolist() == [8, 9, 10, 11] * 3


def test_lengths_are_what_is_laid_out(viewed):
    assert viewed.lengths.tolist() == [12, 12] and viewed.supervised.tolist() == [2, 2]
    assert occupied(np.array([1, 32, 33]), 32).tolist() == [96, 96, 192]
    for i in range(len(viewed)):
        assert len(viewed[i]["input_ids"]) == viewed.lengths[i]


def test_the_report_says_what_views_cost(viewed):
    said = viewed.report.lines()[-1]
    assert said == "views: 3 copies of every example, padded to blocks of 2: 7 tokens are laid out as 24"
    assert viewed.report.tokens == 7, "what was read is counted as it was read"


def test_views_are_not_cut(viewed):
    whole = np.array([12])
    viewed.gather(np.array([1]), np.array([0]), whole)
    for starts, stops in (([4], whole), ([0], [8])):
        with pytest.raises(AssertionError, match="cut"):
            viewed.gather(np.array([1]), np.array(starts), np.array(stops))
