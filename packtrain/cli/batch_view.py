"""`packtrain show`: print one collated batch.

supervised tokens stand between [[ and ]]; all else is read, not learnt
document 2 · example 117 · 5 padding ────────────────────────────────────
Question: what is 3 + 4?
[[3 + 4 = 7.<|eos|>]]

The marks are chosen so that no text of the batch holds them; in a terminal there are colours as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, pairwise
from itertools import count as integers
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from packtrain.cli.output import NARROWEST_NAME, keep_whole
from packtrain.data.examples import AnyExamples
from packtrain.errors import PacktrainError
from packtrain.modeling.cost import cost_of
from packtrain.modeling.loading import load_config
from packtrain.objectives.causal import supervised_index
from packtrain.objectives.objective import Task
from packtrain.objectives.task import load_task, plan_training
from packtrain.packing.collator import IGNORED, MicroBatches
from packtrain.packing.plan import AnyPlan, MicroBatch
from packtrain.packing.strategies import resolve_strategy
from packtrain.recipe.recipe import Recipe
from packtrain.recipe.sections import ModelSection

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_MARKS = (("[[", "]]"), ("<<", ">>"), ("{{", "}}"))
SUPERVISED, PROMPT, PADDING = "bold green", "blue", "dim red"


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document of a batch.

    Attributes:
        example_id: -1 for padding.
        input_ids, labels, positions: int `[L]`. Labels are of the tokens that this batch scores: of masked answers, those
            that are masked.
        weights: loss weights, float `[L]`.
        padding: padding tokens in its row.
        title: what it is of its example; nothing where it is the whole of it.
    """

    example_id: int
    input_ids: list[int]
    labels: list[int]
    positions: list[int]
    weights: list[float]
    padding: int = 0
    title: str = ""

    @property
    def supervised(self) -> int:
        return sum(label != IGNORED for label in self.labels)


def documents_of(batch: Mapping[str, Any], titles: Sequence[str] | None = None) -> list[Document]:
    """Returns the documents of a flat `[1, T]` or padded `[B, T]` batch (see `packtrain.packing.collator`)."""
    titles = titles or [""] * len(batch["example_ids"])
    width, targets = batch["input_ids"].shape[1], batch["labels"].flatten()
    index = supervised_index(batch)
    labels_of = torch.full_like(targets, IGNORED).index_put_((index,), targets[index]).view_as(batch["labels"])
    if "cu_seq_lens_q" in batch:
        bounds = batch["cu_seq_lens_q"].tolist()
        places = [(0, slice(start, stop), 0) for start, stop in pairwise(bounds)]  # of static shapes, some empty
    else:
        masks = batch["attention_mask"].bool()  # [B, T]
        places = [(row, mask, width - int(mask.sum())) for row, mask in enumerate(masks)]
    documents = []
    for example_id, (row, place, padding), title in zip(batch["example_ids"].tolist(), places, titles, strict=True):
        if isinstance(place, slice) and place.start == place.stop:
            continue
        tensors = (batch["input_ids"], labels_of, batch["position_ids"], batch["loss_weights"])
        ids, labels, positions, weights = (tensor[row][place].tolist() for tensor in tensors)
        documents.append(
            Document(
                example_id=example_id,
                input_ids=ids,
                labels=labels,
                positions=positions,
                weights=weights,
                padding=padding,
                title=title,
            )
        )
    return documents


@dataclass(frozen=True)
class Run:
    """Tokens of a document that follow one another and are all supervised, or all not, as text."""

    text: str
    supervised: bool


def runs_of(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[Run]:
    """Decodes a document, run by run."""
    pairs = zip(document.input_ids, document.labels, strict=True)
    return [
        Run(_printable(tokenizer.decode([token for token, _ in run])), supervised)
        for supervised, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED)
    ]


def choose_marks(documents: Sequence[Sequence[Run]]) -> tuple[str, str]:
    """Chooses what stands before and behind supervised runs: marks that are found nowhere else in the documents.

    >>> choose_marks([[Run("a ", False), Run("b", True)]]), choose_marks([[Run("x[[0]]", False), Run("b", True)]])
    (('[[', ']]'), ('<<', '>>'))
    """
    numbered = ((f"[{number}[", f"]{number}]") for number in integers(1))
    return next(marks for marks in chain(_MARKS, numbered) if all(_only_marks(runs, marks) for runs in documents))


def _only_marks(runs: Sequence[Run], marks: tuple[str, str]) -> bool:
    """Tells whether marks are found only where they are set, also across the ends of a run."""
    text, supervised = text_of(runs, marks).plain, sum(run.supervised for run in runs)
    return all(len(re.findall(f"(?={re.escape(mark)})", text)) == supervised for mark in marks)


def text_of(runs: Sequence[Run], marks: tuple[str, str], *, padding: bool = False) -> Text:
    """Joins a document's runs: those that are supervised stand between the marks, and each kind has its own colour.

    Args:
        padding: whether the document is nothing but padding.
    """
    text = Text()
    for run in runs:
        shown = run.text.join(marks) if run.supervised else run.text
        text.append(shown, PADDING if padding else SUPERVISED if run.supervised else PROMPT)
    return text


def _title(number: int, document: Document) -> str:
    """Returns the line above a document."""
    what = f"example {document.example_id}" if document.example_id >= 0 else "padding"
    what += f" · {document.title}" if document.title else ""
    return f"document {number} · {what}" + (f" · {document.padding:,} padding" if document.padding else "")


def _printable(text: str) -> str:
    """Escapes control characters, which must not reach the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def show_batch(
    recipe: Recipe,
    console: Console,
    *,
    step: int = 0,
    rank: int = 0,
    micro_batch: int = 0,
    examples: str | None = None,
    lines: str | None = None,
    held_out: bool = False,
    documents: int = 8,
    world_size: int = 1,
) -> None:
    """Prints what became of the rows, and a micro-batch of the recipe's plan, or given examples as in epoch 0.

    Args:
        examples: their numbers, `3,17`.
        lines: of the rows that they are of, see `find_lines`.
        held_out: whether they are held out; the first `documents` of these, where none are named.

    Raises:
        PacktrainError: bad data, or no such step, rank, micro-batch, example or line.
    """
    if examples is not None and lines is not None:
        raise PacktrainError("cannot stand next to --examples", key="--lines", value=lines, fix="leave one of them out")
    task, epoch, shapes = load_task(recipe), 0, None
    config = load_config(recipe.model, tokenizer=task.tokenizer, new_tokens=task.new_tokens, fields=task.config_fields)
    shown = task.held_out if held_out else task.train
    if shown is None:
        fix = "set data.eval_size, data.eval_path or data.eval_split"
        raise PacktrainError("the recipe holds no rows out", key="--held-out", fix=fix)
    if held_out or not (examples is None and lines is None):
        if lines is not None:
            ids = find_lines(lines, shown, task.train if held_out else task.held_out, held_out=held_out)
        else:
            ids = (
                np.arange(min(max(documents, 1), len(shown)))
                if examples is None
                else _example_ids(examples, len(shown))
            )
        lengths = np.asarray(shown.lengths[ids], dtype=np.int64)
        chosen = MicroBatch(example_ids=ids, starts=np.zeros_like(ids), stops=lengths)
        head = f"{len(ids)} {'held-out ' if held_out else ''}example{'s' if len(ids) > 1 else ''}"
    else:
        cost = cost_of(config)
        plan = plan_training(recipe, task.train, world_size=world_size, cost=cost)
        chosen, head = _micro_batch(plan, step, rank, micro_batch)
        (epoch, _), shapes = plan.locate(step), plan.shapes
    strategy = resolve_strategy(recipe.batching.strategy)
    start = _position_start(recipe, config)
    collator = task.collator(strategy, max_length=recipe.data.max_length, position_start=start)
    batch = MicroBatches(shown, collator, shapes).at_epoch(epoch)[chosen]
    console.print("\n".join(task.train.report.lines()), soft_wrap=True, highlight=False, markup=False)
    print_batch(batch, task, console, examples=shown, head=head, texts=documents, titles=collator.titles(batch))


def print_batch(
    batch: Mapping[str, Any],
    task: Task,
    console: Console,
    *,
    examples: AnyExamples,
    head: str,
    texts: int,
    titles: Sequence[str] | None = None,
) -> None:
    """Prints a line of totals, a table of documents, and the text of the first `texts` of them.

    Args:
        examples: those that the batch is of.
        titles: what each document of the batch is of its example, see `PackCollator.titles`.
    """
    found = documents_of(batch, titles)
    real = sum(len(document.input_ids) for document in found if document.example_id >= 0)
    computed, supervised = batch["input_ids"].numel(), sum(document.supervised for document in found)
    layout = "flat" if "cu_seq_lens_q" in batch else "padded"
    shape = ", ".join(map(str, batch["input_ids"].shape))
    console.print(
        f"{head}: {layout} \\[{shape}], {len(found)} document{'' if len(found) == 1 else 's'}, {real:,} real tokens "
        f"({supervised:,} supervised), {computed - real:,} padding",
        style="bold",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 1), pad_edge=False)
    for column in ("document", "example", "row", "tokens", "positions", "supervised", "weight", "padding"):
        table.add_column(column, justify="right", no_wrap=column != "row")
    table.columns[2].overflow, table.columns[2].min_width = "fold", NARROWEST_NAME
    for number, document in enumerate(found):
        row = _source_row(examples, document.example_id) if document.example_id >= 0 else "-"
        table.add_row(
            str(number),
            str(document.example_id),
            row,
            f"{len(document.input_ids):,}",
            f"{document.positions[0]:,}-{document.positions[-1]:,}",
            f"{document.supervised:,}",
            f"{sum(document.weights):.4g}",
            f"{document.padding:,}",
        )
    console.print(keep_whole(table), crop=False)
    shown = [runs_of(document, task.tokenizer) for document in found[:texts]]
    begin, end = marks = choose_marks(shown)
    console.print(
        Text.assemble(
            (f"{begin}supervised{end}", SUPERVISED),
            f" tokens stand between {begin} and {end}; ",
            ("all else", PROMPT),
            " is read, not learnt",
        )
    )
    for number, (document, runs) in enumerate(zip(found, shown, strict=False)):
        console.print(Rule(_title(number, document), align="left", style="dim"))
        console.print(text_of(runs, marks, padding=document.example_id < 0), soft_wrap=True)
    if len(found) > texts:
        console.print(f"... and {len(found) - texts} more; see --documents", style="dim", highlight=False)


def _source_row(examples: AnyExamples, example_id: int) -> str:
    """Names the row of an example as errors do: by its line, and with its file where there are several."""
    row, source = int(examples.rows[example_id]), getattr(examples, "source", None)
    if source is None:
        return str(row)
    where = source.where(row)
    return where if len(source.counts) > 1 else where.rpartition(", ")[2]


def find_lines(text: str, examples: AnyExamples, others: AnyExamples | None, *, held_out: bool) -> np.ndarray:
    """Finds the examples of rows by their lines, as errors name them: `17`, `3,17` or `rows.jsonl:17`; int64 `[n]`.

    Args:
        examples: those that are shown.
        others: those that are held out, or trained on, instead.
        held_out: whether `examples` are held out.

    Raises:
        PacktrainError: no such line, or none of its examples is among `examples`.
    """
    source = getattr(examples, "source", None)
    if source is None:
        fix = "name examples by --examples"
        raise PacktrainError("the lines of these rows are not known", key="--lines", value=text, fix=fix)
    named = {row: source.where(row) for row in range(len(source))}
    found = []
    for word in re.split(r"[,\s]+", text.strip()):
        file, _, number = word.rpartition(":")
        if not number.isdecimal():
            fix = "give numbers separated by commas, or FILE:NUMBER"
            raise PacktrainError("is not a list of lines", key="--lines", value=text, fix=fix)
        rows = [row for row, where in named.items() if _is_line(where, file, number)]
        if not rows:
            raise PacktrainError(
                f"there is no such row, from {named[0]} to {named[len(named) - 1]}", key="--lines", value=word
            )
        ids = np.flatnonzero(np.isin(examples.rows, rows))
        if not len(ids):
            raise _not_shown(word, named[rows[0]], rows, examples, others, held_out=held_out)
        found.append(ids)
    return np.concatenate(found)


def _is_line(where: str, file: str, number: str) -> bool:
    """Tells whether `rows.jsonl, line 17` is meant by a file (or none) and a number."""
    of, _, place = where.rpartition(", ")
    return place.rpartition(" ")[2] == str(int(number)) and (not file or of == file or of.endswith("/" + file))


def _not_shown(
    word: str, where: str, rows: list[int], examples: AnyExamples, others: AnyExamples | None, *, held_out: bool
) -> PacktrainError:
    """Makes the error that says why a row is no example of those that are shown."""
    reason = dict(examples.report.skipped).get(where)
    if reason is not None:
        return PacktrainError(f"{where} is a bad row: {reason}", key="--lines", value=word, fix="correct the row")
    source, other = getattr(examples, "source", None), getattr(others, "source", None)
    if others is not None and source and other and source.counts == other.counts and np.isin(others.rows, rows).any():
        what, fix = ("trained on", "leave out --held-out") if held_out else ("held out", "add --held-out")
        return PacktrainError(f"{where} is {what}", key="--lines", value=word, fix=fix)
    what = f"{where} is not among the examples: data.overflow, data.keep or the weights of a mixture leave it out"
    return PacktrainError(what, key="--lines", value=word, fix="change that setting, for this once with --set")


def _position_start(recipe: Recipe, config: PreTrainedConfig) -> int:
    """Returns the model's first position, found without making weights; 0 for a model whose code is from the Hub."""
    import torch

    from packtrain.modeling.loading import has_class, load_model
    from packtrain.modeling.positions import position_start

    auto_class = recipe.objective.auto_class
    if not has_class(config, auto_class):
        return 0
    with torch.device("meta"):
        model = load_model(ModelSection(), config, attn_implementation="eager", auto_class=auto_class)
        return position_start(model)


def _micro_batch(plan: AnyPlan, step: int, rank: int, number: int) -> tuple[MicroBatch, str]:
    """Returns the micro-batch, and its place in words."""
    for name, value, count in (
        ("step", step, plan.total_steps),
        ("rank", rank, plan.world_size),
        ("micro-batch", number, plan.gradient_accumulation_steps),
    ):
        if value >= count:
            fix = f"choose one from 0 to {count - 1}" + ("; --gpus sets their number" if name == "rank" else "")
            raise PacktrainError(f"there is no such {name}", key=f"--{name}", value=value, fix=fix)
    epoch, _ = plan.locate(step)
    place = f"step {step} of {plan.total_steps:,} (epoch {epoch}), rank {rank} of {plan.world_size}"
    place += f", micro-batch {number} of {plan.gradient_accumulation_steps}"
    return plan.micro_batches(step, rank)[number], place


def _last_examples(path: Path) -> str:
    try:
        return ",".join(map(str, json.loads(path.read_text(encoding="utf-8").splitlines()[-1])["example_ids"]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        fix = "name the nonfinite.jsonl of a run, or give numbers separated by commas"
        raise PacktrainError(f"does not name examples: {error}", key="--examples", value=str(path), fix=fix) from None


def _example_ids(text: str, count: int) -> np.ndarray:
    """Turns `3,17` into int64 `[3, 17]`, and a `nonfinite.jsonl` into the examples of its last update."""
    if text.endswith(".jsonl"):
        text = _last_examples(Path(text))
    words = re.split(r"[,\s]+", text.strip())
    fix = f"give numbers from 0 to {count - 1}, separated by commas"
    if not all(word.isdecimal() for word in words):
        raise PacktrainError("is not a list of examples", key="--examples", value=text, fix=fix)
    if beyond := [word for word in words if int(word) >= count]:
        what = f"there is no example {', '.join(beyond)}, only {count:,} of them"
        raise PacktrainError(what, key="--examples", value=text, fix=fix)
    return np.array([int(word) for word in words], dtype=np.int64)
