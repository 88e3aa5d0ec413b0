"""What a plan needs to know of a recipe's data and model, from what is on disk: no torch, no tokenizer, no rows.

`load_inputs` tokenises and remembers under `tokenizer_key_of(recipe)`; from then on `packtrain plan` answers
in a fraction of a second.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from packtrain.data.cache import tokenizer_key
from packtrain.data.examples import Examples, find_cached_examples
from packtrain.errors import PlanError
from packtrain.packing.cost import Cost
from packtrain.recipe import Recipe


def tokenizer_key_of(recipe: Recipe) -> str:
    """What the cache calls the recipe's tokenizer."""
    model = recipe.model
    return tokenizer_key(
        model.tokenizer_name_or_path or model.model_name_or_path,
        revision=model.revision,
        vocab_size=model.tokenizer_vocab_size,
        chat_template=model.chat_template,
    )


def find_training_examples(recipe: Recipe) -> tuple[Examples | None, str]:
    """The recipe's training examples (without those held out) as tokenised before, or None and why there are none.

    Raises:
        DataError: what is wrong with the data, as far as it can be known without tokenising.
    """
    if recipe.objective.name != "causal_lm":
        return None, "tails and masks are the tokenizer's"
    data, seed = recipe.data, recipe.training["seed"]
    options = data.model_dump(
        include={"name", "split", "num_rows", "format", "max_length", "overflow"}
        | {"completion_only_loss", "assistant_only_loss", "on_bad_row"}
    )
    examples, why = find_cached_examples(data.path, tokenizer_key_of(recipe), seed=seed, **options)
    if examples is not None and data.eval_size:
        examples, _ = examples.hold_out(data.eval_size, seed)
    return examples, why


def find_cost(recipe: Recipe) -> Cost | None:
    """The cost model of the recipe's architecture, or None (tokens count) where its config isn't at hand."""
    try:
        return Cost.of_config(_config_at_hand(recipe))
    except PlanError:
        return None


def _config_at_hand(recipe: Recipe) -> dict[str, Any]:
    model = recipe.model
    if model.config is not None:
        return model.config
    path: Any = Path(model.model_name_or_path, "config.json")
    if not path.parent.is_dir():
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(model.model_name_or_path, "config.json", revision=model.revision)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):  # TypeError: not in the cache
        return {}
