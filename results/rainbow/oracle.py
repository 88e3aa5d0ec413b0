"""Computes why answers end early, and what a rainbow changes, with an exact denoiser: no training, a minute.

    python results/rainbow/run.py --oracle      # the grid of oracle.yaml into results/rainbow/oracle/

The world: an answer has L content tokens, L drawn from a known prior. Each content token could as well be worded in
B ways, all equally likely (the *ambiguity*). Then come one eos and the tail. The denoiser is perfect: from the tokens
written so far it computes the exact probability of every token at every masked position, and from an answer written
without a gap from the left it reads whether the answer is complete, as a reader would. The sampler is the real one
(`packtrain.objectives.masked_diffusion.sampling.denoise`): one token per step, the surest first, no temperature.

What happens: far to the right the tail is all but certain, while a content token can't be surer than 1/B. So a tail of
one token is written first, from the right; each token of it moves the believed end to the left, which makes the next
one as certain, and the answer ends where it began. With K tokens in turn a tail token is only sure to about 1/K as
long as the end is unknown. When that is below 1/B, the answer is written first, and it says where it ends. Where the
tail is banned (`void`), what is left far to the right is unlikely, so the answer is written first, too.

Nothing is sampled: the greedy sampler is run once per true length, and results are averaged with the prior's weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

from packtrain.errors import PacktrainError
from packtrain.objectives.masked_diffusion.sampling import Sampling, denoise

DIGITS = 12  # decimals in which certainties are compared and averages kept, so that rounding errors show nowhere


@dataclass(frozen=True, kw_only=True)
class World:
    """Holds a length prior, an ambiguity and a tail.

    Attributes:
        prior: float64 `[M]`, probability of each true length 1 .. M.
        ambiguity: B, equally likely wordings of a content token.
        tail: `eos`, `single`, `rainbow`, `random` or `void`.
        pads: K, pad tokens; 0 for eos, 1 for single and void.
        canvas: G, positions; more than M.
    """

    prior: np.ndarray
    ambiguity: int
    tail: str
    pads: int
    canvas: int

    @property
    def eos(self) -> int:
        """The id of eos. Token ids: wordings 0 .. B-1, then eos, then pads, then the mask."""
        return self.ambiguity

    @property
    def mask(self) -> int:
        return self.ambiguity + 1 + self.pads


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Holds averages over the prior.

    `exact` and `early` are shares of answers, lengths are in content tokens, `evaluations` are calls of the denoiser until
    the first end and all before it are written.
    """

    tail: str
    pads: int
    ambiguity: int
    canvas: int
    exact: float
    early: float
    mean_length: float
    true_mean_length: float
    evaluations: float


def length_prior(longest: int = 28, mean: float = 5.84, shape: float = 1.5) -> np.ndarray:
    """Compute 1 + a negative binomial, cut at `longest`, with this mean after the cut: float64 `[longest]`. Most answers
    are short, 11% a single token."""
    lengths = np.arange(1, longest + 1)
    assert 1 < mean < lengths.mean(), "short answers are the likelier ones"
    steps = (lengths[:-1] - 1 + shape) / lengths[:-1]  # of one weight to the next, without the ratio
    low, high = 0.0, 1.0
    for _ in range(60):  # the mean grows with the ratio
        ratio = (low + high) / 2
        weights = np.cumprod([1.0, *(ratio * steps)])
        prior = weights / weights.sum()
        low, high = (ratio, high) if prior @ lengths < mean else (low, ratio)
    return prior


def likelihoods(world: World) -> Tensor:
    """Compute P(token at position | true length), float64 `[V, M, G]`; the mask, which says nothing, has 1."""
    lengths = torch.arange(1, len(world.prior) + 1)[:, None]  # [M, 1]
    position = torch.arange(world.canvas)[None]  # [1, G]
    behind = position - lengths - 1  # 0 right behind the eos
    table = torch.zeros(world.mask + 1, len(world.prior), world.canvas, dtype=torch.float64)
    table[: world.ambiguity] = (position < lengths).double() / world.ambiguity
    table[world.eos] = (position >= lengths if world.tail == "eos" else position == lengths).double()
    for k in range(world.pads):
        if world.tail == "random":
            table[world.eos + 1 + k] = (behind >= 0).double() / world.pads
        else:
            table[world.eos + 1 + k] = ((behind >= 0) & (behind % world.pads == k)).double()
    table[world.mask] = 1
    return table


def exact_denoiser(world: World):
    """Make the `predict` of `denoise` for a canvas per true length 1 .. M: log probabilities given what is written."""
    table, prior = likelihoods(world), torch.from_numpy(world.prior)
    possible = table > 0
    lengths = torch.arange(1, len(prior) + 1)  # [M]
    position = torch.arange(world.canvas)

    def predict(rows: Tensor, canvases: Tensor, start: int, stop: int) -> Tensor:
        agrees = possible[canvases, :, position].all(dim=1)  # [R, M]: may an answer of this length look so?
        posterior = prior * agrees  # what wordings and random pads there are cancels
        content = canvases < world.ambiguity
        prefix = content.cumprod(dim=1).sum(dim=1, keepdim=True)  # [R, 1], content without a gap from the left
        complete = prefix > rows[:, None]  # the true length of row r is r + 1
        told = torch.where(complete, lengths == prefix, lengths > prefix)  # [R, M], what the reader knows
        informed = posterior * told
        # Content already written beyond the end, or an end before it, contradicts the reader: the canvas is believed.
        posterior = torch.where(informed.sum(dim=1, keepdim=True) > 0, informed, posterior)
        posterior = posterior / posterior.sum(dim=1, keepdim=True)
        probabilities = torch.einsum("rm,vmg->rgv", posterior, table[: world.mask, :, start:stop])
        return probabilities.round(decimals=DIGITS).log()

    return predict


def decode(world: World) -> Outcome:
    """Run the sampler for every true length, and average."""
    count = len(world.prior)
    assert world.canvas > count, "the longest answer and its eos fit"
    ends = {"end_token_ids": (world.eos,), "pad_token_ids": tuple(range(world.eos + 1, world.mask))}
    policy = "ban_pad" if world.tail == "void" else "none"
    # Stopping early changes no answer.
    sampling = Sampling(steps=world.canvas, **ends, end_token_policy=policy, early_stop=True)
    canvas = torch.full((count, world.canvas), world.mask)
    samples = denoise(exact_denoiser(world), canvas, sampling, mask_token_id=world.mask)
    written, true = samples.lengths().numpy(), np.arange(1, count + 1)

    def average(values: np.ndarray) -> float:
        return round(float(world.prior @ values), DIGITS)  # the same digits on every processor

    return Outcome(
        tail=world.tail,
        pads=world.pads,
        ambiguity=world.ambiguity,
        canvas=world.canvas,
        exact=average(written == true),
        early=average(written < true),
        mean_length=average(written),
        true_mean_length=average(true),
        evaluations=average(samples.evaluations.numpy()),
    )


def run_grid(
    *,
    ambiguities: Sequence[int] = (1, 2, 3, 4, 5, 6, 8),
    rainbows: Sequence[int] = (2, 3, 5, 7, 10, 20),
    randoms: Sequence[int] = (7,),
    canvases: Sequence[int] = (32, 64, 128),
    mean_length: float = 5.84,
) -> list[Outcome]:
    """Decode every tail at every ambiguity and canvas."""
    cycles = [("rainbow", k) for k in rainbows] + [("random", k) for k in randoms]
    tails = [("eos", 0), ("single", 1), *cycles, ("void", 1)]
    prior = length_prior(mean=mean_length)
    return [
        decode(World(prior=prior, ambiguity=ambiguity, tail=tail, pads=pads, canvas=canvas))
        for canvas in canvases
        for tail, pads in tails
        for ambiguity in ambiguities
    ]


def tail_name(tail: str, pads: int) -> str:
    return tail if pads < 2 else f"{tail} K={pads}"


def markdown_table(outcomes: Sequence[Outcome], canvas: int) -> str:
    """Write one canvas: tails down, ambiguities across; `exact / mean length / evaluations` in the cells."""
    chosen = [outcome for outcome in outcomes if outcome.canvas == canvas]
    ambiguities = sorted({outcome.ambiguity for outcome in chosen})
    lines = ["| tail | " + " | ".join(f"B={b}" for b in ambiguities) + " |", "|---" * (len(ambiguities) + 1) + "|"]
    for name in dict.fromkeys(tail_name(outcome.tail, outcome.pads) for outcome in chosen):
        row = {o.ambiguity: o for o in chosen if tail_name(o.tail, o.pads) == name}
        cells = (f"{row[b].exact:.2f} / {row[b].mean_length:.2f} / {row[b].evaluations:.1f}" for b in ambiguities)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(outcomes: Sequence[Outcome], *, command: str) -> str:
    """Write the page: one table for each canvas."""
    parts = [
        "# Oracle: share of answers that end exactly where they should / mean length written / evaluations",
        f"True mean length {outcomes[0].true_mean_length:.2f}. B: equally likely wordings per content token. Evaluations: "
        f"calls of the denoiser until the first end and all before it are written. `{command}`",
    ]
    for canvas in sorted({outcome.canvas for outcome in outcomes}):
        parts += [f"## Canvas {canvas}", markdown_table(outcomes, canvas)]
    return "\n\n".join(parts) + "\n"


def run_file(path: Path) -> list[Outcome]:
    """Run the grid that a YAML file describes.

    Raises:
        PacktrainError: a key that is no argument of `run_grid`.
    """
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    known = inspect.signature(run_grid).parameters
    for key in settings:
        if key not in known:
            raise PacktrainError("is not a key", where=str(path), key=key, fix=f"known: {', '.join(known)}")
    return run_grid(**settings)
