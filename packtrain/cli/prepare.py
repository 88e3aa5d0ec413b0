"""`packtrain prepare`: tokenise the rows of a recipe once, for any number of runs and ranks."""

from __future__ import annotations

from rich.console import Console

from packtrain.cli.options import Overrides, RecipePath, load_checked
from packtrain.cli.output import size_of


def prepare(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Tokenise the rows of a recipe, and say how many there are and where they are stored.

    Every verb, run and rank with the same rows, tokenizer and formats finds them there; what only chooses among them
    (max_length, overflow, eval_size, batching) may change. PACKTRAIN_CACHE names another folder, which hosts may share.
    """
    from packtrain.objectives.task import make_task, tokenise

    loaded, console = load_checked(recipe, overrides), Console(highlight=False, markup=False, soft_wrap=True)
    tokenizer, train, held_out = tokenise(loaded)
    make_task(loaded, tokenizer, train, held_out)  # so that what the objective can't learn from is said here
    parts = [train] if held_out is None else [train, held_out]
    for line in train.report.lines():
        console.print(line)
    if held_out is not None and held_out.report.files != train.report.files:
        for line in held_out.report.lines():
            console.print(f"evaluation: {line}")
    for documents in {each.directory: each for part in parts for each in part.documents}.values():
        rows, tokens = len(documents.lengths), int(documents.lengths.sum(dtype="int64"))
        done = "tokenised before" if documents.found else "tokenised"
        size = f"{rows:,} rows, {tokens:,} tokens, {size_of(documents.bytes_stored)}"
        console.print(f"{done}: {size}, in {documents.directory}")
