"""`packtrain evaluate`: how the answers of a trained diffusion model depend on the room they get."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from packtrain.cli.options import Overrides, Policy, RecipePath, Remasking, Temperature, load_checked
from packtrain.errors import PacktrainError


def evaluate(
    recipe: RecipePath,
    overrides: Overrides = None,
    lengths: Annotated[str, typer.Option(metavar="N,N,...", help="Tokens allocated to an answer.")] = "64,128,256",
    blocks: Annotated[
        str, typer.Option(metavar="N,N,...", help="In how many blocks, written one after the other; 1 is all at once.")
    ] = "1",
    prompts: Annotated[int, typer.Option(min=1, metavar="N", help="Held-out prompts to answer.")] = 64,
    remasking: Remasking = "low_confidence",
    temperature: Temperature = 0.0,
    end_token_policy: Policy = "none",
) -> None:
    """How the answers of a masked-diffusion model depend on the room they get: lengths, early and late stops, accuracy.

    The model is read from the recipe's `training.output_dir`; one token is written per step. The table, its figures and
    pictures (lengths; what was written when) are stored beside it in `evaluation/`.
    """
    from packtrain.objectives.masked_diffusion.answers import evaluate as run

    loaded = load_checked(recipe, overrides)
    sizes = {"lengths": numbers(lengths, "--lengths"), "blocks": numbers(blocks, "--blocks")}
    options = dict(remasking=remasking, temperature=temperature, end_token_policy=end_token_policy)
    print(run(loaded, **sizes, prompts=prompts, **options))
    print(f"\nstored with pictures in {Path(loaded.training['output_dir'], 'evaluation')}")


def numbers(text: str, key: str) -> list[int]:
    """Whole numbers from 1 on, separated by commas.

    >>> numbers("64, 128", "--lengths")
    [64, 128]
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise PacktrainError("is not a list of numbers", key=key, value=text, fix="write for example 64,128")
    return [int(word) for word in words]
