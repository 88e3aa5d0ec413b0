"""The walks, how answers are judged, and a run of the trained experiment that is too short to learn anything."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from packtrain.experiments.rainbow import TAILS, Settings, run
from packtrain.experiments.rainbow_evaluation import Verdict, markdown, measure
from packtrain.experiments.rainbow_walks import EOS, FIRST_PAD, FIRST_WORD, Walks
from packtrain.objectives.sampling import Samples


def test_walks_follow_the_map_and_end_at_their_first_last_place():
    walks = Walks(places=12, last_places=2)
    drawn = walks.draw(3000, seed=0)
    for words in drawn:
        assert len(words) >= 3
        for word, following in zip(words, words[1:], strict=False):
            assert following // 4 == walks.next_place[word // 4, word % 4]
        assert [walks.is_last(word) for word in words] == [False] * (len(words) - 1) + [True]
    lengths = np.bincount([len(words) - 2 for words in drawn])
    assert lengths[0] == 0 and len(lengths) <= 16
    assert lengths[1] / 3000 == pytest.approx(1 / 6 / (1 - (5 / 6) ** 15), abs=0.03), (
        "an even chance to end at each word"
    )
    assert len(Walks().prompts) > 256


def test_following_a_walk_literally():
    """Four places in two wordings; place 3 is last."""
    walks = Walks(places=4, last_places=1, wordings=2)
    walks.__dict__["next_place"] = np.array([[1, 2], [2, 3], [3, 0], [0, 1]])
    word = lambda place, wording: FIRST_WORD + place * 2 + wording  # noqa: E731
    prompt, to_the_end = [word(0, 0)], [word(1, 0), word(2, 0), word(3, 1)]
    assert walks.follow(prompt, to_the_end) == (3, 3)
    assert walks.follow(prompt, [*to_the_end, word(0, 0)]) == (3, 3)
    assert walks.follow(prompt, to_the_end[:2]) == (2, None)
    assert walks.follow(prompt, [word(1, 0), EOS]) == (1, None)
    assert walks.follow(prompt, [word(1, 1), word(3, 0)]) == (2, 2)
    assert walks.follow(prompt, [word(2, 0), word(3, 0)]) == (0, 2), "it ends, but was no walk"


def test_measuring_literally():
    tokens = torch.tensor([[20, 21, EOS, FIRST_PAD], [20, EOS, FIRST_PAD, FIRST_PAD]])
    when = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    ends = (EOS, FIRST_PAD)
    samples = Samples(tokens=tokens, unmasked_at=when, evaluations=torch.tensor([4, 4]), end_token_ids=ends)
    verdicts = [Verdict(early=False, late=False, exact=True, content=True), Verdict(True, False, False, False)]
    row = measure(samples, 2.5, lambda i, canvas: verdicts[i], blocks=1, steps=4)
    assert (row.canvas, row.answers, row.mean_length, row.reference_length) == (4, 2, 1.5, 2.5)
    assert (row.early, row.late, row.exact, row.content, row.evaluations) == (0.5, 0, 0.5, 0.5, 4)
    assert row.ends_in_first_half == 0.5, "words in the first row, pads in the second"
    assert (
        markdown([("x", row)]).splitlines()[2] == "| x | 4 | 1 | 1.50 | 2.50 | 0.50 | 0.00 | 0.50 | 0.50 | 0.50 | 4.0 |"
    )


def test_a_run_is_stored_and_not_repeated(tmp_path):
    settings = Settings(
        walks=Walks(places=12, last_places=2, longest=5), hidden_size=16, layers=1, rows=60, examples_per_step=8,
        base_steps=4, tune_steps=4, canvases=(8,), blocks=(1, 2), prompts=30,
    )  # fmt: skip
    where = dict(directory=tmp_path / "out", scratch=tmp_path / "base")
    run(settings, seeds=[3], **where)
    paths = sorted((tmp_path / "out/runs").glob("*.json"))
    assert len(paths) == len(TAILS)
    before = {path: path.read_text() for path in paths}
    result = json.loads(before[paths[0]])
    assert [row["blocks"] for row in result["measured"]] == [1, 2] and result["measured"][0]["answers"] == 30
    assert result["curve"][-1]["step"] == 4 and result["curve"][-1]["content"] > 0
    paths[0].unlink()
    run(settings, seeds=[3], **where)
    again = json.loads(paths[0].read_text())
    for key in ("measured", "curve", "base_curve"):
        assert again[key] == result[key], "the same seed, the same result"
    assert all(path.read_text() == before[path] for path in paths[1:])
