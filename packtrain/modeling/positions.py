"""Where a model begins to count positions."""

from __future__ import annotations

from torch import nn


def position_start(model: nn.Module) -> int:
    """The position of a document's first token: 0, or past the padding row of the model's table of positions.

    RoBERTa and its kin keep the rows up to `padding_idx` of their position table for padding and begin behind them
    (at 2 for RoBERTa itself). Told no positions they know that by themselves; packed documents must be told theirs.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.padding_idx + 1
    return 0
