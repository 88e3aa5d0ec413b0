"""Sequence classification: one class per row, read off the last token, as transformers' decoders do.

    row        {"text": "the plot is thin", "label": "negative"}
    example    input_ids  <s> the plot is thin </s>        labels  -  -  -  -  -  0         (- is -100)

The class stands as the label of the last token, the only supervised one, so plans, layouts, weights and checkpoints treat
it like any other label. The loss is transformers' own (`ForSequenceClassificationLoss`, a mean over examples), in every
layout: a flat row holds many documents, and each is scored at its own last token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np

from packtrain.data.formats import IGNORED
from packtrain.data.report import DataReport
from packtrain.errors import DataError, ModelError
from packtrain.objectives.causal import sum_of_weights, supervised_index
from packtrain.objectives.examples import DerivedExamples, notes_without, read_column
from packtrain.objectives.objective import Loss, Objective, Prepared, Task, TokenLosses, keeps_documents_whole
from packtrain.recipe.fields import Positive, Text
from packtrain.recipe.sections import Settings, Verdicts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from packtrain.data.examples import Examples
    from packtrain.packing.strategies import Strategy


def _rows_are_whole(settings: Settings, strategy: Strategy) -> Verdicts:
    if settings["data.overflow"] == "split":
        fix = "cut long rows (`overflow: truncate`) or drop them (`overflow: drop`)"
        yield "data.overflow", "cuts rows into pieces, and a row has one class", fix


class SequenceClassification(Objective):
    """Predicts the class of a row."""

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    new_weights: ClassVar[tuple[str, ...]] = ("score.",)
    keeps_examples: ClassVar[bool] = False
    rules = (keeps_documents_whole, _rows_are_whole)

    name: Literal["sequence_classification"] = "sequence_classification"
    label_column: Text = "label"
    """Column of the rows with the class: text, or a number from 0 on."""
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
        from packtrain.packing.collator import PackCollator

        column = self.label_column
        named = classes_of(train, column)
        names = class_names(named, self.num_labels, column)
        classified = ClassifiedExamples(train, _numbered(named, names, train, column), column)
        evaluated = None
        if held_out is not None:
            named = classes_of(held_out, column)
            evaluated = ClassifiedExamples(held_out, _numbered(named, names, held_out, column), column)

        def prepare(model: PreTrainedModel) -> Prepared:
            model.config.pad_token_id = (
                tokenizer.pad_token_id
            )  # by which transformers finds the last token of a padded row
            return Prepared({"task_type": "SEQ_CLS"})

        return Task(
            tokenizer=tokenizer,
            train=classified,
            held_out=evaluated,
            loss=SEQUENCE_CLASSIFICATION,
            make_collator=PackCollator,
            prepare=prepare,
            config_fields={
                "num_labels": len(names),
                "id2label": dict(enumerate(map(str, names))),
                "label2id": {str(name): number for number, name in enumerate(names)},
                "problem_type": "single_label_classification",
            },
        )


class ClassifiedExamples(DerivedExamples):
    """Examples of which the last token alone is supervised, with the class as its label.

    Args:
        classes: int64 `[n]`, the class of each example.
        column: of the rows, where the classes stand.
    """

    def __init__(self, examples: Examples, classes: np.ndarray, column: str):
        self.examples, self.classes, self.column = examples, classes, column
        self.lengths = examples.lengths
        self.supervised = np.ones(len(examples), dtype=np.int32)
        digest = hashlib.sha256(np.ascontiguousarray(classes, dtype="<i8").data).hexdigest()
        self.fingerprint = f"{examples.fingerprint} classes {digest}"

    @property
    def report(self) -> DataReport:
        counts = np.bincount(self.classes)
        note = f"classes: {len(counts):,}, of {counts.min():,} to {counts.max():,} examples"
        notes = notes_without(self.examples.report.notes, self.column)
        return replace(self.examples.report, supervised_tokens=len(self), notes=(*notes, note))

    def gather(
        self, example_ids: Sequence[int] | np.ndarray, starts: np.ndarray | None = None, stops: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns documents end to end, as `Examples.gather`; always whole ones."""
        ids = np.asarray(example_ids, dtype=np.int64)
        input_ids, labels = self.examples.gather(ids, starts, stops)
        labels = np.full_like(labels, IGNORED)
        labels[np.cumsum(self.lengths[ids]) - 1] = self.classes[ids]
        return input_ids, labels


def classes_of(examples: Examples, column: str) -> list[str | int]:
    """Reads the class of every example from its source row.

    Raises:
        DataError: there is no such column, or a row whose class is neither text nor a whole number.
    """
    found: list[str | int] = []
    for where, value in read_column(examples, column):
        if isinstance(value, bool) or not isinstance(value, str | int):
            what = f"the class in '{column}' must be text or a whole number"
            raise DataError(what, where=where(), key="objective.label_column", value=value)
        found.append(value)
    return found


def class_names(named: list[str | int], count: int | None, column: str) -> list[str | int]:
    """Returns the classes in the order of their numbers.

    >>> class_names(["b", "a", "b"], None, "label"), class_names([2, 0], None, "label")
    (['a', 'b'], [0, 1, 2])
    """
    kinds = {type(name) for name in named}
    if len(kinds) > 1:
        what, fix = f"'{column}' is text in some rows and a number in others", "write every class the same way"
        raise DataError(what, key="objective.label_column", value=column, fix=fix)
    numbers = [name for name in named if isinstance(name, int)]
    if numbers:
        if min(numbers) < 0:
            raise DataError("class numbers must be 0 or greater", key="objective.label_column", value=min(numbers))
        names: list[str | int] = list(range(max(count or 0, max(numbers) + 1)))
    else:
        names = sorted(set(named), key=str)
    if count is not None and len(names) != count:
        what = f"the training rows have {len(names)} classes"
        raise DataError(what, key="objective.num_labels", value=count, fix="leave it out, or correct it")
    if len(names) < 2:
        raise DataError("there is only one class to predict", key="objective.label_column", value=column)
    return names


def _numbered(named: list[str | int], names: list[str | int], examples: Examples, column: str) -> np.ndarray:
    numbers = {name: number for number, name in enumerate(names)}
    for row, name in zip(examples.rows.tolist(), named, strict=True):
        if name not in numbers:
            what, fix = f"no training row has this class in '{column}'", f"known: {', '.join(map(str, names))}"
            where = examples.source.where(row) if examples.source is not None else f"row {row}"
            raise DataError(what, where=where, key="objective.label_column", value=name, fix=fix)
    return np.array([numbers[name] for name in named], dtype=np.int64)


def classification_losses(
    model: torch.nn.Module, batch: Mapping[str, torch.Tensor], *, head: torch.nn.Module | None = None
) -> TokenLosses:
    """Scores every document of a padded or flat batch at its last token.

    Args:
        model: a classifier of transformers whose head reads every token, bare or wrapped (peft, DDP, DeepSpeed, FSDP).
        batch: `labels` int64 `[B, T]`, the class at the last token of each document and -100 elsewhere; `loss_weights`
            float32 `[B, T]`; and the model's inputs.
        head: see `classification_head`; by default that of `model`.
    """
    from packtrain.objectives.logits import head_outputs_at

    index = supervised_index(batch)  # [N]
    return losses_of_classes(
        head_outputs_at(model, batch, index, head=head or classification_head(model)), batch, index
    )


def losses_of_classes(logits: torch.Tensor, batch: Mapping[str, torch.Tensor], index: torch.Tensor) -> TokenLosses:
    """Scores classes at labelled positions by cross-entropy.

    Args:
        logits: `[N, classes]`, at these positions.
        batch: `labels` int64 and `loss_weights` float32, `[B, T]` each.
        index: int64 `[N]`, flat positions (row-major over `[B, T]`).
    """
    from torch.nn.functional import cross_entropy

    targets = batch["labels"].flatten()[index]
    return TokenLosses(
        nll=cross_entropy(logits.float(), targets, reduction="none"),
        weights=batch["loss_weights"].flatten()[index],
        index=index,
        correct=logits.argmax(dim=-1) == targets,
    )


def classification_head(model: torch.nn.Module) -> torch.nn.Module:
    """Returns the module that scores every token. Raises ModelError for a model that pools before its head (BERT)."""
    inside = getattr(model, "get_base_model", None)
    inner: Any = inside() if inside is not None else model
    if not hasattr(inner, "score"):
        what = "pools its hidden states before its head, so packed documents cannot be separated there"
        fix = "use a decoder (Llama, Qwen, Gemma, GPT-2 ...)"
        raise ModelError(what, key="objective.name", value=type(inner).__name__, fix=fix)
    return inner.score


def accuracy(losses: TokenLosses, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns `{"accuracy": [correct examples, examples]}`, float64."""
    import torch

    assert losses.correct is not None
    return {
        "accuracy": torch.stack([losses.correct.sum().double(), losses.index.new_tensor(len(losses.index)).double()])
    }


SEQUENCE_CLASSIFICATION = Loss(
    losses=classification_losses, denominator=sum_of_weights, head=classification_head, sums=accuracy
)
