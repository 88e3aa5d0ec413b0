"""`packtrain push`: upload a trained model to the Hub."""

from __future__ import annotations

from typing import Annotated

import typer

from packtrain.cli.generate import Target
from packtrain.cli.output import size_of


def push(
    target: Target,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Repository of the Hub, name/model; made if need be.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files and their sizes; upload nothing.")] = False,
) -> None:
    """Upload a trained model to the Hub, in one commit and without asking.

    Weights or adapter, configuration, tokenizer and model card go up, and the recipe without secrets and paths of this
    machine; checkpoints and training_args.bin stay. It needs a token (`hf auth login`, or HF_TOKEN).
    """
    from packtrain.training.publishing import files_of, publish

    files = files_of(target)
    width = max(len(file.name) for file in files)
    for file in files:
        print(f"{file.name:{width}}  {size_of(file.size):>12}")
    total = f"{len(files)} files, {size_of(sum(file.size for file in files))}"
    if dry_run:
        print(f"{total}, would be uploaded to {repo}{' (private)' if private else ''}")
        return
    print(f"{total}, uploaded: {publish(files, repo, private=private)}")
