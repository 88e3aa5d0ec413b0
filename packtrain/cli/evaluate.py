"""`packtrain evaluate`: measure how the answers of a diffusion model depend on the allocated length."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from packtrain.cli.options import Overrides, Policy, RecipePath, Remasking, Temperature, load_checked
from packtrain.errors import PacktrainError


def evaluate(
    recipe: RecipePath,
    overrides: Overrides = None,
    lengths: Annotated[
        str, typer.Option(metavar="N,N,...", help="Allocated lengths to try, in tokens.")
    ] = "64,128,256",
    blocks: Annotated[
        str, typer.Option(metavar="N,N,...", help="Numbers of blocks to try; blocks are written one after the other.")
    ] = "1",
    prompts: Annotated[int, typer.Option(min=1, metavar="N", help="Number of held-out prompts to answer.")] = 64,
    remasking: Remasking = "low_confidence",
    temperature: Temperature = 0.0,
    end_token_policy: Policy = "none",
) -> None:
    """Measure how the answers of a masked-diffusion model depend on the allocated length.

    Prints lengths, early and late stops and accuracy. The model is read from the recipe's `training.output_dir`; one token
    is written per step. The table, its numbers and plots are stored next to the model in `evaluation/`.
    """
    from packtrain.objectives.masked_diffusion.answers import evaluate as run

    loaded = load_checked(recipe, overrides)
    sizes = {"lengths": numbers(lengths, "--lengths"), "blocks": numbers(blocks, "--blocks")}
    options = dict(remasking=remasking, temperature=temperature, end_token_policy=end_token_policy)
    print(run(loaded, **sizes, prompts=prompts, **options))
    print(f"\nstored with plots in {Path(loaded.training['output_dir'], 'evaluation')}")


def numbers(text: str, key: str) -> list[int]:
    """Reads positive integers, separated by commas.

    >>> numbers("64, 128", "--lengths")
    [64, 128]
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise PacktrainError("must be a list of positive integers", key=key, value=text, fix="write for example 64,128")
    return [int(word) for word in words]
