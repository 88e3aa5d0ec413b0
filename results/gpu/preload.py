"""Imports what parts need, so that it is there when their processes are forked. Touches no device."""

from __future__ import annotations

from importlib import import_module

for name in ("packtrain.compare.worker", "packtrain.compare.comparison", "trl.trainer.sft_trainer", "peft"):
    try:
        import_module(name)
    except Exception as error:  # the part that needs it will say so
        print(f"{name}: {error}")
