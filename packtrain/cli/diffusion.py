"""`packtrain sample` and `packtrain evaluate`: what a trained diffusion model answers, and how long its answers are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from packtrain.cli.options import Overrides, RecipePath, load_checked
from packtrain.errors import PacktrainError

REMASKING = ("low_confidence", "random", "margin", "entropy")
END_TOKEN_POLICIES = ("none", "suppress_logits", "suppress_confidence", "ban_pad")


Remasking = Annotated[str, typer.Option(metavar="NAME", help=f"What is written first: {', '.join(REMASKING)}.")]
Temperature = Annotated[float, typer.Option(min=0, metavar="T", help="0 takes the likeliest token, 1 draws one.")]
Policy = Annotated[
    str,
    typer.Option(metavar="NAME", help=f"Keeps ends and pads from coming too soon: {', '.join(END_TOKEN_POLICIES)}."),
]


def sample(
    recipe: RecipePath,
    overrides: Overrides = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="What to answer; repeatable. Asked for if left out.")
    ] = None,
    length: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens allocated: answer, end and tail.")] = 128,
    steps: Annotated[int | None, typer.Option(min=1, metavar="N", help="Default: one per token.")] = None,
    block_length: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Write blocks of N tokens in turn. Default: all at once.")
    ] = None,
    remasking: Remasking = "low_confidence",
    temperature: Temperature = 0.0,
    cfg_scale: Annotated[
        float,
        typer.Option(min=0, metavar="W", help="Guidance away from what it writes without the prompt; twice the work."),
    ] = 0.0,
    end_token_policy: Policy = "none",
    seed: Annotated[int, typer.Option(metavar="N", help="Of temperature and random remasking.")] = 0,
) -> None:
    """Answer prompts with the masked-diffusion model that a recipe has trained.

    The model is read from the recipe's `training.output_dir`. An answer is printed up to its end.
    """
    from packtrain.experiments.rainbow.verbs import sample as run

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
    from packtrain.experiments.rainbow.verbs import evaluate as run

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
