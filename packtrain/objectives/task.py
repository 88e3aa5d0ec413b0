"""Recipe -> task and plan: rows, tokenizer and examples, as its objective learns from them. Imports no torch by itself.

What `train`, `plan`, `show`, `compare`, `sample` and `evaluate` have in common.
"""

from __future__ import annotations

import numpy as np

from packtrain.data.examples import Examples
from packtrain.data.loading import find_examples, load_examples, open_section, section_texts
from packtrain.data.store import tokenizer_key
from packtrain.objectives.objective import Task
from packtrain.packing.cost import Cost
from packtrain.packing.plan import Plan, plan_run
from packtrain.recipe.recipe import Recipe


def load_task(recipe: Recipe) -> Task:
    """Reads, tokenises (or finds tokenised) and splits the recipe's data, and makes them what its objective learns from.

    Raises:
        DataError, ModelError: with file, row or key, and the fix.
    """
    from packtrain.modeling.tokenizer import load_tokenizer

    data, objective, seed = recipe.data, recipe.objective, recipe.training["seed"]
    rows = open_section(data, seed=seed)
    tokenizer = load_tokenizer(recipe.model, corpus=section_texts(data, rows))
    train, held_out = load_examples(
        data,
        rows,
        tokenizer,
        seed=seed,
        completions_only=objective.completions_only,
        tokenizer_key=tokenizer_key(recipe.model),
    )
    return objective.task(tokenizer, train, held_out, seed=seed)


def find_training_examples(recipe: Recipe) -> tuple[Examples | None, str]:
    """Finds the recipe's training examples as tokenised before, or says why they have to be made.

    `packtrain plan` answers in a fraction of a second with it: no torch, no tokenizer, no rows.

    Raises:
        DataError: what is wrong with the data, as far as it can be known without tokenising.
    """
    if not recipe.objective.keeps_examples:
        return None, "the objective makes its own of the rows"
    return find_examples(recipe.data, tokenizer_key(recipe.model), seed=recipe.training["seed"])


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
