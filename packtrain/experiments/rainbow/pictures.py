"""Pictures of the rainbow experiments. They need `pip install packtrain[plots]`; without it they are left out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from packtrain.experiments.rainbow.evaluation import Measured
    from packtrain.experiments.rainbow.oracle import Outcome
    from packtrain.experiments.rainbow.report import Setting
    from packtrain.objectives.sampling import Samples

logger = logging.getLogger(__name__)


def pyplot():
    """matplotlib's pyplot without a display, or None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        logger.warning("no pictures: matplotlib is not installed (pip install 'packtrain[plots]')")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_oracle(outcomes: Sequence[Outcome], path: Path) -> None:
    """Heat maps, one per canvas: tails down, ambiguity across, the share of exact ends as colour and figure."""
    from packtrain.experiments.rainbow.oracle import tail_name

    if (plt := pyplot()) is None:
        return
    canvases = sorted({outcome.canvas for outcome in outcomes})
    names = list(dict.fromkeys(tail_name(outcome.tail, outcome.pads) for outcome in outcomes))
    ambiguities = sorted({outcome.ambiguity for outcome in outcomes})
    figure, axes = plt.subplots(1, len(canvases), figsize=(4.2 * len(canvases), 0.42 * len(names) + 1.4), sharey=True)
    for axis, canvas in zip(np.atleast_1d(axes), canvases, strict=True):
        share = np.zeros((len(names), len(ambiguities)))
        for outcome in outcomes:
            if outcome.canvas == canvas:
                row, column = names.index(tail_name(outcome.tail, outcome.pads)), ambiguities.index(outcome.ambiguity)
                share[row, column] = outcome.exact
        axis.imshow(share, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for row, column in np.ndindex(share.shape):
            colour = "black" if share[row, column] > 0.6 else "white"
            axis.text(column, row, f"{share[row, column]:.2f}", ha="center", va="center", color=colour, fontsize=8)
        axis.set_xticks(range(len(ambiguities)), ambiguities)
        axis.set_yticks(range(len(names)), names)
        axis.set_xlabel("equally likely wordings per token (B)")
        axis.set_title(f"canvas {canvas}", fontsize=10)
    figure.suptitle("Exact denoiser: share of answers that end where they should", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_lengths(curves: Mapping[str, Sequence[Measured]], path: Path) -> None:
    """How long answers are, and how many stop early, against the room they are given; one line per model."""
    if (plt := pyplot()) is None:
        return
    figure, (lengths, early) = plt.subplots(1, 2, figsize=(9, 3.4))
    for name, rows in curves.items():
        rows = sorted(rows, key=lambda row: row.canvas)
        room = [row.canvas for row in rows]
        lengths.plot(room, [row.mean_length for row in rows], marker="o", label=name)
        early.plot(room, [row.early for row in rows], marker="o", label=name)
    reference = next(iter(curves.values()))[0].reference_length
    lengths.axhline(reference, color="grey", linestyle=":", label="reference")
    lengths.set_ylabel("mean length of answers (tokens)")
    early.set_ylabel("share that stop early")
    early.set_ylim(-0.03, 1.03)
    for axis in (lengths, early):
        axis.set_xscale("log", base=2)
        axis.set_xticks(room, room)
        axis.set_xlabel("allocated length (tokens)")
    early.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_trained(settings: Sequence[Setting], reference: float, path: Path) -> None:
    """Early stops, exact answers and lengths against the allocated length, one block; bars reach over all seeds."""
    if (plt := pyplot()) is None:
        return
    whole = [setting for setting in settings if setting.blocks == 1]
    canvases = sorted({setting.canvas for setting in whole})
    panels = {"early": "share that stop early", "exact": "share that are exact", "mean_length": "mean length (tokens)"}
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.4))
    for number, tail in enumerate(dict.fromkeys(setting.tail for setting in whole)):
        own = sorted((setting for setting in whole if setting.tail == tail), key=lambda setting: setting.canvas)
        for axis, (field, label) in zip(axes, panels.items(), strict=True):
            means = [setting.mean(field) for setting in own]
            below = [mean - min(setting.values[field]) for mean, setting in zip(means, own, strict=True)]
            above = [max(setting.values[field]) - mean for mean, setting in zip(means, own, strict=True)]
            room = [setting.canvas * (1 + 0.03 * number) for setting in own]  # beside each other
            axis.errorbar(room, means, yerr=(below, above), marker="o", capsize=3, label=tail)
            axis.set_ylabel(label)
    axes[2].axhline(reference, color="grey", linestyle=":", label="reference")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(canvases, canvases)
        axis.set_xlabel("allocated length (tokens)")
    for axis in axes[:2]:
        axis.set_ylim(-0.03, 1.03)
    axes[2].set_ylim(bottom=0)
    axes[2].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_unmasking(samples: Samples, path: Path, *, eos: int, pads: Sequence[int], rows: int = 24) -> None:
    """Which position was written when: one answer per line, dark first. eos is red, pads are the rainbow's colours."""
    if (plt := pyplot()) is None:
        return
    tokens, when = samples.tokens[:rows].cpu().numpy(), samples.unmasked_at[:rows].cpu().numpy()
    late = when / max(when.max(), 1)
    figure, axes = plt.subplots(2, 1, figsize=(min(14, 2 + 0.14 * tokens.shape[1]), 1.6 + 0.26 * len(tokens)))
    order = axes[0].imshow(np.where(when < 0, np.nan, late), cmap="magma", aspect="auto", vmin=0, vmax=1)
    figure.colorbar(order, ax=axes[0], label="written at (share of steps)")
    axes[0].set_title("when", fontsize=10)
    colours = np.full((*tokens.shape, 3), 0.85)
    colours[tokens == eos] = (0.8, 0.1, 0.1)
    for number, pad in enumerate(pads):
        colours[tokens == pad] = plt.get_cmap("turbo")(0.15 + 0.6 * number / max(len(pads) - 1, 1))[:3]
    axes[1].imshow(colours, aspect="auto")
    axes[1].set_title("what: grey content, red eos, pads in colour", fontsize=10)
    for axis in axes:
        axis.set_xlabel("position")
        axis.set_ylabel("answer")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
