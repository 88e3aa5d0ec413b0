"""Recipe -> examples, objective and plan: what `train`, `plan` and `show` have in common. Imports no torch by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from packtrain.data.examples import Examples, build_examples
from packtrain.data.formats import FORMATS, find_format
from packtrain.data.sources import Rows, open_rows, texts
from packtrain.packing.cost import Cost
from packtrain.packing.plan import Plan, make_plan
from packtrain.recipe import Recipe
from packtrain.training.cached import tokenizer_key_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from packtrain.data.tails import TailedExamples
    from packtrain.data.views import ViewedExamples
    from packtrain.objectives.choose import Chosen

FLAT_EVALUATION, PADDED_EVALUATION = "balanced", "group_by_length"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run reads: the tokenizer, and the objective with the examples as it wants them."""

    tokenizer: PreTrainedTokenizerBase
    chosen: Chosen

    @property
    def train(self) -> Examples | TailedExamples | ViewedExamples:
        return self.chosen.train

    @property
    def held_out(self) -> Examples | TailedExamples | ViewedExamples | None:
        """None if the recipe holds nothing out."""
        return self.chosen.held_out


def load_inputs(recipe: Recipe) -> Inputs:
    """Read, tokenise (or find tokenised) and split the recipe's data, and make them what its objective learns from.

    Raises:
        DataError, ModelError: with file, row or key, and the fix.
    """
    from packtrain.modeling.loading import load_tokenizer
    from packtrain.objectives.choose import choose_objective

    model, data, seed = recipe.model, recipe.data, recipe.training["seed"]
    rows = open_rows(data.path, name=data.name, split=data.split, num_rows=data.num_rows, seed=seed)
    own = model.tokenizer_name_or_path is None  # the model's revision and trust are its own tokenizer's only
    tokenizer = load_tokenizer(
        tokenizer_name_or_path=model.tokenizer_name_or_path or model.model_name_or_path,
        revision=model.revision if own else None,
        trust_remote_code=model.trust_remote_code and own,
        vocab_size=model.tokenizer_vocab_size,
        chat_template=model.chat_template,
        corpus=texts(rows, data.format),
    )
    options = dict(
        format=data.format,
        max_length=data.max_length,
        overflow=data.overflow,
        assistant_only_loss=data.assistant_only_loss,
        on_bad_row=data.on_bad_row,
        num_proc=data.num_proc,
        tokenizer_key=tokenizer_key_of(recipe),
    )
    train = build_examples(rows, tokenizer, completion_only_loss=_completion_only(recipe, rows), **options)
    held_out = None
    if data.eval_path or data.eval_split:
        eval_rows = open_rows(
            data.eval_path or data.path, name=data.name, split=data.eval_split or data.split, seed=seed
        )
        completion_only = _completion_only(recipe, eval_rows)
        held_out = build_examples(eval_rows, tokenizer, completion_only_loss=completion_only, **options)
    elif data.eval_size:
        train, held_out = train.hold_out(data.eval_size, seed)
    chosen = choose_objective(
        **recipe.objective.model_dump(), tokenizer=tokenizer, train=train, held_out=held_out, seed=seed
    )
    return Inputs(tokenizer=tokenizer, chosen=chosen)


def _completion_only(recipe: Recipe, rows: Rows) -> bool | None:
    """`data.completion_only_loss`; where it says nothing, a diffusion model learns completions of all rows that have any.

    A causal model may learn the words of a user beside those of the assistant. For a diffusion model they are the
    prompt, which stands there in clear when it answers, so they are no part of the canvas.
    """
    data = recipe.data
    if recipe.objective.name == "causal_lm" or data.completion_only_loss is not None or data.assistant_only_loss:
        return data.completion_only_loss
    format, _ = find_format(rows.columns, data.format)
    return None if FORMATS[format].completion_only is None else True


def equal_lengths(recipe: Recipe) -> bool:
    """Whether tails make all documents of an update as long as its longest."""
    return recipe.objective.canvas == "batch_max"


def plan_training(recipe: Recipe, lengths: np.ndarray, *, world_size: int, cost: Cost | None = None) -> Plan:
    """The plan of the recipe's whole run over examples of these `lengths` (int, `[n]`)."""
    training, batching = recipe.training, recipe.batching
    data_seed = training.get("data_seed")
    return make_plan(
        lengths,
        strategy=batching.strategy,
        seed=training["seed"] if data_seed is None else data_seed,
        examples_per_step=batching.examples_per_step,
        max_tokens=batching.max_tokens,
        max_length=recipe.data.max_length,
        tokens_per_step=batching.tokens_per_step,
        gradient_accumulation_steps=training.get("gradient_accumulation_steps", "auto"),
        num_epochs=training.get("num_train_epochs", 3.0),
        max_steps=training.get("max_steps", -1),
        world_size=world_size,
        cost=cost,
        equal_lengths=equal_lengths(recipe),
    )


def plan_evaluation(recipe: Recipe, lengths: np.ndarray, *, layout: str, world_size: int) -> Plan:
    """One epoch over `lengths` in the layout of training: one step, or with `equal_lengths` steps as long as in training,
    so that a long document lengthens those beside it only. Evaluation sums over the steps."""
    equal = equal_lengths(recipe)
    return make_plan(
        lengths,
        strategy=FLAT_EVALUATION if layout == "flat" else PADDED_EVALUATION,
        examples_per_step=recipe.batching.examples_per_step if equal else len(lengths),
        max_tokens=recipe.batching.max_tokens,
        max_length=recipe.data.max_length,
        world_size=world_size,
        equal_lengths=equal,
    )
