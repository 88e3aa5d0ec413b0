"""`packtrain sample` and `packtrain evaluate`: what a trained diffusion model answers, and how long its answers are."""

from __future__ import annotations

from typing import Annotated

import typer

from packtrain.cli.options import Overrides, RecipePath, load_checked
from packtrain.errors import PacktrainError


def sample(
    recipe: RecipePath,
    overrides: Overrides = None,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Repeatable.")] = None,
    length: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of the canvas.")] = 128,
    steps: Annotated[int | None, typer.Option(min=1, metavar="N", help="Default: one per token.")] = None,
    block_length: Annotated[int | None, typer.Option(min=1, metavar="N", help="Default: the whole canvas.")] = None,
    remasking: Annotated[str, typer.Option(help="low_confidence, random, margin or entropy.")] = "low_confidence",
    temperature: Annotated[float, typer.Option(min=0)] = 0.0,
    cfg_scale: Annotated[float, typer.Option(min=0)] = 0.0,
    end_token_policy: Annotated[
        str, typer.Option(help="none, suppress_logits, suppress_confidence or ban_pad.")
    ] = "none",
    seed: Annotated[int, typer.Option(help="Of temperature and random remasking.")] = 0,
) -> None:
    """Answer prompts with the diffusion model that a recipe has trained."""
    from packtrain.experiments.rainbow_verbs import sample as run

    loaded = load_checked(recipe, overrides)
    options = dict(
        block_length=block_length, remasking=remasking, temperature=temperature, cfg_scale=cfg_scale,
        end_token_policy=end_token_policy,
    )  # fmt: skip
    prompts = prompt or [typer.prompt("prompt")]
    for answer in run(loaded, prompts, length=length, steps=steps or length, seed=seed, **options):
        print(answer)


def evaluate(
    recipe: RecipePath,
    overrides: Overrides = None,
    lengths: Annotated[str, typer.Option(metavar="N,N,...", help="Tokens of the canvas.")] = "64,128,256",
    blocks: Annotated[str, typer.Option(metavar="N,N,...", help="Blocks written one after the other.")] = "1",
    prompts: Annotated[int, typer.Option(min=1, metavar="N", help="Held-out prompts to answer.")] = 64,
) -> None:
    """How answers of a trained diffusion model depend on the room they get: lengths, early stops, accuracy."""
    from packtrain.experiments.rainbow_verbs import evaluate as run

    loaded = load_checked(recipe, overrides)
    sizes = {"lengths": numbers(lengths, "--lengths"), "blocks": numbers(blocks, "--blocks")}
    print(run(loaded, **sizes, prompts=prompts))


def numbers(text: str, key: str) -> list[int]:
    """Whole numbers from 1 on, separated by commas.

    >>> numbers("64, 128", "--lengths")
    [64, 128]
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise PacktrainError("is not a list of numbers", key=key, value=text, fix="write for example 64,128")
    return [int(word) for word in words]
