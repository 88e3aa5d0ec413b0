"""Measures how answers of a diffusion model depend on the length they are given.

For every allocated length: how long the answers are, how often they stop too early or too late, how often they are
right, and how soon the sampler writes ends and pads. Early termination shows as answers that get shorter with more
room, and as a first half of steps that goes to the tail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from packtrain.objectives.masked_diffusion.sampling import Samples


class Verdict(NamedTuple):
    """The judgement of one answer; see `Measured`."""

    early: bool
    late: bool
    exact: bool
    content: bool


Judge = Callable[[int, list[int]], Verdict]  # (row, the whole canvas)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The figures for one allocated length and one number of blocks.

    Lengths are tokens before the first end or pad; rates are shares of the answers.

    Attributes:
        reference_length: mean length of the answers in the data.
        early, late: stopped before, or after, the answer was complete.
        exact: the answer is right and stops where it should.
        content: all that the answer should contain is there, whatever follows.
        ends_in_first_half: of the tokens written in the first half of the steps, the share of ends and pads.
        evaluations: forward passes of the model per answer, until its end and all before it are written (where samples
            stop early).
    """

    canvas: int
    blocks: int
    answers: int
    mean_length: float
    reference_length: float
    early: float
    late: float
    exact: float
    content: float
    ends_in_first_half: float
    evaluations: float


def measure(samples: Samples, reference_length: float, judge: Judge, *, blocks: int, steps: int) -> Measured:
    """Judges answers, and counts when the sampler wrote what.

    Args:
        samples: whose `end_token_ids` are the eos and all pads.
        reference_length: mean length of the answers in the data.
        blocks, steps: sampled with.
    """
    verdicts = [judge(row, tokens) for row, tokens in enumerate(samples.tokens.tolist())]
    share = dict(zip(Verdict._fields, torch.tensor(verdicts).double().mean(dim=0).tolist(), strict=True))
    tokens, when = samples.tokens.cpu(), samples.unmasked_at.cpu()
    ends = torch.isin(tokens, torch.tensor(samples.end_token_ids))
    early_steps = (when >= 0) & (when < steps / 2)
    return Measured(
        canvas=tokens.shape[1],
        blocks=blocks,
        answers=len(tokens),
        mean_length=samples.lengths().double().mean().item(),
        reference_length=reference_length,
        **share,
        ends_in_first_half=(ends & early_steps).sum().item() / max(early_steps.sum().item(), 1),
        evaluations=samples.evaluations.double().mean().item(),
    )


COLUMNS = {  # field -> heading, format
    "canvas": ("allocated", "d"),
    "blocks": ("blocks", "d"),
    "mean_length": ("mean length", ".2f"),
    "reference_length": ("reference", ".2f"),
    "early": ("early stop", ".2f"),
    "late": ("late stop", ".2f"),
    "exact": ("exact", ".2f"),
    "content": ("content", ".2f"),
    "ends_in_first_half": ("ends in first half", ".2f"),
    "evaluations": ("evaluations", ".1f"),
}


def markdown(rows: Sequence[tuple[str, Measured]], label: str = "model") -> str:
    """Makes a table with one line per measurement."""
    lines = [f"| {label} | " + " | ".join(heading for heading, _ in COLUMNS.values()) + " |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    for name, row in rows:
        values = asdict(row)
        cells = (format(values[field], form) for field, (_, form) in COLUMNS.items())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
