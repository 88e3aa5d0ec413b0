"""YAML -> checked recipe. The only door through which settings come in.

    recipe = load_recipe("recipes/sft.yaml", ["training.learning_rate=2e-5"])
    recipe.batching.max_tokens, recipe.training["learning_rate"]

Everything that is wrong is reported at once, each problem with its file and line, key, value and the likely
fix. Light: reads the fields of TrainingArguments and LoraConfig without importing transformers or peft.
"""

from packtrain.recipe.reader import load_recipe
from packtrain.recipe.sections import Recipe, Sources

__all__ = ["Recipe", "Sources", "load_recipe"]
