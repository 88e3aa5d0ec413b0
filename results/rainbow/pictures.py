"""Draws the oracle's grid and the trained tails. Needs `pip install packtrain[plots]`; otherwise no picture is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from packtrain.objectives.masked_diffusion.pictures import pyplot
from results.rainbow.oracle import Outcome, tail_name
from results.rainbow.report import Setting


def draw_oracle(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw heat maps, one per canvas: tails down, ambiguity across, the share of exact ends as colour and figure."""
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


def draw_trained(settings: Sequence[Setting], reference: float, path: Path) -> None:
    """Draw early stops, exact answers and lengths against the allocated length, one block; bars reach over all seeds."""
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
            room = [setting.canvas * (1 + 0.03 * number) for setting in own]  # side by side
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
