"""Streamed examples: a source is read, tokenised and cut into blocks while a run trains, and never stored.

    rows       0 1 2 3 4 5 | 6 7 8 9 10 11 12 | ...          the source, in its order
    examples   a b c d e f | g h i j k l      | ...          row 9 is bad and left out
    block      0             1

A block has `size` examples, a whole number of updates; the last one of an epoch has what is left. Where the source ends,
the next epoch begins. Blocks don't depend on how rows were read: which examples a block has is decided by where it
begins, and a `Start` says that in a few numbers. So a run goes on in the middle of the rows by reading its block again;
the rows before it are skipped, and neither parsed nor tokenised. The hash of all rows up to the end of a block tells
whether they are still the same.

Three blocks are held at most: the one that is trained on, the one before, and one that a thread reads ahead. Every rank
reads all rows.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from packtrain.data.encoder import Encoder, count_flags, notes_of, prompts_of
from packtrain.data.encoding import Remarks, count_remarks, notes_of_remarks, problems_of
from packtrain.data.examples import Examples
from packtrain.data.report import SHOWN, DataReport
from packtrain.data.selection import View, refuse_mostly_bad, select
from packtrain.data.sources import LOOKED_AT
from packtrain.data.streams import Raw, Source
from packtrain.data.tokens import Documents, ListColumn, Tokens, hash_table
from packtrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_AT_ONCE = 1000  # rows tokenised in one call
_COUNTED = ("rows", "truncated_rows", "dropped_rows", "split_rows", "tokens_lost", "supervised_lost")


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What became of the rows of the first epoch so far; the counts are those of `DataReport`."""

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    truncated_rows: int = 0
    dropped_rows: int = 0
    split_rows: int = 0
    tokens_lost: int = 0
    supervised_lost: int = 0
    bad_rows: int = 0
    first_bad: tuple[tuple[str, str], ...] = ()
    prompts: tuple[str, ...] = ()
    flags: tuple[int, int, int] = (0, 0, 0)
    remarks: Remarks = field(default_factory=dict)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Tally:
        """Makes a tally of what `asdict` gave, also by way of JSON."""
        plain: dict[str, Any] = {
            "first_bad": tuple((str(where), str(why)) for where, why in state["first_bad"]),
            "prompts": tuple(map(str, state["prompts"])),
            "flags": tuple(map(int, state["flags"])),
            "remarks": {said: (int(count), str(first)) for said, (count, first) in state["remarks"].items()},
        }
        return cls(**{**dict(state), **plain})

    def plus(self, rows: DataReport, examples: DataReport, table: pa.Table, raws: Sequence[Raw]) -> Tally:
        """Adds rows, of which `rows` reports what became and `table` holds what was said, and the examples of a block."""
        flags = table["flags"].to_numpy()
        prompts = prompts_of(flags[table["problem"].is_null().to_numpy()], rows.format)
        return replace(
            self,
            **{name: getattr(self, name) + getattr(rows, name) for name in _COUNTED},
            examples=self.examples + examples.examples,
            tokens=self.tokens + examples.tokens,
            supervised_tokens=self.supervised_tokens + examples.supervised_tokens,
            bad_rows=self.bad_rows + len(rows.skipped),
            first_bad=(*self.first_bad, *rows.skipped)[:SHOWN],
            prompts=tuple(dict.fromkeys((*self.prompts, *prompts))),
            flags=cast(Any, tuple(mine + new for mine, new in zip(self.flags, count_flags(flags), strict=True))),
            remarks=count_remarks(table["remarks"], _names_of(raws), self.remarks),
        )


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a block begins, and all that has to be known of what was read before it.

    Attributes:
        block: its number, from the beginning of the run.
        epoch: from 0.
        block_in_epoch: its number in its epoch.
        update, example: its first ones, from the beginning of the run.
        epoch_update, epoch_example: the first ones of its epoch.
        row: the row of the source that is read first.
        piece: pieces of that row that belong to blocks before.
        updates_in_epoch: of a whole epoch; None in the first one, as long as nobody knows.
        digest: of the rows of the epoch that blocks before have read; "" for none.
        epoch_digest: of all rows of the first epoch; None in it.
        tally: of the rows before.
    """

    block: int = 0
    epoch: int = 0
    block_in_epoch: int = 0
    update: int = 0
    example: int = 0
    epoch_update: int = 0
    epoch_example: int = 0
    row: int = 0
    piece: int = 0
    updates_in_epoch: int | None = None
    digest: str = ""
    epoch_digest: str | None = None
    tally: Tally = Tally()

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Start:
        """Makes a start of what `asdict` gave, also by way of JSON."""
        given: dict[str, Any] = {**state, "tally": Tally.of(state["tally"])}
        return cls(**given)

    def next_epoch(self, updates: int, examples: int, tally: Tally, digest: str) -> Start:
        """Returns the beginning of the epoch after this block of so many updates and examples, the last one of its epoch.

        Raises:
            DataError: the rows are not those of the first epoch.
        """
        if self.epoch_digest not in (None, digest):
            what, fix = "has other rows than in the first epoch", "start again when nothing writes to it any more"
            raise DataError(what, key="data.path", fix=fix)
        update, example = self.update + updates, self.example + examples
        return Start(
            block=self.block + (updates > 0),
            epoch=self.epoch + 1,
            update=update,
            example=example,
            epoch_update=update,
            epoch_example=example,
            updates_in_epoch=update - self.epoch_update,
            epoch_digest=digest,
            tally=tally,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Examples that are shuffled together.

    Attributes:
        start: where it begins.
        next: where the next one does.
        examples: numbered from 0.
        digest: of all rows of the epoch up to its last one.
    """

    start: Start
    next: Start
    examples: Examples
    digest: str

    @property
    def updates(self) -> range:
        return range(self.start.update, self.next.update)


class Blocks:
    """The blocks of a source, each read when it is asked for.

    Args:
        source: see `packtrain.data.streams`.
        encoder: tokenises rows.
        notes: statements for the report.
        buffer_size: examples of a block, rounded up to whole updates.
        examples_per_step: examples of an update.
        max_length, overflow, on_bad_row: see `packtrain.data.examples.build_examples`.

    Attributes:
        size: examples of a block.
    """

    def __init__(
        self,
        source: Source,
        encoder: Encoder,
        *,
        buffer_size: int,
        examples_per_step: int,
        notes: Sequence[str] = (),
        **choices: Any,
    ):
        self.source, self.notes, self.choices = source, tuple(notes), choices
        self.examples_per_step = examples_per_step
        self.size = -(-buffer_size // examples_per_step) * examples_per_step
        self.tokenizer, self._encoder = encoder.tokenizer, copy.deepcopy(encoder)  # a thread's own
        self._rows: _Rows | None = None
        self._starts = {0: Start()}
        self._held: dict[int, Block] = {}
        self._ahead: tuple[Start, Future[Block]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="packtrain-rows")

    @property
    def format(self) -> str:
        return self._encoder.format

    def first(self) -> Block:
        """Reads the first block, or returns it."""
        return self._block(0)

    def holding(self, update: int) -> Block:
        """Returns the block of an update. Blocks before it that nobody has read are read on the way.

        Raises:
            DataError: rows that can't be trained on, where the recipe says that this is an error; no rows.
        """
        assert update >= 0, f"update {update}"
        for block in self._held.values():
            if update in block.updates:
                return block
        number = max(n for n, start in self._starts.items() if start.update <= update)
        while update not in (block := self._block(number)).updates:
            number += 1
        return block

    def of_examples(self, ids: np.ndarray) -> Block:
        """Returns the block, of those that are held, to which examples belong, by their numbers from the run's beginning."""
        first, last = int(np.min(ids)), int(np.max(ids))
        for block in self._held.values():
            if block.start.example <= first and last < block.next.example:
                return block
        what = f"examples {first:,} to {last:,} of streamed rows are not at hand: a block at a time is"
        raise DataError(what, key="data.streaming", value=True, fix="leave it out to read examples by their numbers")

    def read_ahead(self, block: Block) -> None:
        """Begins to read the block after this one in a thread."""
        if self._ahead is None and block.next.block not in self._held:
            self._ahead = (block.next, self._thread.submit(self._read, block.next))

    def go_on_from(self, start: Start) -> None:
        """Takes a block's start from a checkpoint, so that no block before it has to be read."""
        self._starts[start.block] = start

    def _block(self, number: int) -> Block:
        if number not in self._held:
            start, (ahead, self._ahead) = self._starts[number], (self._ahead, None)
            if ahead is not None and ahead[0] == start:
                block = ahead[1].result()
            else:
                if ahead is not None:
                    wait([ahead[1]])  # it reads the same rows
                block = self._read(start)
            self._held = {**dict([*self._held.items()][-1:]), number: block}
            known = [Start(), *(each for held in self._held.values() for each in (held.start, held.next))]
            self._starts = {start.block: start for start in known}
        return self._held[number]

    def _read(self, start: Start) -> Block:
        """Reads the examples of the block that begins at `start`; of the next epoch's where none are left."""
        rows = self._rows_from(start)
        raws: list[Raw] = []
        tables: list[pa.Table] = []
        count, ended = 0, False
        while count < self.size and not ended:
            more = rows.take(min(_AT_ONCE, self.size - count))
            ended = not more
            if more:
                raws, tables = raws + more, [*tables, self._encode(more)]
                documents = _documents(tables, self.format)
                view = self._select(documents, raws)[0]
                count = len(view.lengths) - start.piece
                if len(raws) >= LOOKED_AT:  # not at the end of the block alone, which such rows may never fill
                    refuse_mostly_bad(documents, _names_of(raws))
        if not raws:
            return self._next_epoch(start, start.tally, start.digest)
        count, piece, used = min(count, self.size), 0, len(raws)
        if not ended:  # full: what is behind its last example belongs to the next block
            documents = _documents(tables, self.format)
            view = self._select(documents, raws)[0]
            row_of = view.documents(np.arange(len(view.lengths)))
            last = start.piece + count - 1
            row = int(row_of[last])
            used, piece = row + 1, int((row_of[: last + 1] == row).sum())
            if not (row_of[last + 1 :] == row).any():  # it is in this block as a whole
                piece = 0
            rows.give_back(raws[used - (piece > 0) :])
        raws, digest = raws[:used], raws[used - 1].digest
        table = _joined(tables).slice(0, used)
        documents = _documents([table], self.format, contents=hash_table(table))
        if ended and not start.row:  # all rows there are
            refuse_mostly_bad(documents, _names_of(raws))
        view, report = self._select(documents, raws)
        examples = Examples(documents, view[np.arange(start.piece, start.piece + count)], report)
        tally = start.tally
        if start.epoch == 0:
            counted = table.slice(1) if start.piece else table  # a row that the block before has counted
            own = raws[1:] if start.piece else raws
            tally = tally.plus(self._select(_documents([counted], self.format), own)[1], examples.report, counted, own)
        if not count:
            return self._next_epoch(start, tally, digest)
        updates = -(-count // self.examples_per_step)
        following = replace(
            start,
            block=start.block + 1,
            block_in_epoch=start.block_in_epoch + 1,
            update=start.update + updates,
            example=start.example + count,
            row=start.row + used - (piece > 0),
            piece=piece,
            digest=digest,
            tally=tally,
        )
        if ended:
            following = start.next_epoch(updates, count, tally, digest)
        return Block(start=start, next=following, examples=examples, digest=digest)

    def _next_epoch(self, start: Start, tally: Tally, digest: str) -> Block:
        """Reads the first block of the next epoch, where the one that begins at `start` has no examples."""
        if start.example == start.epoch_example:
            what = f"none of {tally.rows:,} rows is left to train on" if tally.rows else "contains no rows"
            raise DataError(what, key="data.path", value=[part.label for part in self.source.parts])
        return self._read(start.next_epoch(0, 0, tally, digest))

    def _rows_from(self, start: Start) -> _Rows:
        if self._rows is None or (self._rows.epoch, self._rows.row) != (start.epoch, start.row):
            self._rows = _Rows(self.source, start.epoch, start.row)
        return self._rows

    def _encode(self, raws: Sequence[Raw]) -> pa.Table:
        return self._encoder([raw.row() for raw in raws], _names_of(raws))

    def _select(self, documents: Documents, raws: Sequence[Raw]) -> tuple[View, DataReport]:
        view, report = select(documents, **self.choices, where=_names_of(raws), part=True)
        if view is None:
            count = len(documents.lengths)
            view = View(
                rows=np.arange(count),
                starts=np.zeros(count, np.int32),
                lengths=documents.lengths,
                supervised=documents.supervised,
            )
        return view, report

    # What is told of the rows

    def state_after(self, updates: int) -> dict[str, Any]:
        """Returns where the block of the last of so many updates begins, and the hash of all rows up to its end."""
        block = self.holding(updates - 1)
        return {"start": asdict(block.start), "rows": block.digest}

    def tally(self) -> Tally:
        """Returns what became of the rows so far, those of the block that was asked for last included."""
        return [*self._held.values()][-1].next.tally if self._held else Tally()

    def report(self) -> DataReport:
        """Returns the report of the rows read so far."""
        tally = self.tally()
        named = [part.label for part in self.source.parts]
        more = f" and {len(named) - 4:,} more" if len(named) > 4 else ""
        return DataReport(
            format=self.format,
            prompts=tally.prompts,
            **{name: getattr(tally, name) for name in (*_COUNTED, "examples", "tokens", "supervised_tokens")},
            skipped=tally.first_bad,
            more_skipped=tally.bad_rows - len(tally.first_bad),
            notes=(
                f"streamed from {', '.join(named[:4])}{more}: these are the rows read so far",
                *self.source.notes,
                *self.notes,
                *notes_of(tally.flags, self.tokenizer),
                *notes_of_remarks(tally.remarks),
            ),
        )


class _Rows:
    """Reads the rows of an epoch one after another, and takes some back."""

    def __init__(self, source: Source, epoch: int, row: int):
        self.epoch, self.row = epoch, row  # of the row that comes next
        self._rows, self._back = source.read(row), deque[Raw]()

    def take(self, number: int) -> list[Raw]:
        """Returns the next rows, at most so many; none at the end."""
        found = []
        while len(found) < number:
            raw = self._back.popleft() if self._back else next(self._rows, None)
            if raw is None:
                break
            found.append(raw)
        self.row += len(found)
        return found

    def give_back(self, raws: Sequence[Raw]) -> None:
        """Puts rows that were taken last back in front of the others."""
        self._back.extendleft(reversed(raws))
        self.row -= len(raws)


def _names_of(raws: Sequence[Raw]) -> Callable[[int], str]:
    return lambda row: raws[row].where


def _joined(tables: Sequence[pa.Table]) -> pa.Table:
    import pyarrow as pa

    return pa.concat_tables(tables)


def _documents(tables: Sequence[pa.Table], format: str, contents: str = "") -> Documents:
    """Makes documents of an encoder's tables, in memory."""
    table = _joined(tables)
    return Documents(
        fingerprint="",
        format=format,
        tokens=Tokens(lambda: table),
        lengths=ListColumn("input_ids", table["input_ids"]).lengths(),
        supervised=table["supervised"].to_numpy(),
        contents=contents,
        problems=problems_of(table),
    )
