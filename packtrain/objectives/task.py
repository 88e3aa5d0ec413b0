"""Recipe -> task and plan: rows, tokenizer and examples, as its objective learns from them. Imports no torch by itself.

What `train`, `plan`, `show`, `compare`, `sample` and `evaluate` have in common.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from packtrain.data.examples import AnyExamples, Examples
from packtrain.data.loading import (
    find_examples,
    open_section,
    open_source,
    prepare_examples,
    section_texts,
    source_texts,
    stream_examples,
)
from packtrain.data.store import tokenizer_key
from packtrain.data.streamed_examples import StreamedExamples
from packtrain.errors import DataError
from packtrain.objectives.objective import Task
from packtrain.packing.cost import Cost
from packtrain.packing.plan import Plan, plan_run
from packtrain.packing.strategies import resolve_strategy
from packtrain.packing.streamed_plan import StreamedPlan, plan_stream
from packtrain.recipe.adapters import refuse_adapters
from packtrain.recipe.recipe import Recipe, check_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_task(recipe: Recipe) -> Task:
    """Reads, tokenises (or finds tokenised) and splits the recipe's data, and makes them what its objective learns from.

    Raises:
        DataError, ModelError: with file, row or key, and the fix.
    """
    if recipe.model.model_name_or_path is not None:  # before its tokenizer is looked for there
        refuse_adapters(recipe.model.model_name_or_path)
    return make_task(recipe, *(_stream if recipe.data.streaming else tokenise)(recipe))


def _stream(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, StreamedExamples, Examples | None]:
    """Reads the first block of the recipe's rows; others are read while it trains. Returns as `tokenise`."""
    from packtrain.modeling.tokenizer import load_tokenizer

    data, objective, seed = recipe.data, recipe.objective, recipe.training["seed"]
    source = open_source(data, seed=seed)
    tokenizer = load_tokenizer(recipe.model, corpus=source_texts(data, source, kind=objective.row_kind))
    return tokenizer, *stream_examples(
        data,
        source,
        tokenizer,
        seed=seed,
        examples_per_step=recipe.batching.examples_per_step,
        completions_only=objective.completions_only,
        kind=objective.row_kind,
        tokenizer_key=tokenizer_key(recipe.model),
    )


def refuse_streaming(recipe: Recipe, why: str) -> None:
    """Raises DataError where the recipe streams its rows, which whoever calls this can't do, and says why."""
    if recipe.data.streaming:
        fix = "set `data.streaming: false`, which tokenises all rows and stores them"
        raise DataError(why, key="data.streaming", value=True, fix=fix)


def tokenise(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, Examples, Examples | None]:
    """Reads, tokenises (or finds tokenised) and splits the recipe's data: (tokenizer, training, held out or None).

    Raises:
        DataError, ModelError: as `load_task`.
    """
    refuse_streaming(recipe, "reads rows while a model trains, and leaves nothing stored")
    from packtrain.modeling.tokenizer import load_tokenizer

    data, objective, seed = recipe.data, recipe.objective, recipe.training["seed"]
    rows = open_section(data, seed=seed)
    tokenizer = load_tokenizer(recipe.model, corpus=section_texts(data, rows, kind=objective.row_kind))
    return tokenizer, *prepare_examples(
        data,
        rows,
        tokenizer,
        seed=seed,
        completions_only=objective.completions_only,
        kind=objective.row_kind,
        tokenizer_key=tokenizer_key(recipe.model),
    )


def make_task(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    train: Examples | StreamedExamples,
    held_out: Examples | None,
) -> Task:
    """Makes tokenised examples what the recipe's objective learns from.

    Raises:
        DataError: the objective cannot learn from them.
    """
    objective, seed = recipe.objective, recipe.training["seed"]
    if not objective.weighs_tokens and any(part is not None and part.has_factors for part in (train, held_out)):
        what = "a message has a fractional `weight`, and this objective does not weigh tokens"
        fix = "give messages the weight 0 or 1, or choose the objective `causal_lm`"
        raise DataError(what, key="objective.name", value=objective.name, fix=fix)
    layout = resolve_strategy(recipe.batching.strategy).layout
    return objective.task(tokenizer, cast(Any, train), held_out, seed=seed, layout=layout)


def load_examples(recipe: Recipe) -> tuple[AnyExamples, AnyExamples | None]:
    """Returns the examples that `train` trains and evaluates on, for a training loop of your own: (training, held out).

    Rows are tokenised once and stored; a second call finds them. Held out is None where the recipe has none of
    `data.eval_size`, `data.eval_path` and `data.eval_split`.

        >>> import packtrain
        >>> train, held_out = packtrain.load_examples(packtrain.load_recipe("quickstart", ["num_rows=40", "eval_size=4"]))
        >>> len(train), len(held_out)
        (36, 4)
        >>> sorted(train[0])
        ['input_ids', 'labels']
        >>> plan = packtrain.make_plan(train.lengths, strategy="balanced", examples_per_step=8)

    Returns:
        Both are sequences of `{"input_ids": int64 [L], "labels": int64 [L]}`, NumPy arrays; labels are not shifted, and
        -100 where a token is not supervised, as the first of an example. `lengths` and `supervised` (int `[n]`) count
        tokens of each; `gather(ids)` reads several, end to end.

    Raises:
        DataError: rows that can't be read or trained on, with file and row, or key and value, and the fix.
        ModelError: no tokenizer, or one without a chat template that the rows need.
    """
    check_recipe(recipe)
    refuse_streaming(
        recipe, "gives examples while they train; packtrain.PackedStream packs rows for a loop of your own"
    )
    task = load_task(recipe)
    return task.train, task.held_out


def find_training_examples(recipe: Recipe) -> tuple[Examples | None, str]:
    """Finds the recipe's training examples as tokenised before, or says why they have to be made.

    `packtrain plan` answers in a fraction of a second with it: no torch, no tokenizer, no rows.

    Raises:
        DataError: what is wrong with the data, as far as it can be known without tokenising.
    """
    if recipe.data.streaming:
        return None, "rows are streamed, and the first block of them stands for all"
    if not recipe.objective.keeps_examples:
        return None, "the objective makes its own of the rows"
    return find_examples(recipe.data, tokenizer_key(recipe.model), seed=recipe.training["seed"])


def plan_training(
    recipe: Recipe, examples: AnyExamples, *, world_size: int = 1, cost: Cost | None = None
) -> Plan | StreamedPlan:
    """Plans the recipe's whole run over its training examples, streamed or not."""
    if isinstance(examples, StreamedExamples):
        return plan_stream(
            recipe.batching,
            recipe.schedule,
            examples.blocks,
            max_length=recipe.data.max_length,
            world_size=world_size,
            cost=cost,
        )
    return plan_recipe(recipe, examples.lengths, world_size=world_size, cost=cost)


def plan_recipe(recipe: Recipe, lengths: np.ndarray, *, world_size: int = 1, cost: Cost | None = None) -> Plan:
    """Plans the recipe's whole run over examples of these `lengths` (int, `[n]`)."""
    return plan_run(
        recipe.batching,
        recipe.schedule,
        lengths,
        max_length=recipe.data.max_length,
        equal_lengths=recipe.objective.equal_lengths,
        world_size=world_size,
        cost=cost,
    )
