"""Are the rows that a model is asked about those that its run held out?"""

from __future__ import annotations

import json
from pathlib import Path

from packtrain.data.examples import AnyExamples
from packtrain.errors import DataError
from packtrain.recipe.recipe import Recipe


def check_held_out(recipe: Recipe, examples: AnyExamples | None) -> None:
    """Checks that held-out examples are those that the run in `training.output_dir` held out, by its summary.

    Rows of their own (`data.eval_path`, `data.eval_split`) may be any.

    Raises:
        DataError: nothing is held out, or other examples are, of which the run may have trained on some.
    """
    if examples is None:
        raise DataError("needs held-out examples", key="data.eval_size", fix="set it, for example to 100 rows")
    if recipe.data.eval_path or recipe.data.eval_split:
        return
    out = Path(recipe.training["output_dir"])
    try:
        known = json.loads((out / "summary.json").read_text(encoding="utf-8"))["held_out_fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):  # of an earlier release, or without a run
        return
    if known != examples.fingerprint:
        what = "holds out other examples than the run did, which may have trained on some of these"
        fix = (
            f"evaluate {out / 'recipe.yaml'} with the rows as they were, or name rows of their own in `data.eval_path`"
        )
        raise DataError(what, key="data.eval_size", value=recipe.data.eval_size, fix=fix)
