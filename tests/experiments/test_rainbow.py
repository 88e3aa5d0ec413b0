"""The walks, how answers are judged, and a run of the trained experiment that is too short to learn anything."""

from __future__ import annotations

import json

import numpy as np
import torch

from packtrain.experiments.rainbow import TAILS, Settings, report, run
from packtrain.experiments.rainbow_evaluation import Verdict, markdown, measure
from packtrain.experiments.rainbow_walks import EOS, FIRST_PAD, Walks
from packtrain.objectives.sampling import Samples


def test_walks_follow_the_map_and_end_at_their_first_last_place():
    walks = Walks()
    prompts, answers = walks.draw(3000, seed=0)
    for prompt, places in zip(prompts, answers, strict=True):
        here = walks.places_of(prompt)[0]
        for key, place in zip(prompt[1:], places, strict=False):
            assert place == walks.next_place[here, key - walks.first_key]
            here = place
        assert [walks.is_last(place) for place in places] == [False] * (len(places) - 1) + [True]
    lengths = np.bincount([len(places) for places in answers])
    assert (lengths[:2] == 0).all() and np.allclose(lengths[2:] / 3000, 1 / 14, atol=0.02), "2 to 15, all as likely"
    assert walks.draw(3000, seed=0)[0] == prompts and walks.draw(3000, seed=1)[0] != prompts


def test_examples_are_the_walks_in_every_wording():
    walks = Walks()
    prompts, answers = walks.draw(400, seed=5)
    examples, words = walks.examples(400, seed=5), set()
    for i, (prompt, places) in enumerate(zip(prompts, answers, strict=True)):
        ids, labels = examples[i]["input_ids"].tolist(), examples[i]["labels"].tolist()
        assert ids[:16] == prompt and labels[:16] == [-100] * 16 and labels[16:] == ids[16:]
        assert walks.places_of(ids[16:]) == places
        words |= set(ids[16:])
    assert len(words) == 3 * len({place for places in answers for place in places}), "every place in three wordings"


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
        walks=Walks(longest=5), hidden_size=16, layers=1, rows=60, examples_per_step=8,
        base_steps=4, tune_steps=4, canvases=(8,), blocks=(1, 2), prompts=30,
    )  # fmt: skip
    where = dict(directory=tmp_path / "out", scratch=tmp_path / "base")
    run(settings, seeds=[3], **where)
    paths = sorted((tmp_path / "out/runs").glob("*.json"))
    assert len(paths) == len(TAILS)
    before = {path: path.read_text() for path in paths}
    assert report(tmp_path / "out").count("| rainbow K=7 | 8 |") == 2, "one line for each number of blocks"
    result = json.loads(before[paths[0]])
    assert [row["blocks"] for row in result["measured"]] == [1, 2] and result["measured"][0]["answers"] == 30
    assert result["curve"][-1]["step"] == 4 and result["curve"][-1]["content"] > 0
    paths[0].unlink()
    run(settings, seeds=[3], **where)
    again = json.loads(paths[0].read_text())
    for key in ("measured", "curve", "base_curve"):
        assert again[key] == result[key], "the same seed, the same result"
    assert all(path.read_text() == before[path] for path in paths[1:])
