"""`packtrain evaluate`: measure the answers of a trained model on held-out prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from packtrain.cli.generate import NewTokens
from packtrain.cli.options import Overrides, Policy, RecipePath, Remasking, Temperature, load_checked
from packtrain.errors import PacktrainError


def evaluate(
    recipe: RecipePath,
    overrides: Overrides = None,
    prompts: Annotated[int, typer.Option(min=1, metavar="N", help="Number of held-out prompts to answer.")] = 64,
    max_new_tokens: NewTokens = None,
    score: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION", help="Score of (answer, reference). Default: 1 for a right answer, else 0."
        ),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Ask the model that the run started from.")] = False,
    lengths: Annotated[
        str, typer.Option(metavar="N,N,...", help="Diffusion: allocated lengths to try, in tokens.")
    ] = "64,128,256",
    blocks: Annotated[
        str, typer.Option(metavar="N,N,...", help="Diffusion: numbers of blocks to try, written one after the other.")
    ] = "1",
    remasking: Remasking = "low_confidence",
    temperature: Temperature = 0.0,
    end_token_policy: Policy = "none",
) -> None:
    """Measure the answers of a trained model on held-out prompts.

    The model is read from the recipe's `training.output_dir`. Of a causal model, answers are written at temperature 0, and
    the share of right ones is printed: the same number behind `####` where the reference has one, else the same words.
    Of a masked-diffusion model, lengths, early and late stops and accuracy are printed for every allocated length; one
    token is written per step. Answers, figures and plots are stored next to the model in `evaluation/`.
    """
    loaded = load_checked(recipe, overrides)
    causal = {"--max-new-tokens": max_new_tokens is not None, "--score": score is not None, "--base": base}
    diffusion = {
        "--lengths": lengths != "64,128,256",
        "--blocks": blocks != "1",
        "--remasking": remasking != "low_confidence",
        "--temperature": temperature != 0,
        "--end-token-policy": end_token_policy != "none",
    }
    for option, given in (diffusion if loaded.objective.predicts_next else causal).items():
        if given:
            kind = "causal" if loaded.objective.predicts_next else "masked-diffusion"
            raise PacktrainError(f"has no effect on a {kind} model", key=option, fix="leave it out")
    if loaded.objective.predicts_next:
        from packtrain.generation.evaluation import evaluate as ask
        from packtrain.generation.scores import find_score

        done = ask(loaded, prompts=prompts, max_new_tokens=max_new_tokens, score=find_score(score), base=base)
        print("\n".join(done.lines()))
        print(f"\nanswers are in {Path(loaded.training['output_dir'], 'evaluation')}")
        return

    from packtrain.objectives.masked_diffusion.answers import evaluate as run

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
