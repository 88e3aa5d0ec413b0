"""The walks, how answers are judged, and a run of the trained experiment that is too short to learn anything."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from packtrain.errors import PacktrainError
from packtrain.objectives.masked_diffusion.evaluation import Verdict, markdown, measure
from packtrain.objectives.masked_diffusion.sampling import Samples
from results.rainbow.report import load_results, page, settings_of, table, verdict
from results.rainbow.run import COMMAND, HERE, write_trained
from results.rainbow.trained import TAILS, Settings, answer, ceiling, judge_of, new_model, read_along, run
from results.rainbow.walks import EOS, FIRST_PAD, FIRST_WORD, Walks


def test_walks_follow_the_map_and_end_at_their_first_last_place():
    walks = Walks()
    prompts, answers = walks.draw(3000, seed=0)
    for prompt, places in zip(prompts, answers, strict=True):
        *keys, start = prompt
        here = walks.places_of([start])[0]
        for key, place in zip(keys, places, strict=False):
            assert place == walks.next_place[here, key - walks.first_key]
            here = place
        assert [walks.is_last(place) for place in places] == [False] * (len(places) - 1) + [True]
    lengths = np.bincount([len(places) for places in answers], minlength=17)
    assert lengths[0] == lengths[16] == 0 and lengths[1:14].min() > 0
    hazard = lengths[1:8] / lengths[::-1].cumsum()[::-1][1:8]
    assert (hazard < 0.33).all(), "however far a walk has come, its end is not near"
    assert walks.draw(3000, seed=0) == (prompts, answers) and walks.draw(3000, seed=1)[0] != prompts


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


def test_answers_are_judged_literally():
    walks = Walks()
    references = [[0, 1, 5]] * 5
    right = [FIRST_WORD + place * walks.wordings for place in (0, 1, 5)]
    other_wording = [word + 2 for word in right]
    rows = [
        [*right, EOS, FIRST_PAD],  # exact
        [*other_wording, EOS, FIRST_PAD],  # exact, too
        [*right[:2], FIRST_PAD, EOS, EOS],  # early: a pad ends it as well
        [*right, right[0], EOS],  # late, and the content is there
        [right[1], *right[1:], EOS],  # ends where it should, with a wrong place
    ]
    judge = judge_of(walks, references)
    assert [judge(row, tokens) for row, tokens in enumerate(rows)] == [
        Verdict(early=False, late=False, exact=True, content=True),
        Verdict(early=False, late=False, exact=True, content=True),
        Verdict(early=True, late=False, exact=False, content=False),
        Verdict(early=False, late=True, exact=False, content=True),
        Verdict(early=False, late=False, exact=False, content=False),
    ]


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
    run(settings, seeds=[0], **where)
    paths = sorted((tmp_path / "out/runs").glob("*.json"))
    assert len(paths) == len(TAILS)
    before = {path: path.read_text() for path in paths}
    text = write_trained(tmp_path / "out", [0])
    assert text.count("| rainbow K=7 | 8 |") == 2, "one line for each number of blocks"
    assert text.endswith(f"    {COMMAND} --seeds 0") and (tmp_path / "out/unmasking-eos.png").exists()
    result = json.loads(before[paths[0]])
    assert [row["blocks"] for row in result["measured"]] == [1, 2] and result["measured"][0]["answers"] == 30
    assert result["curve"][-1]["step"] == 4 and result["curve"][-1]["content"] > 0
    paths[0].unlink()
    with pytest.raises(PacktrainError, match="not every tail"):
        write_trained(tmp_path / "out", [0])
    run(settings, seeds=[0], **where)
    again = json.loads(paths[0].read_text())
    for key in ("measured", "curve", "base_curve"):
        assert again[key] == result[key], "the same seed, the same result"
    assert all(path.read_text() == before[path] for path in paths[1:])


def test_void_is_never_written(tmp_path):
    settings = Settings(walks=Walks(longest=5), hidden_size=16)
    prompts, model = settings.walks.draw(20, seed=0)[0], new_model(settings, 0).eval()
    with torch.no_grad():
        model.lm_head.weight[FIRST_PAD] = 40 * model.lm_head.weight[FIRST_PAD]
    written = {name: answer(model, prompts, 8, TAILS[name]).tokens for name in ("void", "single")}
    assert not (written["void"] == FIRST_PAD).any() and (written["single"] == FIRST_PAD).any()


def test_the_stored_page_is_what_the_stored_runs_say():
    directory = HERE / "trained"
    results, pictures = load_results(directory / "runs", list(TAILS)), sorted(directory.glob("unmasking-*.png"))
    command = f"{COMMAND} --seeds 0 1 2 3 4 5"
    text = page(results, pictures=[path.name for path in pictures], command=command)
    assert (directory / "README.md").read_text() == text + "\n"


def stored(tail: str, seed: int, exact: float, *, length: float = 3.0, ceiling: float = 1.0) -> dict:
    row = dict(canvas=16, blocks=1, answers=10, mean_length=length, reference_length=5.0, early=1 - exact, late=0.0)
    row |= dict(exact=exact, content=exact, ends_in_first_half=0.5, evaluations=16.0)
    read = {"next_place": 1.0, "stops_when_done": 1.0, "stops_before": 0.0}
    return {"tail": tail, "seed": seed, "measured": [row], "reading": read, "ceiling": ceiling}


def test_a_verdict_claims_a_difference_only_where_the_interval_leaves_zero_out():
    eos = [stored("eos", seed, exact) for seed, exact in enumerate((0.2, 0.1, 0.3))]
    better = [stored("rainbow K=7", seed, exact, length=4.5) for seed, exact in enumerate((0.5, 0.41, 0.6))]
    mixed = [stored("single", seed, exact) for seed, exact in enumerate((0.9, 0.09, 0.8))]  # a higher mean, yet
    learnt, *said, chance = verdict([*eos, *mixed, *better])
    assert learnt.startswith("The task is learnt") and "100.0% of the base model's answers" in learnt
    assert chance.startswith("10 intervals of 95% are given: about 0 would")
    assert said[0] == (
        "**eos** is exact in 0.20 at 16 tokens (early in 0.80; late in 0.00; mean length 3.00; 16.0 evaluations)."
    )
    assert "3 seeds can't tell it from eos: exact answers +0.40 (" in said[2]
    assert "would take about" in said[2] and "seeds to see (power 80%)" in said[2]
    assert "it is better than eos: exact answers +0.30 (+0.29 to +0.32); early stops -0.30" in said[4]
    assert "mean length +1.50 (+1.50 to +1.50)" in said[4] and "evaluations" not in said[4], "these are the same"
    assert (
        "it is worse than eos"
        in verdict([*[r | {"tail": "eos"} for r in better], *[r | {"tail": "x"} for r in eos]])[3]
    )
    not_learnt = verdict([*eos[:2], stored("eos", 2, 0.3, ceiling=0.8)])[0]
    assert not_learnt.startswith("The task is not learnt everywhere") and "80.0% in the worst seed" in not_learnt
    assert "| eos | 16 | 1 | 3.00 (3.00 to 3.00) | 0.80 (0.70 to 0.90) |" in table(settings_of(eos))


class Walker(nn.Module):
    """Knows the whole answer from the prompt, and not where the canvas ends."""

    def __init__(self, walks: Walks):
        super().__init__()
        self.walks, self.scale = walks, nn.Parameter(torch.tensor(9.0))
        self.config, self.head = SimpleNamespace(_attn_implementation="sdpa"), nn.Identity()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, **kwargs) -> SimpleNamespace:
        logits, walks = torch.zeros(*input_ids.shape, self.walks.vocab_size), self.walks
        for row, ids in enumerate(input_ids.tolist()):
            place, keys = walks.places_of([ids[walks.longest]])[0], ids[: walks.longest]
            for i in range(walks.longest + 1, len(ids)):
                if walks.is_last(place) or i - walks.longest > walks.longest:
                    logits[row, i, EOS] = 1
                else:
                    place = walks.next_place[place, keys[i - walks.longest - 1] - walks.first_key]
                    logits[row, i, FIRST_WORD + place * walks.wordings] = 1
        return SimpleNamespace(logits=self.head(logits * self.scale))


def test_the_ceiling_is_that_of_the_true_length():
    settings = Settings(walks=Walks(longest=5), prompts=40)
    assert ceiling(Walker(settings.walks), settings) == 1
    assert ceiling(new_model(settings, 0).eval(), settings) < 0.3, "control: an untrained model"


class Reader(nn.Module):
    """Predicts from the token before and the key: the next place in any wording, or an end behind a last place."""

    def __init__(self, walks: Walks, *, ends: bool):
        super().__init__()
        self.walks, self.ends = walks, ends

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        logits, walks = torch.zeros(*input_ids.shape, self.walks.vocab_size), self.walks
        for row, ids in enumerate(input_ids.tolist()):
            places = walks.places_of(ids)
            for i in range(1 + walks.longest, len(ids)):
                before, number = places[i - 1], i - 1 - walks.longest
                if walks.is_last(before) and self.ends:
                    logits[row, i, EOS] = 9
                elif before >= 0 and number < walks.longest:
                    place = walks.next_place[before, ids[number] - walks.first_key]
                    logits[row, i, FIRST_WORD + place * walks.wordings] = 9
        return SimpleNamespace(logits=logits)


def test_reading_along_tells_what_is_known():
    settings = Settings(walks=Walks(longest=5), canvases=(16,), prompts=80)
    assert read_along(Reader(settings.walks, ends=True), settings) == dict(
        next_place=1.0, stops_when_done=1.0, stops_before=0.0
    )
    assert read_along(Reader(settings.walks, ends=False), settings)["stops_when_done"] == 0, "control"
    shares = read_along(new_model(settings, 0).eval(), settings)
    assert shares["next_place"] < 0.6, "control: an untrained model"
