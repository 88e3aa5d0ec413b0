"""Reads recipes: YAML -> checked, frozen sections. The only door through which settings come in.

    from packtrain.recipe.reader import load_recipe

    recipe = load_recipe("recipes/sft.yaml", ["training.learning_rate=2e-5"])
    recipe.batching.max_tokens, recipe.training["learning_rate"]

`fields` (types of values) and `sections` (our keys) lie below every other room, which take their own section from there.
`recipe`, `rules` and `reader` lie above the objectives, whose keys they collect.
"""
