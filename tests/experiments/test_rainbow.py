"""The walks, how answers are judged, and a run of the trained experiment that is too short to learn anything."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from packtrain.errors import PacktrainError
from packtrain.experiments.rainbow import TAILS, Settings, judge_of, new_model, read_along, run
from packtrain.experiments.rainbow_evaluation import Verdict, markdown, measure
from packtrain.experiments.rainbow_report import report, settings_of, table, verdict
from packtrain.experiments.rainbow_walks import EOS, FIRST_PAD, FIRST_WORD, MASK, Course, Walks
from packtrain.objectives.sampling import Samples


def test_walks_follow_the_rule_and_end_at_their_first_last_place():
    walks = Walks()
    prompts, answers = walks.draw(3000, seed=0)
    for prompt, answer in zip(prompts, answers, strict=True):
        words = [*prompt, *answer]
        assert len(prompt) == walks.prompt
        for before, word in itertools.pairwise(words):
            place, wording = divmod(before - FIRST_WORD, walks.wordings)
            assert walks.place_of(word) == walks.next_place[place, wording]
        assert [walks.is_last(walks.place_of(word)) for word in words] == [False] * (len(words) - 1) + [True]
    lengths = np.bincount([len(answer) for answer in answers], minlength=17)
    assert lengths[0] == lengths[16] == 0 and lengths[1:16].min() > 0
    hazard = lengths[1:9] / lengths[::-1].cumsum()[::-1][1:9]
    assert (hazard < 0.25).all(), "however far a walk has come, its end is not near"
    assert walks.draw(3000, seed=0) == (prompts, answers) and walks.draw(3000, seed=1)[0] != prompts


def test_examples_are_the_walks_in_every_wording():
    walks = Walks()
    prompts, answers = walks.draw(400, seed=5)
    examples, words = walks.examples(400, seed=5), set()
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert examples[i]["input_ids"].tolist() == [*prompt, *answer]
        assert examples[i]["labels"].tolist() == [-100] * len(prompt) + answer
        words |= set(answer)
    assert words == set(range(FIRST_WORD, walks.vocab_size)), "every place in three wordings"


def test_answers_are_read_literally():
    walks = Walks()
    prompts, answers = walks.draw(200, seed=1)
    prompt, answer = next((p, a) for p, a in zip(prompts, answers, strict=True) if len(a) == 4)
    assert walks.follow(prompt, answer) == Course(4, True)
    assert walks.follow(prompt, [*answer, *answer]) == Course(4, True), "what follows is not looked at"
    assert walks.follow(prompt, answer[:3]) == Course(None, True)
    assert walks.follow(prompt, [*answer[:2], MASK, answer[3]]) == Course(4, False)
    assert walks.follow(prompt, answer[1:]) == Course(3, False)


def test_answers_are_judged_literally():
    """early: ended before a last place; late: went on, or never ended; content: followed the rule to a last place."""
    settings = Settings(canvases=(16,), blocks=(1,), prompts=5)
    prompts, answers = settings.walks.draw(5, seed=10**6)
    tail = [EOS, *[FIRST_PAD] * 16]
    wrong = FIRST_WORD + (answers[4][0] - FIRST_WORD + settings.walks.wordings) % (settings.walks.wordings * 7)
    rows = [
        [*answers[0], *tail],  # exact
        tail,  # nothing: early
        [*answers[2], answers[2][0], *tail],  # late
        [prompts[3][0]] * 17,  # never a last place, never an end: late
        [wrong, *answers[4][1:], *tail],  # ends where it should, but does not follow the rule
    ]
    tokens = torch.tensor([row[:16] for row in rows])
    ends = (EOS, FIRST_PAD)
    samples = Samples(tokens=tokens, unmasked_at=tokens * 0, evaluations=torch.ones(5), end_token_ids=ends)
    (row,) = [measure(samples, 1.0, judge_of(settings.walks, prompts), blocks=1, steps=16)]
    assert (row.early, row.late, row.content, row.exact) == (0.2, 0.4, 0.4, 0.2)


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
    text = report(tmp_path / "out", list(TAILS), command="this")
    assert text.count("| rainbow K=7 | 8 |") == 2, "one line for each number of blocks"
    assert text.endswith("    this") and (tmp_path / "out/unmasking-eos.png").exists()
    result = json.loads(before[paths[0]])
    assert [row["blocks"] for row in result["measured"]] == [1, 2] and result["measured"][0]["answers"] == 30
    assert result["curve"][-1]["step"] == 4 and result["curve"][-1]["content"] > 0
    paths[0].unlink()
    with pytest.raises(PacktrainError, match="not every tail"):
        report(tmp_path / "out", list(TAILS), command="this")
    run(settings, seeds=[3], **where)
    again = json.loads(paths[0].read_text())
    for key in ("measured", "curve", "base_curve"):
        assert again[key] == result[key], "the same seed, the same result"
    assert all(path.read_text() == before[path] for path in paths[1:])


def stored(tail: str, seed: int, early: float, *, canvas: int = 16, reading: float = 1.0) -> dict:
    row = dict(canvas=canvas, blocks=1, answers=10, mean_length=3.0, reference_length=5.0, early=early, late=0.0)
    row |= dict(exact=1 - early, content=1 - early, ends_in_first_half=0.5, evaluations=16.0)
    read = {"next_place": reading, "stops_when_done": 1.0, "stops_before": 0.0}
    return {"tail": tail, "seed": seed, "measured": [row], "reading": read}


def test_a_verdict_claims_a_difference_only_where_all_seeds_agree():
    eos = [stored("eos", seed, early) for seed, early in enumerate((0.8, 0.9, 0.7))]
    better = [stored("rainbow K=7", seed, early) for seed, early in enumerate((0.7, 0.6, 0.5))]
    mixed = [stored("single", seed, early) for seed, early in enumerate((0.1, 0.91, 0.2))]  # a lower mean, yet
    learnt, *said = verdict([*eos, *mixed, *better])
    assert learnt.startswith("Content and stop are learnable here")
    assert said[0] == "**eos** stops early in 0.80 at 16 tokens (late in 0.00; exact 0.20)."
    assert "early stops: at 16 no difference (2 of 3 seeds less, 1 more)" in said[1]
    assert "early stops: at 16 0.20 less in every seed" in said[2]
    assert "Exact answers: at 16 0.20 more in every seed" in said[2]
    not_learnt = verdict([*eos[:2], stored("eos", 2, 0.7, reading=0.9)])[0]
    assert not_learnt.startswith("Content or stop are not learnt") and "90.0%" in not_learnt
    assert "| eos | 16 | 1 | 3.00 (3.00 to 3.00) | 0.80 (0.70 to 0.90) |" in table(settings_of(eos))


class Reader(nn.Module):
    """Predicts from the token before: the next place in any wording, or an end behind a last place."""

    def __init__(self, walks: Walks, *, ends: bool):
        super().__init__()
        self.walks, self.ends = walks, ends

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        logits, walks = torch.zeros(*input_ids.shape, self.walks.vocab_size), self.walks
        for row, ids in enumerate(input_ids.tolist()):
            for i, before in enumerate(ids[:-1], start=1):
                if walks.is_last(walks.place_of(before)) and self.ends:
                    logits[row, i, EOS] = 9
                elif before >= FIRST_WORD:
                    logits[row, i, FIRST_WORD + walks.next_of(before) * walks.wordings] = 9
        return SimpleNamespace(logits=logits)


def test_reading_along_tells_what_is_known():
    settings = Settings(walks=Walks(longest=5), canvases=(16,), prompts=80)
    assert read_along(Reader(settings.walks, ends=True), settings) == dict(
        next_place=1.0, stops_when_done=1.0, stops_before=0.0
    )
    assert read_along(Reader(settings.walks, ends=False), settings)["stops_when_done"] == 0, "control"
    shares = read_along(new_model(settings, 0).eval(), settings)
    assert shares["next_place"] < 0.6, "control: an untrained model"
