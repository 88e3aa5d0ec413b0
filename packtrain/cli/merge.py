"""`packtrain merge`: merge an adapter into its model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from packtrain.cli.generate import DtypeName, Target, dtype_of


def merge(
    target: Target,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write the merged model; must be empty.")],
    dtype: DtypeName = "auto",
) -> None:
    """Merge a LoRA adapter into its model, and write one ordinary model with the adapter's model card.

    The merged model is read back, and its logits are compared with those of the model with its adapter.
    """
    from packtrain.generation.merging import merge as run
    from packtrain.generation.trained import find_model, load_trained
    from packtrain.training.model_card import write_merged_card

    difference = run(load_trained(target, dtype=dtype_of(dtype)), out)
    _, folder = find_model(target)
    if folder is not None:
        write_merged_card(folder, out)
    print(f"wrote {out}; its logits differ by {difference:.1e} of the largest from those with the adapter")
