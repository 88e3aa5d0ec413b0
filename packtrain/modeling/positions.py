"""The positions of a model: the first one, and how far they reach."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from packtrain.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel

TABLES = ("wpe", "position_embeddings", "embed_positions")  # of learnt positions


def position_start(model: nn.Module) -> int:
    """Returns the position of a document's first token: 0, or the first that the model gives one by itself.

    RoBERTa and its kin keep the rows up to `padding_idx` of their position table for padding and begin behind them
    (at 2 for RoBERTa itself); Nystromformer, YOSO and MRA begin at 2 without. Told no positions they know that by
    themselves; packed documents must be told theirs.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.padding_idx + 1
    for module in model.modules():
        counted = getattr(module, "position_ids", None)
        if torch.is_tensor(counted) and hasattr(module, "position_embeddings") and not counted.is_meta:
            return int(counted.flatten()[0])
    return 0


def check_positions(model: PreTrainedModel | PeftModel, longest: int) -> str | None:
    """Checks that a document of `longest` tokens has positions in the model; says so where they were never trained.

    Raises:
        ModelError: the model's table of learnt positions is shorter.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in TABLES:
            rows = module.num_embeddings - getattr(module, "offset", position_start(model))
            if longest > rows:
                what = f"an example has {longest:,} tokens, and the model {rows:,} positions"
                raise ModelError(what, key="data.max_length", fix=f"set it to {rows} or less")
            return None
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and longest > most:
        return f"the longest example has {longest:,} tokens, and the model was made for {most:,} positions"
    return None
