"""packtrain: a training step is a set of examples, a strategy only decides how they lie in memory.

packtrain.attach(trainer)          packtrain's layouts inside a transformers.Trainer or trl.SFTTrainer
packtrain.PackCollator(...)        a data collator for a stock Trainer
packtrain.PackedStream(rows, ...)  packs of an iterable dataset, for any loop
packtrain.load_recipe(path)        the recipe of `packtrain train`
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

_WHERE = {  # looked up on first use, so that importing packtrain imports no torch
    "attach": "packtrain.training.plugin",
    "PackTrainer": "packtrain.training.trainer",
    "PackCollator": "packtrain.packing.collator",
    "PackedStream": "packtrain.packing.stream_dataset",
    "make_plan": "packtrain.packing.plan",
    "load_recipe": "packtrain.recipe",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'packtrain' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
