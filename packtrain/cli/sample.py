"""`packtrain sample`: answer prompts with a trained diffusion model."""

from __future__ import annotations

from typing import Annotated

import typer

from packtrain.cli.options import Overrides, Policy, RecipePath, Remasking, Temperature, load_checked


def sample(
    recipe: RecipePath,
    overrides: Overrides = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Prompt to answer; repeatable. You are asked for one if it is left out."),
    ] = None,
    length: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens allocated to answer, end and tail.")] = 128,
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of sampling steps. Default: one per token.")
    ] = None,
    block_length: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Write blocks of N tokens in turn. Default: all at once.")
    ] = None,
    remasking: Remasking = "low_confidence",
    temperature: Temperature = 0.0,
    cfg_scale: Annotated[
        float,
        typer.Option(min=0, metavar="W", help="Scale of classifier-free guidance; doubles the work."),
    ] = 0.0,
    end_token_policy: Policy = "none",
    seed: Annotated[int, typer.Option(metavar="N", help="Seed for temperature and random remasking.")] = 0,
) -> None:
    """Answer prompts with a trained masked-diffusion model.

    The model is read from the recipe's `training.output_dir`. An answer is printed up to its end.
    """
    from packtrain.objectives.masked_diffusion.answers import find_trained
    from packtrain.objectives.masked_diffusion.answers import sample as run

    loaded = load_checked(recipe, overrides)
    find_trained(loaded)  # before anybody is asked
    options = dict(
        block_length=block_length, remasking=remasking, temperature=temperature, cfg_scale=cfg_scale,
        end_token_policy=end_token_policy,
    )  # fmt: skip
    prompts = prompt or [typer.prompt("prompt")]
    for answer in run(loaded, prompts, length=length, steps=steps or length, seed=seed, **options):
        print(answer)
