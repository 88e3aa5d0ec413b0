"""`packtrain generate`: answer prompts with a trained model."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from packtrain.cli.options import Temperature
from packtrain.errors import PacktrainError
from packtrain.recipe.sections import Dtype

if TYPE_CHECKING:
    from packtrain.generation.prompts import Messages
    from packtrain.generation.trained import Trained

Target = Annotated[
    str,
    typer.Argument(metavar="RUN_OR_MODEL", help="The output_dir of a run, the folder of a model, or a Hub name."),
]
Base = Annotated[bool, typer.Option("--base", help="Take the model that the run started from, without what it learnt.")]
NewTokens = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Most tokens of an answer. Default: 256, or what the model has room for."),
]
DtypeName = Annotated[
    str, typer.Option(metavar="NAME", help="Of the weights: auto (as stored), float32, bfloat16 or float16.")
]


def generate(
    target: Target,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Prompt to answer; repeatable. Without any you can chat; of a pipe, every line is a prompt.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Prompts to answer: text, one per line, or .jsonl with prompt, question or messages."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write prompts and answers there, as .jsonl.")
    ] = None,
    base: Base = False,
    max_new_tokens: NewTokens = None,
    temperature: Temperature = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, metavar="P", help="Sample among the most likely tokens that reach P.")
    ] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Most positions of a batch of prompts.")] = 8192,
    dtype: DtypeName = "auto",
    seed: Annotated[int, typer.Option(metavar="N", help="Seed for temperatures above 0.")] = 0,
) -> None:
    """Answer prompts with a trained model, or chat with it.

    A prompt is a user's turn of a conversation, or plain text where the model was trained on plain text; which of both is
    said on stderr. Prompts of like length are answered together.
    """
    weights = dtype_of(dtype)
    chatting = not prompt and prompts is None and sys.stdin.isatty()
    if out is not None:
        _check_out(out, chatting)
    piped = [] if prompt or prompts is not None or chatting else _piped()
    from packtrain.generation.prompts import how_asked
    from packtrain.generation.trained import load_trained

    trained = load_trained(target, base=base, dtype=weights)
    typer.echo(how_asked(trained.tokenizer, trained.prompts), err=True)
    how = dict(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed
    )  # fmt: skip
    if chatting:
        _chat(trained, how)
        return
    roles = trained.recipe.data.roles if trained.recipe is not None else None
    asked = _asked([*(prompt or []), *piped], prompts, roles)
    answers = answer(trained, asked, how)
    if out is not None:
        rows = [{"prompt": given, "answer": text} for given, text in zip(asked, answers, strict=True)]
        out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"wrote {len(rows):,} answers to {out}")
        return
    for text in answers:
        print(text)


def dtype_of(name: str) -> Dtype:
    """Returns the value of `--dtype`.

    Raises:
        PacktrainError: it is not one of those there are.
    """
    for known in get_args(Dtype):
        if name == known:
            return known
    raise PacktrainError("is not known", key="--dtype", value=name, fix=f"choose from {', '.join(get_args(Dtype))}")


def answer(trained: Trained, prompts: list[str | Messages], how: dict) -> list[str]:
    """Returns the answers as text, in the order of the prompts."""
    from packtrain.generation.batches import generate as run
    from packtrain.generation.prompts import encode_prompts

    ids = encode_prompts(trained.tokenizer, prompts, trained.prompts)
    found = dict(run(trained.model, trained.tokenizer, ids, **how))
    return [str(trained.tokenizer.decode(found[number], skip_special_tokens=True)) for number in range(len(ids))]


def _asked(given: list[str], path: Path | None, roles: Mapping[str, str] | None) -> list[str | Messages]:
    from packtrain.generation.prompts import read_prompts

    return [*given, *([] if path is None else read_prompts(path, roles))]


def _piped() -> list[str]:
    """Reads prompts from standard input, one per line.

    Raises:
        PacktrainError: there are none.
    """
    fix = "give --prompt TEXT or --prompts FILE, pipe one prompt per line, or run it in a terminal to chat"
    try:
        found = [line for line in sys.stdin.read().split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise PacktrainError(f"standard input can't be read as text: {error}", fix=fix) from None
    if not found:
        raise PacktrainError("standard input is no terminal and holds no prompts", fix=fix)
    return found


def _check_out(path: Path, chatting: bool) -> None:
    """Raises PacktrainError where `--out` would take no answers: before a model is loaded, and not after it has answered."""
    if chatting:
        raise PacktrainError("has no effect on a chat", key="--out", fix="give prompts, or leave it out")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        fix = "name a file in a folder that exists and can be written"
        raise PacktrainError("can't be written", key="--out", value=str(path), fix=fix)


def _chat(trained: Trained, how: dict) -> None:
    """Asks for the user's turns until the input ends; the conversation so far is the prompt of each answer."""
    turns: Messages = []
    print("Write a message; Ctrl-D ends.")
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return
        if not text.strip():
            continue
        turns.append({"role": "user", "content": text})
        said = answer(trained, [turns if trained.chat else text], how)[0]
        turns.append({"role": "assistant", "content": said})
        print(said)
