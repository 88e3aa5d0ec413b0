"""Rows -> examples: tokenise once, then read token ids and labels of any examples in one call.

    rows = open_rows("train.jsonl")
    examples = build_examples(rows, tokenizer, max_length=2048, overflow="truncate")     # or a recipe's: prepare_examples
    examples.lengths                        # int32 [n]: all that a plan needs
    ids, labels = examples.gather([3, 1])   # int64 [L3 + L1]: two documents, end to end

Tokens are stored once per rows, tokenizer and loss mask. What only chooses among them (`max_length`, `overflow`,
`on_bad_row`, `take`, `hold_out`) is a `View`: example i is the tokens `starts[i] .. starts[i] + lengths[i]` of
document `rows[i]`, so changing `max_length` tokenises nothing again. Bad rows are left out, long ones treated as
`overflow` says:

    max_length 4      document a b c d e f g h i
    truncate                   [a b c d]
    split                      [a b c d] [e f g h]         [i] predicts nothing and is left out
    drop                       (none)
    error                      DataError

The first token of a piece has no label, and a piece without any supervised token is no example. All of it works
on arrays of lengths; tokens are read only to count the supervised ones of pieces.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from packtrain.data import store
from packtrain.data.encoding import tokenize
from packtrain.data.formats import Kind
from packtrain.data.joined import join_documents
from packtrain.data.report import DataReport
from packtrain.data.selection import View, select
from packtrain.data.sources import Rows
from packtrain.data.tokens import Documents, open_dataset
from packtrain.errors import DataError
from packtrain.recipe.sections import MAX_LENGTH

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


_HELD_OUT = 0x68656C64  # "held": keeps this draw apart from others of the same seed


class AnyExamples(Protocol):
    """What plans, collators and trainers ask of examples: `Examples`, or an objective's that are laid out otherwise."""

    @property
    def lengths(self) -> np.ndarray: ...

    @property
    def supervised(self) -> np.ndarray: ...

    @property
    def longest(self) -> int: ...

    def lengths_in(self, layout: str, /) -> np.ndarray: ...

    @property
    def rows(self) -> np.ndarray: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def report(self) -> DataReport: ...

    def __len__(self) -> int: ...

    def __getitem__(self, example_id: int, /) -> dict[str, np.ndarray]: ...

    def gather(
        self,
        example_ids: Sequence[int] | np.ndarray,
        starts: np.ndarray | None = None,
        stops: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]: ...

    def factors(
        self,
        example_ids: Sequence[int] | np.ndarray,
        starts: np.ndarray | None = None,
        stops: np.ndarray | None = None,
    ) -> np.ndarray | None: ...

    def extras(self, example_ids: np.ndarray, /) -> Mapping[str, Any]: ...


class Examples:
    """Token ids and labels of examples, numbered 0 to n-1.

    Made by `prepare_examples`, `find_examples`, `build_examples` or `Examples.from_dataset`. A pickle holds paths and the
    view, no tokens: a data loader's worker maps the same files.

    Attributes:
        source: the rows behind `rows`, where they are at hand (not in a worker, nor for a dataset or a cached store).
    """

    def __init__(self, documents: Documents, view: View | None, report: DataReport, source: Rows | None = None):
        self._documents, self._partial_view, self.source = documents, view, source
        self.report = replace(
            report,
            examples=len(self),
            tokens=int(self.lengths.sum(dtype=np.int64)),
            supervised_tokens=int(self.supervised.sum(dtype=np.int64)),
        )

    @functools.cached_property
    def _view(self) -> View:
        if self._partial_view is not None:
            return self._partial_view
        count = len(self._documents.lengths)
        return View(
            rows=None,
            starts=np.broadcast_to(np.int32(0), count),
            lengths=self._documents.lengths,
            supervised=self._documents.supervised,
        )

    @property
    def lengths(self) -> np.ndarray:
        """int32 `[n]`, tokens of each example; memory-mapped where nothing was cut or left out."""
        return self._view.lengths

    @property
    def supervised(self) -> np.ndarray:
        """int32 `[n]`, tokens with a label other than -100; the first token of an example has none."""
        return self._view.supervised

    @property
    def supervised_in_row(self) -> np.ndarray:
        """int32 `[n]`, supervised tokens of the row that each example is of, before anything was cut."""
        return self._documents.supervised[self.rows]

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(self.lengths.max())

    def lengths_in(self, layout: str) -> np.ndarray:
        """Returns what a plan in that layout counts as the tokens of each example: `lengths`, in any."""
        return self.lengths

    @property
    def documents(self) -> Sequence[Documents]:
        """The tokenised rows that the examples are chosen from, those of each source apart."""
        return self._documents.parts or (self._documents,)

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """int64 `[n]`, the source row of each example; made when it is first asked for."""
        return self._view.documents(np.arange(len(self)))

    @property
    def blanks(self) -> np.ndarray:
        """int32 `[n]`, tokens of nothing but white space that follow the eos at the end of an example.

        A chat template may put them there (ChatML's last newline). 0 for pieces of rows, and for datasets that were
        tokenised elsewhere.
        """
        blanks = self._documents.tokens.blanks
        if blanks is None:
            return np.zeros(len(self), dtype=np.int32)
        if self._partial_view is None:
            return blanks
        return np.where(self.lengths == self._documents.lengths[self.rows], blanks[self.rows], 0)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the documents and of which tokens of them are examples."""
        if self._partial_view is None:
            return self._documents.contents
        digest = hashlib.sha256(self._documents.contents.encode())
        for array in (self.rows, self._view.starts, self.lengths):
            digest.update(np.ascontiguousarray(array, dtype="<i8").data)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._view.lengths)

    def __getitem__(self, example_id: int) -> dict[str, np.ndarray]:
        """Returns `{"input_ids": int64 [L], "labels": int64 [L]}`."""
        if not 0 <= example_id < len(self):
            raise IndexError(example_id)
        input_ids, labels = self.gather([example_id])
        return {"input_ids": input_ids, "labels": labels}

    def gather(
        self,
        example_ids: Sequence[int] | np.ndarray,
        starts: np.ndarray | None = None,
        stops: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns documents end to end, copied once, straight from the memory-mapped buffers.

        Args:
            example_ids: int `[S]`.
            starts, stops: int `[S]`, positions within each example; the whole of it by default.

        Returns:
            input_ids and labels, int64 `[T]`; the first label of every document is -100.
        """
        return self._documents.tokens.gather(*self._pieces(example_ids, starts, stops))

    def _pieces(self, example_ids, starts, stops) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns documents and positions in them, int64 `[S]` each, of pieces of examples."""
        ids = np.asarray(example_ids, dtype=np.int64)
        view = self._view
        lengths, first = view.lengths[ids], view.starts[ids].astype(np.int64)
        starts = np.zeros_like(first) if starts is None else np.asarray(starts)
        stops = lengths if stops is None else np.asarray(stops)
        assert ((0 <= starts) & (starts <= stops) & (stops <= lengths)).all(), "a piece must lie within its example"
        return view.documents(ids), first + starts, first + stops

    @property
    def has_factors(self) -> bool:
        """Whether a row gives a token a factor of the loss other than 1 (a `weight` of a message)."""
        return self._documents.tokens.has_factors

    def factors(
        self,
        example_ids: Sequence[int] | np.ndarray,
        starts: np.ndarray | None = None,
        stops: np.ndarray | None = None,
    ) -> np.ndarray | None:
        """Returns the factors of the loss of the tokens that `gather` gives, float32 `[T]`; None where all are 1."""
        if not self.has_factors:
            return None
        return self._documents.tokens.factors(*self._pieces(example_ids, starts, stops))

    def extras(self, example_ids: np.ndarray) -> Mapping[str, Any]:
        """Returns nothing: a batch of these examples has the collator's entries alone."""
        return {}

    def take(self, indices: Sequence[int] | np.ndarray, *, note: str | None = None) -> Examples:
        """Returns these examples in this order, renumbered from 0; nothing is copied but the view.

        Args:
            note: a statement for their report.
        """
        report = self.report if note is None else replace(self.report, notes=(*self.report.notes, note))
        return Examples(self._documents, self._view[np.asarray(indices, dtype=np.int64)], report, self.source)

    def hold_out(self, eval_size: int | float, seed: int) -> tuple[Examples, Examples]:
        """Splits into (train, held out) by a seeded choice of source rows.

        Whole rows are held out, so that pieces of one long row never stand on both sides.

        Args:
            eval_size: rows to hold out; below 1 a share of them.
            seed: the choice is the same for the same seed and number of rows.

        Raises:
            DataError: nothing would be left on one side.
        """
        rows = np.unique(self.rows)
        count = round(eval_size * len(rows)) if eval_size < 1 else int(eval_size)
        if not 1 <= count < len(rows):
            what = f"holds out {count:,} of {len(rows):,} rows, which leaves nothing to train or to evaluate on"
            raise DataError(what, key="data.eval_size", value=eval_size)
        chosen = np.random.default_rng([_HELD_OUT, seed]).permutation(len(rows))[:count]
        held_out = np.isin(self.rows, rows[chosen])
        train = self.take(np.flatnonzero(~held_out))
        train.report = replace(train.report, held_out=count)
        return train, self.take(np.flatnonzero(held_out))

    @classmethod
    def join(cls, parts: Sequence[Examples], report: DataReport) -> Examples:
        """Puts the examples of several sources one after another; their rows are numbered on from source to source."""
        views = [part._view[np.arange(len(part))] for part in parts]
        firsts = np.cumsum([0, *(len(part._documents.lengths) for part in parts)])
        view = View(
            rows=np.concatenate([view.rows + first for view, first in zip(views, firsts, strict=False)]),
            starts=np.concatenate([view.starts for view in views]),
            lengths=np.concatenate([view.lengths for view in views]),
            supervised=np.concatenate([view.supervised for view in views]),
        )
        sources = [part.source for part in parts if part.source is not None]
        source = Rows.join(sources) if len(sources) == len(parts) else None
        return cls(join_documents([part._documents for part in parts]), view, report, source)

    def __reduce__(self):
        return Examples, (self._documents, self._partial_view, self.report)

    @classmethod
    def from_dataset(
        cls,
        dataset: datasets.Dataset,
        *,
        max_length: int | None = None,
        overflow: str = "error",
        on_bad_row: str = "error",
    ) -> Examples:
        """Makes examples of a tokenised `datasets.Dataset`, read where they lie.

        Args:
            dataset: with a column `input_ids`, and `labels`, or `completion_mask` and/or `assistant_masks` (a
                token is supervised where all masks are 1), or none of them (every token is supervised).
            max_length, overflow, on_bad_row: as for `build_examples`; no limit by default.

        Raises:
            DataError: no such columns, lists of something else than integers, padding, labels of another length.
        """
        tokens = open_dataset(dataset)
        lengths = tokens.input_ids.lengths()
        problems = dict(reversed(tokens.problems()))  # the first of each row
        lengths[list(problems)] = 0
        supervised, good = np.zeros_like(lengths), np.flatnonzero(lengths)
        supervised[good] = tokens.count_supervised(good, np.zeros_like(good), lengths[good])
        unlearnable = good[supervised[good] == 0]
        lengths[unlearnable] = 0
        problems |= dict.fromkeys(unlearnable.tolist(), "no supervised token")
        documents = Documents(
            fingerprint=dataset._fingerprint,
            format="input_ids",
            tokens=tokens,
            lengths=lengths,
            supervised=supervised,
            contents=dataset._fingerprint,
            prompts=["input_ids"],
            problems=sorted(problems.items()),
        )
        chosen = select(
            documents, max_length=max_length, overflow=overflow, on_bad_row=on_bad_row, where="row {}".format
        )
        return cls(documents, *chosen)


def build_examples(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: str = "auto",
    max_length: int = MAX_LENGTH,
    overflow: str = "error",
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    on_lost_content: str = "error",
    columns: Mapping[str, str | None] | None = None,
    roles: Mapping[str, str] | None = None,
    kind: Kind = "example",
    on_bad_row: str = "error",
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
    tokenizer_key: str | None = None,
) -> Examples:
    """Tokenises rows, or finds them tokenised, and chooses what to train on.

    Args:
        rows: see `open_rows`.
        tokenizer: a transformers tokenizer.
        format: a key of `packtrain.data.formats.FORMATS`; `auto` goes by the columns.
        max_length: most tokens of an example, at least 2.
        overflow: of rows longer than that: `error`, `truncate` (keep the first tokens), `drop`, or `split` into
            pieces of `max_length` (pieces without a supervised token are left out).
        completion_only_loss: learn from completions only; None is the format's own default.
        assistant_only_loss: learn from assistant turns only: what the chat template marks with `{% generation %}`, or what
            it renders between the generation prompt and the end of the turn.
        on_lost_content: of a conversation of which the chat template leaves something out: `error` (a bad row) or `warn`.
        columns: name of a column that formats read -> the rows' own name of it; None to leave it out.
        roles: names of speakers -> `system`, `developer`, `user`, `assistant` or `tool`, beyond the usual ones.
        kind: of the rows, see `packtrain.data.formats.KINDS`; a pair is two documents end to end.
        on_bad_row: `error` lists them all at once; `skip` leaves them out and lists them in the report.
        num_proc: processes that tokenise.
        cache_dir: see `packtrain.data.store`.
        tokenizer_key: how `find_examples` will name this tokenizer, see `store.tokenizer_key`.

    Raises:
        DataError: with file and row, or key and value, and the fix.
    """
    options: dict[str, Any] = dict(
        format=format,
        completion_only_loss=completion_only_loss,
        assistant_only_loss=assistant_only_loss,
        on_lost_content=on_lost_content,
        columns=columns,
        roles=roles,
    )
    documents = tokenize(rows, tokenizer, **options, kind=kind, num_proc=num_proc, cache_dir=cache_dir)
    if tokenizer_key is not None:
        request = request_of(rows.request, tokenizer_key, options, kind=kind)
        store.remember(request, documents.fingerprint, rows.files, rows.counts, cache_dir)
    view, report = select(documents, max_length=max_length, overflow=overflow, on_bad_row=on_bad_row, where=rows.where)
    notes = (*rows.notes, *report.notes)
    files = replace(report, files=tuple(rows.counts), not_read=tuple(rows.not_read), notes=notes)
    return Examples(documents, view, files, rows)


# Keys of `data:` that decide how rows are tokenised, and with them those that choose which tokens are examples.
TOKENS = {"format", "completion_only_loss", "assistant_only_loss", "on_lost_content", "columns", "roles"}
CHOICES = TOKENS | {"max_length", "overflow", "on_bad_row"}


def request_of(
    rows: object, tokenizer_key: str, options: Mapping[str, object], *, kind: Kind = "example"
) -> dict[str, object]:
    """Returns the key under which the store remembers what rows, tokenizer and loss mask gave."""
    request = {"rows": rows, "tokenizer": tokenizer_key, **{name: options[name] for name in sorted(TOKENS)}}
    return request | ({"kind": kind} if kind != "example" else {})
