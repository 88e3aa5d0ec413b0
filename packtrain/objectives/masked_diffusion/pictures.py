"""Draws answers of masked diffusion models. Needs `pip install packtrain[plots]`; without it, pictures are left out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from packtrain.objectives.masked_diffusion.evaluation import Measured
    from packtrain.objectives.masked_diffusion.sampling import Samples

logger = logging.getLogger(__name__)


def pyplot():
    """Imports matplotlib's pyplot without a display; None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        logger.warning("no pictures: matplotlib is not installed (pip install 'packtrain[plots]')")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_lengths(curves: Mapping[str, Sequence[Measured]], path: Path) -> None:
    """Draws how long answers are, and how many stop early, against the allocated length; one line per model."""
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


def draw_unmasking(samples: Samples, path: Path, *, eos: int, pads: Sequence[int], rows: int = 24) -> None:
    """Draws which position was written when: one answer a line, dark first. eos is red, pads have the rainbow's colours."""
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
    colours[when < 0] = 1.0
    axes[1].imshow(colours, aspect="auto")
    axes[1].set_title("what: grey content, red eos, pads in colour, white what was left unwritten", fontsize=10)
    for axis in axes:
        axis.set_xlabel("position")
        axis.set_ylabel("answer")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
