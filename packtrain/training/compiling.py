"""`torch_compile`: layer by layer, with a graph for every shape of the plan or one for all.

Trainer would compile the whole model, head and all. The head runs at supervised positions, whose number is another in every
micro-batch, so every micro-batch would be compiled anew, and after eight of them nothing is compiled any more. Here the
decoder layers are compiled, each with the graphs of the others, and embeddings and head stay outside.

    batching.shapes: 8    at most eight graphs per kind of layer, each for one number of tokens
    batching.shapes: null one graph for any number of tokens
"""

from __future__ import annotations

import logging
import os
from typing import Any, cast

import torch
from accelerate.utils import TorchDynamoPlugin
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from packtrain.errors import LaunchError
from packtrain.packing.plan import AnyPlan

logger = logging.getLogger(__name__)
KINDS = 8  # graphs of one shape: kinds of layers, training and evaluation, with and without gradients


class CompileLayers(TrainerCallback):
    """Compiles the layers of a model when training begins, after the checks that run it on batches of other shapes.

    Attributes:
        options: the arguments of `torch.compile`.
        shapes: graphs of every kind of layer.
    """

    def __init__(self, options: dict[str, Any], shapes: int):
        self.options, self.shapes = options, shapes
        self._compiled: set[int] = set()

    @classmethod
    def asked(cls, args: TrainingArguments, plan: AnyPlan) -> CompileLayers | None:
        """Takes `torch_compile` out of the arguments, so that Trainer does not compile the model; None where it is not set.

        Raises:
            LaunchError: the environment has accelerate compile the whole model.
            ValueError: a backend that accelerate does not know.
        """
        backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "")
        if backend.lower() not in ("", "no"):
            what = "has accelerate compile the whole model, which is compiled anew for every micro-batch"
            fix = "unset it, or remove `dynamo_config` of accelerate; training.torch_compile: true compiles the layers"
            raise LaunchError(what, key="ACCELERATE_DYNAMO_BACKEND", value=backend, fix=fix)
        if not args.torch_compile:
            return None
        flat = plan.layout == "flat"
        given: dict[str, Any] = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
        options = TorchDynamoPlugin(**given, dynamic=cast(bool, plan.shapes is None if flat else None)).to_kwargs()
        args.torch_compile, args.torch_compile_backend = False, None
        return cls(options, 1 if plan.shapes is None else len(plan.shapes.tokens))

    def restore(self, args: TrainingArguments) -> None:
        """Sets `torch_compile` again, for what reads the arguments of a run."""
        args.torch_compile, args.torch_compile_backend = True, self.options["backend"]

    def on_train_begin(self, args, state, control, model: nn.Module | None = None, **kwargs):
        assert model is not None
        layers = layers_of(model)
        if not layers:
            logger.warning("packtrain: torch_compile has no effect on %s, which has no layers", type(model).__name__)
        settings: Any = torch._dynamo.config  # torch's own limit is for all shapes of a function together
        settings.recompile_limit = max(settings.recompile_limit, KINDS * self.shapes)
        for layer in layers:
            if id(layer) not in self._compiled:
                layer.compile(**self.options)
                self._compiled.add(id(layer))


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Returns the outermost layers of a model of transformers: those that it can checkpoint one by one."""
    if isinstance(model, GradientCheckpointingLayer):
        return [model]
    return [layer for child in model.children() for layer in layers_of(child)]
