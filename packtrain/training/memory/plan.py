"""Will it fit? The memory of a run per rank, line by line, for every engine and strategy, before anything is loaded.

    packtrain plan recipes/sft.yaml --memory 80GiB --gpus 8

Parameters, gradients and optimizer states are exact (`states.py`), activations are counted on the recipe's model
without its memory (`activations.py`), and buffers whose size is the engine's affair are estimates. Frozen weights
(LoRA) count apart; phases that don't coincide (activations and the optimizer's step) don't add up.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from packtrain.errors import ModelError, PlanError
from packtrain.modeling.counting import cache_path, keep_count, stack_of
from packtrain.packing.accumulation import micro_batch_tokens
from packtrain.packing.plan import AnyPlan, MicroBatch, Plan
from packtrain.recipe.recipe import Recipe
from packtrain.recipe.sections import ModelSection
from packtrain.training.memory.activations import (
    COUNTING,
    Activations,
    activation_formula,
    count_activations,
    read_activations,
    register_counting_attention,
)
from packtrain.training.memory.states import DEVICE, EXACT, Line, Parameters, model_states

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

TIGHT = 0.85  # of the memory; above it the CUDA context and a fragmented allocator decide
SAMPLED_STEPS = 1000
UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
NOT_COUNTED = (
    "the CUDA context and kernels' workspace (about 1 GiB)",
    "what a fragmented allocator can't use",
    "evaluation and saving",
    "data loading (host)",
)


@dataclass(frozen=True, kw_only=True)
class MicroBatchSize:
    """The most that one micro-batch of a plan computes.

    Attributes:
        tokens: with padding.
        supervised: supervised tokens.
        rows, width: the layout.
        pairs: the sum over documents (rows, where it is padded) of their length squared.
    """

    tokens: int
    supervised: int
    rows: int
    width: int
    pairs: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelMemory:
    """The sizes of a model that a plan needs; activations apart for DeepSpeed, which computes in other dtypes."""

    parameters: Parameters
    activations: Activations
    activations_deepspeed: Activations
    vocabulary: int
    heads: int
    layers: int
    head: int = 0  # elements of the LM head that are trained


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """One engine's memory, of one rank."""

    engine: str
    ranks: int
    lines: tuple[Line, ...]

    def total(self, where: str = DEVICE) -> int:
        """Returns the peak bytes: what stays, and the larger of two phases, forward and backward or the optimizer's step."""
        stays = sum(line.bytes for line in self.lines if line.where == where and not line.transient)
        step = sum(line.bytes for line in self.lines if line.where == where and line.transient)
        working = sum(line.bytes for line in self.lines if line.where == where and line.what in WORKING)
        return stays - working + max(working, step)

    def verdict(self, memory: int) -> str:
        """Returns `fits`, `tight` (above 85% of `memory` bytes) or `does not fit`."""
        used = self.total() / memory
        return "fits" if used <= TIGHT else "tight" if used <= 1 else "does not fit"


ACTIVATIONS, LOGITS, LOGITS_AT_WORK, MASK = "activations", "logits, kept", "logits, at work", "attention mask"
WORKING = (ACTIVATIONS, LOGITS, LOGITS_AT_WORK, MASK)


def plan_memory(
    model: ModelMemory,
    micro_batch: MicroBatchSize,
    *,
    engine: str,
    ranks: int,
    half: bool,
    checkpointing: bool,
    masked: bool = False,
    eager: bool = False,
    accumulates: bool = True,
) -> MemoryPlan:
    """Lists the lines of one engine.

    Args:
        micro_batch: the largest of the plan.
        engine, ranks, half, accumulates: see `model_states`.
        checkpointing: gradient checkpointing.
        masked: attention gets a mask of width x width per row (padded layouts; flat ones without varlen attention).
        eager: attention also keeps its probabilities.
    """
    item = 2 if half else 4
    activations = model.activations_deepspeed if engine.startswith("zero") else model.activations
    of_weights = item if engine.startswith("zero") else model.parameters.trained_itemsize
    logits, at_work = logit_bytes(
        model.vocabulary,
        micro_batch.supervised,
        hidden_size=model.parameters.hidden_size,
        head=model.head,
        item=item,
        item_of_head=of_weights,
    )
    kept = activations.bytes(micro_batch.tokens, micro_batch.pairs, checkpointing=checkpointing)
    lines = [
        *model_states(model.parameters, engine, ranks, half=half, accumulates=accumulates),
        Line(what=ACTIVATIONS, bytes=kept, basis=activations.basis),
        Line(what=LOGITS, bytes=logits),
        Line(what=LOGITS_AT_WORK, bytes=at_work, basis="estimated"),
    ]
    pairs = micro_batch.rows * micro_batch.width**2
    if eager:
        layers = 1 if checkpointing else model.layers
        kept = pairs * (item + layers * model.heads * (4 + item))  # additive mask; softmax in float32, and its cast
        lines.append(Line(what=MASK, bytes=kept, basis="estimated"))
    elif masked:
        lines.append(Line(what=MASK, bytes=pairs, basis=EXACT))  # bool, one for all heads and layers
    return MemoryPlan(engine=engine, ranks=ranks, lines=tuple(lines))


def logit_bytes(
    vocabulary: int, supervised: int, *, hidden_size: int, head: int, item: int, item_of_head: int
) -> tuple[int, int]:
    """Returns what a micro-batch's loss keeps for the backward pass, and what it takes for a moment, in bytes.

    Args:
        supervised: positions that have logits.
        head: elements of the head that are trained.
        item: bytes of an element of hidden states.
        item_of_head: bytes of an element of the head's gradient.
    """
    from packtrain.objectives.chunks import rows_of_chunk

    rows = rows_of_chunk(vocabulary)
    each = 4 + item if item < 4 else 4  # as the head gives them, and in float32
    if supervised <= rows:  # whole logits: log-probabilities in float32; then the gradients of both
        return 4 * vocabulary * supervised, each * vocabulary * supervised
    sums = 4 * head if item_of_head < 4 else 0  # the gradient of the head, before it is rounded
    return item * supervised * hidden_size + item_of_head * head, each * vocabulary * rows + sums


def largest_sizes(plan: Plan, supervised: np.ndarray) -> MicroBatchSize:
    """Finds the most of everything over the plan's micro-batches (of `SAMPLED_STEPS` evenly spaced updates in a long plan).

    Args:
        supervised: supervised tokens of each example, int `[n]`.
    """
    most = {"tokens": 0, "supervised": 0, "rows": 0, "width": 0, "pairs": 0}
    for _, _, size in sampled_micro_batches(plan, supervised):
        most = {name: max(figure, getattr(size, name)) for name, figure in most.items()}
    return MicroBatchSize(**most)


def sampled_micro_batches(plan: AnyPlan, supervised: np.ndarray) -> Iterator[tuple[int, MicroBatch, MicroBatchSize]]:
    """Yields (update, micro-batch, its size) of all ranks, of `SAMPLED_STEPS` evenly spaced updates in a long plan."""
    for step in plan.sampled_steps(SAMPLED_STEPS):
        for micro_batch in plan.layout_of(step):
            if not len(micro_batch):
                continue
            tokens = micro_batch_tokens(micro_batch.lengths, plan.scope.strategy, getattr(plan.scope, "width", 0))
            if plan.shapes is not None:
                tokens = plan.shapes.round_up(tokens)
            rows = len(micro_batch) if plan.layout == "padded" else 1
            scored = min(int(np.sum(supervised[micro_batch.example_ids])), int(micro_batch.lengths.sum()))
            width = tokens // rows
            pairs = (
                rows * width**2 if plan.layout == "padded" else int((micro_batch.lengths.astype(np.int64) ** 2).sum())
            )
            size = MicroBatchSize(tokens=tokens, supervised=scored, rows=rows, width=width, pairs=pairs)
            yield step, micro_batch, size


def describe_model(recipe: Recipe) -> ModelMemory:
    """Describes parameters and activations of the recipe's model, from shapes alone: no weights are read or made.

    Raises:
        ModelError: the model can't be loaded, does not take the adapter, or keeps activations that nobody can count.
    """
    import torch

    from packtrain.modeling.loading import load_config

    section = recipe.model
    config = load_config(section)
    if (
        section.model_name_or_path is None
        and "vocab_size" not in (section.config or {})
        and section.tokenizer_vocab_size
    ):
        config.get_text_config().vocab_size = section.tokenizer_vocab_size
    half = "bfloat16" if recipe.training.get("bf16") else "float16" if recipe.training.get("fp16") else None
    register_counting_attention()
    with _countable(config), torch.device("meta"):
        built = _build(recipe, config)
        parameters, head = parameters_of(built), _trained_head(built)
        if section.quantization is not None:
            parameters = quantised_parameters(built, parameters, section.quantization)
    text = config.get_text_config()

    def activations(dtype: str | None, autocast: str | None, itemsize: int) -> Activations:
        with _countable(config):
            return find_activations(recipe, config, dtype=dtype, autocast=autocast, itemsize=itemsize)

    loaded = parameters.frozen_itemsize if parameters.frozen else parameters.trained_itemsize
    return ModelMemory(
        parameters=parameters,
        activations=activations(None, half, 2 if half else loaded),
        activations_deepspeed=activations(half or "float32", None, 2 if half else 4),
        vocabulary=recipe.objective.logits(config),
        heads=getattr(text, "num_attention_heads", 0),  # Mamba has none
        layers=text.num_hidden_layers,
        head=head,
    )


def _trained_head(model: Any) -> int:
    """Counts the elements of the LM head that are trained; 0 for a model without one."""
    head = model.get_output_embeddings()
    return 0 if head is None else sum(_elements(weight) for weight in head.parameters() if weight.requires_grad)


@contextmanager
def _countable(config: Any) -> Iterator[None]:
    """Turns whatever a model raises when its sizes are counted into a ModelError that says what is not counted."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ModelError):
            raise
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        what = f"the activations of {config.model_type} cannot be counted: {why}"
        fix = "leave --memory out; batching.probe_memory: true tries the largest micro-batch before the first update"
        raise ModelError(what, key="--memory", fix=fix) from error


def find_activations(
    recipe: Recipe, config: Any, *, dtype: str | None, autocast: str | None, itemsize: int
) -> Activations:
    """Returns the activations of the recipe's model, counted once and kept in the cache of tokenised data.

    Args:
        config: the recipe's transformers config.
        dtype: of the weights, None for the recipe's.
        autocast: dtype of mixed precision by autocast, None without.
        itemsize: bytes of an element, for the formula, where shapes depend on the data.
    """
    import torch

    dtype = _dtype(recipe, config) if dtype is None else dtype
    model = recipe.model
    told = [config.to_dict(), dtype, autocast, recipe.lora, recipe.objective.auto_class, model.attn_implementation]
    path = cache_path("activations", told)
    try:
        return read_activations(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        pass
    mixed = getattr(torch, autocast) if autocast else None
    try:
        found = count_activations(partial(_build, recipe, config, dtype), autocast=mixed)
    except Exception as error:  # it uses the mask that the stand-in for attention does without (mpt), or more
        logger.debug("the activations of %s were not counted: %s", config.model_type, error)
        try:
            found = count_activations(partial(_build, recipe, config, dtype, own=True), autocast=mixed)
        except RuntimeError:  # shapes that depend on the data
            found = activation_formula(config, itemsize=itemsize)
    keep_count(path, asdict(found))
    return found


def _build(recipe: Recipe, config: Any, dtype: str | None = None, *, own: bool = False) -> PreTrainedModel | PeftModel:
    """Builds the model with its adapter, in the recipe's dtype or another (adapters are float32 whatever the model is).

    A model that looks attention up among its own alone, and with `own` any, has its own attention.
    """
    from packtrain.modeling.loading import add_lora, load_model

    section = ModelSection(trust_remote_code=recipe.model.trust_remote_code)  # its shapes alone: no weights are read
    named = recipe.model.attn_implementation
    load = partial(load_model, section, dtype=dtype or _dtype(recipe, config), auto_class=recipe.objective.auto_class)
    try:
        model = load(
            copy.deepcopy(config), attn_implementation=named if own and named == "eager" else None if own else COUNTING
        )
    except ModelError as error:
        if own or COUNTING not in str(error):
            raise
        return _build(recipe, config, dtype, own=True)
    return model if recipe.lora is None else add_lora(model, recipe.lora)


def _dtype(recipe: Recipe, config: Any) -> str:
    """Returns the dtype of the recipe's weights by name."""
    dtype = recipe.model.dtype
    return str(config.dtype or "float32").removeprefix("torch.") if dtype == "auto" else dtype


def parameters_of(model: PreTrainedModel | PeftModel) -> Parameters:
    """Returns the sizes of a model's parameters: on any device, sharded or not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    found = stack_of(model)
    layers = [] if found is None else list(found[2])
    in_layers = {parameter for layer in layers for parameter in layer.parameters()}  # Zamba's layers share some
    return Parameters(
        trained=tuple(map(_elements, trained)),
        frozen=tuple(map(_elements, frozen)),
        trained_itemsize=_itemsize(trained),
        frozen_itemsize=_itemsize(frozen),
        layer=max((sum(map(_elements, layer.parameters())) for layer in layers), default=0),
        outside=sum(_elements(parameter) for parameter in (*trained, *frozen) if parameter not in in_layers),
        hidden_size=model.config.get_text_config().hidden_size,
    )


def quantised_parameters(model: nn.Module, parameters: Parameters, quantization: Mapping[str, Any]) -> Parameters:
    """Returns `parameters` with the weights that bitsandbytes quantises: of linear layers, but for the head.

    Four bits come with a float32 scale for 64 weights, or, quantised twice, with one byte for 64 and a float32 for 256
    of these; eight bits with a float32 for a row, which is next to nothing. What is not quantised is float32.

    Args:
        model: built without quantisation, with its adapter.
        quantization: the recipe's `model.quantization`.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    skipped = quantization.get("llm_int8_skip_modules") or ()
    head = cast(Any, model).get_output_embeddings()
    elements = 0
    for name, module in model.named_modules():
        kept = module is head or "lora_" in name or any(part in name for part in skipped)
        if isinstance(module, nn.Linear | Conv1D) and not kept and not module.weight.requires_grad:
            elements += module.weight.numel()
    twice = quantization.get("bnb_4bit_use_double_quant")
    item = 1.0 if quantization.get("load_in_8bit") else 0.5 + ((1 + 4 / 256) / 64 if twice else 4 / 64)
    return replace(parameters, frozen_itemsize=4, quantised=elements, quantised_itemsize=item)


def _elements(parameter: nn.Parameter) -> int:
    """Counts the elements of the whole parameter, also where ZeRO-3 has left a shard."""
    return getattr(parameter, "ds_numel", parameter.numel())


def _itemsize(parameters: Sequence[Any]) -> int:
    """Returns the bytes of an element of most of them."""
    sizes: dict[int, int] = {}
    for parameter in parameters:
        sizes[parameter.element_size()] = sizes.get(parameter.element_size(), 0) + _elements(parameter)
    return max(sizes, key=sizes.__getitem__, default=4)


def parse_bytes(text: str) -> int:
    """Reads `80GiB`, `80 GB`, `512MiB` as bytes. Raises PlanError."""
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*((?:[KMGT]I?)?B)\s*", text.upper())
    amount = float(match[1]) * UNITS[match[2]] if match else 0
    if not 1 <= amount < math.inf:
        raise PlanError("must be an amount of memory", key="--memory", value=text, fix="write for example 80GiB")
    return int(amount)
