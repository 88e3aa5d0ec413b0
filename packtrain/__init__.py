"""packtrain: a training step is a set of examples, a strategy only decides how they lie in memory.

packtrain.attach(trainer)            training without padding inside any transformers.Trainer or trainer of TRL
packtrain.unpad(model)               the layers of any padded model without padding, in any loop
packtrain.PackCollator(...)          a data collator for a stock Trainer
packtrain.PackedStream(rows, ...)    packs of an iterable dataset, for any loop
packtrain.train(load_recipe(path))   what `packtrain train` does
packtrain.load_examples(recipe)      its tokenised examples, for a loop of your own: (training, held out or None)
packtrain.audit(model)               are packed documents isolated in this model?
packtrain.make_plan(lengths, ...)    which examples every update sees, and in which micro-batches
packtrain.register_attention()       makes attn_implementation="packtrain_varlen" known to transformers
packtrain.PackTrainer(...)           the Trainer behind `train`, for plans made in Python
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packtrain.modeling.attention.varlen import register as register_attention
    from packtrain.modeling.audit.audit import audit_model as audit
    from packtrain.modeling.unpad import unpad
    from packtrain.objectives.task import load_examples
    from packtrain.packing.collator import PackCollator
    from packtrain.packing.plan import make_plan
    from packtrain.packing.stream import PackedStream
    from packtrain.plugin.attach import attach
    from packtrain.recipe.reader import load_recipe
    from packtrain.training.run import train
    from packtrain.training.trainer import PackTrainer

__version__ = "0.2.0"
__all__ = [
    "PackCollator",
    "PackTrainer",
    "PackedStream",
    "__version__",
    "attach",
    "audit",
    "load_examples",
    "load_recipe",
    "make_plan",
    "register_attention",
    "train",
    "unpad",
]

_WHERE = {  # looked up on first use, so that importing packtrain imports no torch
    "PackCollator": "packtrain.packing.collator:PackCollator",
    "PackTrainer": "packtrain.training.trainer:PackTrainer",
    "PackedStream": "packtrain.packing.stream:PackedStream",
    "attach": "packtrain.plugin.attach:attach",
    "audit": "packtrain.modeling.audit.audit:audit_model",
    "load_examples": "packtrain.objectives.task:load_examples",
    "load_recipe": "packtrain.recipe.reader:load_recipe",
    "make_plan": "packtrain.packing.plan:make_plan",
    "register_attention": "packtrain.modeling.attention.varlen:register",
    "train": "packtrain.training.run:train",
    "unpad": "packtrain.modeling.unpad:unpad",
}


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'packtrain' has no attribute {name!r}")
    module, _, attribute = _WHERE[name].partition(":")
    return getattr(_import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
