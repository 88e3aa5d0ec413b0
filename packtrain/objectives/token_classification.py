"""Token classification: one class per word, read off its first token, as transformers' examples for tagging do (NER).

    row        {"tokens": ["Ada", "lives", "here"], "label": ["B-PER", "O", "O"]}
    example    input_ids  <s> A da lives here </s>        labels  -  1  -  2  2  -         (- is -100)

Words are put together with blanks and tokenised as text, so tokens are those that a model has seen; the further tokens of a
word have no label. The loss is transformers' own (`ForTokenClassification`, a mean over labelled tokens) in every layout:
a token is scored at its own position, so the first of a document may have a label, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np

from packtrain.data.formats import IGNORED, Kind
from packtrain.data.report import DataReport, bad_rows_error
from packtrain.errors import ModelError, shorten
from packtrain.objectives.causal import sum_of_weights, supervised_index
from packtrain.objectives.examples import DerivedExamples, notes_without, read_column
from packtrain.objectives.objective import Loss, Objective, Prepared, Task, TokenLosses, keeps_documents_whole
from packtrain.objectives.sequence_classification import accuracy, class_names, losses_of_classes
from packtrain.recipe.fields import Positive, Text
from packtrain.recipe.sections import Settings, Verdicts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from packtrain.data.examples import Examples
    from packtrain.packing.strategies import Strategy

_HEADS = ("score", "classifier")
_AT_ONCE = 4096  # examples whose masks are read at once


def _words_begin_with_the_row(settings: Settings, strategy: Strategy) -> Verdicts:
    if settings["data.overflow"] == "split":
        fix = "cut long rows (`overflow: truncate`) or drop them (`overflow: drop`)"
        yield "data.overflow", "cuts rows into pieces, and labels are counted from the first word of a row", fix


class TokenClassification(Objective):
    """Predicts the class of every word."""

    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    new_weights: ClassVar[tuple[str, ...]] = tuple(f"{head}." for head in _HEADS)
    keeps_examples: ClassVar[bool] = False
    row_kind: ClassVar[Kind] = "words"
    rules = (keeps_documents_whole, _words_begin_with_the_row)

    name: Literal["token_classification"] = "token_classification"
    label_column: Text = "label"
    """Column of the rows with one class for each word: a list of text or of numbers from 0 on, or text with blanks."""
    num_labels: Positive | None = None
    """Number of classes. Default: as many as the training rows have."""

    def logits(self, config: PreTrainedConfig) -> int:
        return cast(int, config.num_labels)

    def task(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train: Examples,
        held_out: Examples | None,
        *,
        seed: int,
        layout: Literal["flat", "padded"] = "flat",
    ) -> Task:
        from packtrain.data.encoder import added_in_front
        from packtrain.packing.collator import PackCollator

        column, first = self.label_column, not added_in_front(tokenizer)
        rows = labels_of_rows(train, column)
        names = class_names(list({label for row in rows for label in row}), self.num_labels, column)
        labelled = LabelledExamples(train, _numbered(rows, names, train, column), column, first=first)
        evaluated = None
        if held_out is not None:
            rows = labels_of_rows(held_out, column)
            evaluated = LabelledExamples(held_out, _numbered(rows, names, held_out, column), column, first=first)

        def prepare(model: PreTrainedModel) -> Prepared:
            # the head is trained whole, and peft's all-linear would give it an adapter, too
            return Prepared({"task_type": "TOKEN_CLS", "exclude_modules": [head_name(model)]})

        return Task(
            tokenizer=tokenizer,
            train=labelled,
            held_out=evaluated,
            loss=TOKEN_CLASSIFICATION,
            make_collator=partial(PackCollator, first_labels=True),
            prepare=prepare,
            config_fields={
                "num_labels": len(names),
                "id2label": dict(enumerate(map(str, names))),
                "label2id": {str(name): number for number, name in enumerate(names)},
            },
        )


class LabelledExamples(DerivedExamples):
    """Examples of words, of which the first token of each has a class as its label.

    Args:
        examples: of the format `tokens`, whose supervised tokens are the first ones of words.
        classes: int64 `[words]` of each example; a row that was cut has lost the last of them.
        column: of the rows, where they stand.
        first: the first token of a document is that of its first word.
    """

    def __init__(self, examples: Examples, classes: Iterable[np.ndarray], column: str, *, first: bool):
        self.examples, self.column, self.first = examples, column, first
        self.lengths = examples.lengths
        counts = [
            np.add.reduceat(self._firsts(ids)[1], np.cumsum(self.lengths[ids]) - self.lengths[ids], dtype=np.int64)
            for ids in np.split(np.arange(len(examples)), range(_AT_ONCE, len(examples), _AT_ONCE))
        ]
        self.supervised = np.concatenate(counts)
        self.classes = np.concatenate([own[:n] for own, n in zip(classes, self.supervised.tolist(), strict=True)])
        self._offsets = np.cumsum([0, *self.supervised])
        digest = hashlib.sha256(np.ascontiguousarray(self.classes, dtype="<i8").data).hexdigest()
        self.fingerprint = f"{examples.fingerprint} classes of words {digest}"

    @property
    def report(self) -> DataReport:
        counts = np.bincount(self.classes)
        note = f"classes: {len(counts):,}, of {counts.min():,} to {counts.max():,} words"
        notes = notes_without(self.examples.report.notes, self.column)
        return replace(self.examples.report, supervised_tokens=int(self.supervised.sum()), notes=(*notes, note))

    def gather(
        self, example_ids: Sequence[int] | np.ndarray, starts: np.ndarray | None = None, stops: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns documents end to end, as `Examples.gather`, always whole ones; the first label of one may be a class."""
        ids = np.asarray(example_ids, dtype=np.int64)
        input_ids, firsts = self._firsts(ids)
        labels = np.full_like(input_ids, IGNORED)
        none = np.empty(0, dtype=np.int64)
        labels[firsts] = np.concatenate([none, *(self.classes[slice(*self._offsets[i : i + 2])] for i in ids.tolist())])
        return input_ids, labels

    def _firsts(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens of documents, int64 `[T]`, and which of them are the first of a word, bool `[T]`."""
        input_ids, labels = self.examples.gather(ids)
        firsts = labels != IGNORED
        if self.first:
            firsts[np.cumsum(self.lengths[ids]) - self.lengths[ids]] = True
        return input_ids, firsts


def labels_of_rows(examples: Examples, column: str) -> list[list[str | int]]:
    """Reads the labels of every example's words from its source row.

    Raises:
        DataError: there is no such column, or rows have something else than one class for each word.
    """
    found: list[list[str | int]] = []
    problems: list[tuple[str, str]] = []
    words = examples.supervised_in_row
    for (where, value), count in zip(read_column(examples, column), words.tolist(), strict=True):
        value = value.split() if isinstance(value, str) else value
        problem = _problem(value, count, column)
        if problem is not None:
            problems.append((where(), problem))
        else:
            found.append(value)
    if problems:
        raise bad_rows_error(
            problems,
            len(problems),
            what=f"{len(problems):,} of {len(words):,} rows have no class for each of their words",
            key="objective.label_column",
            fix=f"give '{column}' one class for each word, all text or all numbers from 0 on, or remove the rows",
        )
    return found


def _problem(value: Any, words: int, column: str) -> str | None:
    """Says what is wrong with the labels of a row; None where nothing is."""
    if not isinstance(value, list):
        return f"'{column}' is not a list of classes: {shorten(value, 40)}"
    for number, label in enumerate(value):
        if isinstance(label, bool) or not isinstance(label, str | int):
            return f"{column}[{number}] is neither text nor a whole number: {shorten(label, 40)}"
        if isinstance(label, int) and label < 0:
            return f"{column}[{number}] is below 0: {label}"
    if len(value) != words:
        return f"'{column}' has {len(value):,} classes for {words:,} words"
    return None


def _numbered(
    rows: list[list[str | int]], names: list[str | int], examples: Examples, column: str
) -> Iterator[np.ndarray]:
    """Yields the numbers of the classes of each row, int64 `[words]`.

    Raises:
        DataError: held-out rows have classes that no training row has.
    """
    numbers = {name: number for number, name in enumerate(names)}
    unknown = [(row, label) for row, labels in enumerate(rows) for label in labels if label not in numbers]
    if unknown:
        where = [where for where, _ in read_column(examples, column)]
        raise bad_rows_error(
            [(where[row](), f"no training row has the class {label!r}") for row, label in unknown[:10]],
            len(unknown),
            what=f"{len(unknown):,} words that are held out have a class that is not trained",
            key="objective.label_column",
            fix=f"correct them, or add such rows; the classes are {shorten(', '.join(map(str, names)), 200)}",
        )
    return (np.array([numbers[label] for label in labels], dtype=np.int64) for labels in rows)


def token_classification_losses(
    model: torch.nn.Module, batch: Mapping[str, torch.Tensor], *, head: torch.nn.Module | None = None
) -> TokenLosses:
    """Scores every labelled token of a padded or flat batch at its own position.

    Args:
        model: a token classifier of transformers, bare or wrapped (peft, DDP, DeepSpeed, FSDP).
        batch: `labels` int64 `[B, T]`, the class of each word at its first token and -100 elsewhere; `loss_weights`
            float32 `[B, T]`; the model's inputs; and `supervised_index`.
        head: see `token_head`; by default that of `model`.
    """
    from packtrain.objectives.logits import logits_at

    index = supervised_index(batch)  # [N]
    return losses_of_classes(logits_at(model, batch, index, head=head or token_head(model)), batch, index)


def token_head(model: torch.nn.Module) -> torch.nn.Module:
    """Returns the module that scores tokens. Raises ModelError for a model that has none under a usual name."""
    inside = getattr(model, "get_base_model", None)
    inner: Any = inside() if inside is not None else model
    return getattr(inner, head_name(inner))


def head_name(model: Any) -> str:
    """Returns the name of the module that scores tokens. Raises ModelError for a model that has none under a usual name."""
    name = next((name for name in _HEADS if hasattr(model, name)), None)
    if name is None:
        what = "has no head that scores tokens under the name " + " or ".join(f"`{each}`" for each in _HEADS)
        fix = "use an encoder or a decoder with AutoModelForTokenClassification (BERT, RoBERTa, Llama, Qwen ...)"
        raise ModelError(what, key="objective.name", value=type(model).__name__, fix=fix)
    return name


TOKEN_CLASSIFICATION = Loss(
    losses=token_classification_losses, denominator=sum_of_weights, head=token_head, sums=accuracy
)
