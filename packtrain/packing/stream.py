"""Packs from a stream: rows that come one by one, are not counted beforehand, and need not fit in memory.

    rows = datasets.load_dataset(..., streaming=True).map(tokenise)     # {"input_ids", "labels"}
    packs = PackedStream(rows, PackCollator(layout="flat"), capacity=8192)
    for batch in DataLoader(packs, batch_size=None): ...                # this rank's packs as finished batches

`Stream` forms the packs, `PackedStream` makes a torch dataset of them, for any training loop.

At most `buffer` rows wait. A pack takes the oldest of them, then again and again the longest that still fits, so short
rows fill the space that long ones leave and none waits for ever. Rows that found no place stay for the next pack. No
row is read that came more than `window` rows after the oldest one waiting: that bounds how far the order can change.

Every rank reads the same rows and packs them alike, and takes its own pack of every group. So no row is lost or repeated,
all ranks have the same number of packs (the last group may hold empty ones), and the state is the same on all of them: a
run may go on with another number of ranks. Packing costs microseconds per row; where reading is expensive (rows
are tokenised on the way), tokenise once and stream the result.
"""

from __future__ import annotations

import hashlib
import inspect
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

from packtrain.errors import CheckpointError, DataError, PlanError
from packtrain.packing.collator import Batch, PackCollator


class Stream:
    """Groups of `world_size` packs, each a list of (row number, row), until the rows end.

        stream = Stream(rows, capacity=8192, length_of=len)
        for group in stream:                    # one pack per rank
            compute(group[rank])                # rows of at most 8,192 tokens together
        state = stream.state_dict()             # a few integers per waiting row; load_state_dict goes on from there

    Args:
        rows: can be iterated more than once and gives the same rows in the same order each time. If it has
            `skip(n)`, as a `datasets.IterableDataset` has, resuming uses it.
        capacity: most tokens in a pack.
        length_of: tokens of a row.
        buffer: most rows that wait.
        window: a row leaves before the row that comes `window` places after it is read; at least `buffer`, None
            for four times that.
        max_documents: most rows in a pack.
        world_size: packs in a group.

    Raises:
        PlanError: options that make no sense. DataError: while iterating, a row without tokens or longer than `capacity`.

        >>> stream = Stream([6, 5, 4, 3], capacity=10, length_of=int, buffer=3, world_size=2)
        >>> [[[row for _, row in pack] for pack in group] for group in stream]
        [[[6, 4], [5, 3]]]
    """

    def __init__(
        self,
        rows: Iterable[Any],
        *,
        capacity: int,
        length_of: Callable[[Any], int],
        buffer: int = 1000,
        window: int | None = None,
        max_documents: int | None = None,
        world_size: int = 1,
    ):
        window = 4 * buffer if window is None else window
        limits = {"capacity": capacity, "buffer": buffer, "window": window, "world_size": world_size}
        for key, value in (limits | ({} if max_documents is None else {"max_documents": max_documents})).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PlanError("must be a positive integer", key=key, value=value)
        if window < buffer:
            raise PlanError(
                "must be at least `buffer`", key="window", value=window, fix=f"set it to at least {buffer}, or None"
            )
        if iter(rows) is rows:
            raise PlanError(
                "the rows can be iterated only once, so a run could not resume from a checkpoint",
                key="rows",
                fix="give an object whose __iter__ starts over, for example a datasets.IterableDataset",
            )
        self.rows, self.capacity, self.length_of = rows, capacity, length_of
        self.buffer, self.window, self.max_documents, self.world_size = buffer, window, max_documents, world_size
        self._read = 0  # rows so far
        self._waiting: list[int] = []  # numbers of those among them that wait
        self._kept: list[Any] = []  # those that wait, and the last row that was read
        self._hash: str | None = None  # of those, in a state that was given

    def state_dict(self) -> dict[str, Any]:
        """Returns where the stream stands, as of the last group: rows read, the numbers of those that still wait, and a
        hash of these and of the last one that was read."""
        hashed = _hash(self._kept) if self._kept else self._hash
        return {"rows_read": self._read, "waiting": list(self._waiting)} | ({"hash": hashed} if hashed else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iteration continue where `state_dict` was taken.

        Raises:
            CheckpointError: it is no such state.
        """
        try:
            read, waiting = int(state["rows_read"]), [int(number) for number in state["waiting"]]
            hashed = state.get("hash")  # missing in states of earlier versions
            if not all(0 <= number < read for number in waiting):
                raise ValueError("a row waits that was not read")
        except (KeyError, TypeError, ValueError) as error:
            fix = "give what `state_dict` has returned, as it was stored with the checkpoint"
            raise CheckpointError("is not the state of a stream", key="state", value=state, fix=fix) from error
        self._read, self._waiting, self._kept, self._hash = read, waiting, [], hashed

    def __iter__(self) -> Iterator[list[list[tuple[int, Any]]]]:
        source = self._resumed()
        held = {number: (length, row) for number, length, row in islice(source, len(self._waiting))}  # oldest first
        by_length = sorted((length, -number) for number, (length, _) in held.items())
        ended, last = False, self._kept[-1:]
        while True:
            group = []
            for _ in range(self.world_size):
                while not ended and len(held) < self.buffer and self._read - next(iter(held), self._read) < self.window:
                    number, length, row = next(source, (-1, 0, None))
                    if ended := number < 0:
                        break
                    self._read, last = number + 1, [row]
                    held[number] = (length, row)
                    insort(by_length, (length, -number))
                group.append([(number, held.pop(number)[1]) for number in self._choose(held, by_length)])
            if not group[0]:
                break
            self._waiting, self._kept = list(held), [*(row for _, row in held.values()), *last]
            yield group
        self._read, self._waiting, self._kept, self._hash = 0, [], [], None  # the next iteration is the next epoch

    def _choose(self, held: dict[int, tuple[int, Any]], by_length: list[tuple[int, int]]) -> list[int]:
        """Takes the rows of the next pack; they leave `by_length` (ascending; of equal rows the oldest last)."""
        chosen: list[int] = []
        left = self.capacity
        oldest = next(iter(held), None)
        place = -1 if oldest is None else bisect_left(by_length, (held[oldest][0], -oldest))
        while place >= 0 and len(chosen) != self.max_documents:
            length, number = by_length.pop(place)
            chosen.append(-number)
            left -= length
            place = bisect_right(by_length, (left, 1)) - 1
        return chosen

    def _resumed(self) -> Iterator[tuple[int, int, Any]]:
        """Returns (number, length, row) of those that wait, and of all that were not read yet.

        Raises:
            DataError: there are fewer rows than were read before, or others: the state is that of others.
        """
        first = min(self._waiting, default=max(self._read - 1, 0))  # the last one that was read is still there
        skip = getattr(self.rows, "skip", None)  # of datasets.IterableDataset
        rows = iter(skip(first) if first and skip is not None else islice(self.rows, first, None))
        before = dict(enumerate(islice(rows, self._read - first), start=first))
        fix = "give the rows, in their order, that the state is of"
        if len(before) < self._read - first:
            what = f"end before row {self._read - 1}, which was read when the state was taken"
            raise DataError(what, key="rows", fix=fix)
        again = [(number, before[number]) for number in self._waiting]
        self._kept = [row for _, row in again] + [before[number] for number in before if number == self._read - 1]
        if self._hash is not None and _hash(self._kept) != self._hash:
            raise DataError("are not those that were read when the state was taken", key="rows", fix=fix)
        after = enumerate(rows, start=self._read)
        return ((number, self._length(number, row), row) for number, row in chain(again, after))

    def _length(self, number: int, row: Any) -> int:
        try:
            length = int(self.length_of(row))
        except (KeyError, TypeError) as error:
            what = f"has no tokens that can be counted ({type(error).__name__}: {error})"
            fix = "tokenise the rows first: every row is a mapping with a list `input_ids`"
            raise DataError(what, where=f"row {number} of the stream", fix=fix) from error
        if not 0 < length <= self.capacity:
            what = "has no tokens" if length <= 0 else f"has {length} tokens, more than the capacity of {self.capacity}"
            raise DataError(
                what, where=f"row {number} of the stream", fix="drop, truncate or split such rows before packing"
            )
        return length


class PackedStream(IterableDataset):
    """One rank's packs of a stream, collated: a torch dataset of finished batches.

    With `transformers.Trainer`:

        class StreamTrainer(Trainer):           # a pack is a batch already
            def get_train_dataloader(self):
                return DataLoader(self.train_dataset, batch_size=None)

        args = TrainingArguments(..., max_steps=1000, ignore_data_skip=True)
        StreamTrainer(model, args, train_dataset=packs).train()

    The loader is handed to the Trainer as it is: accelerate would shard it a second time, and `PackedStream` has taken
    this rank's packs already. `packs.state_dict()` belongs into the checkpoint; recipes/README.md has a Trainer that does
    it. A loader that would collate the packs again, as that of a stock Trainer, or deal them out to ranks again, is refused.

    Rows of a streaming `datasets` dataset are read without worker processes: in a worker it gives that worker's share
    only, so several workers would lose rows, and are refused. Rows of a plain iterable may be read by several workers:
    each reads all of them, the packs come in the same order, but the state lives in the workers, and asking this process
    for it is an error: use torchdata's `StatefulDataLoader` to save it there.

    Args:
        rows: an iterable of `{"input_ids", "labels"}` that starts anew each time it is iterated, with all rows in
            every process that does.
        collator: makes the batches; its `empty()` stands in where a rank has no pack in the last group.
        capacity, buffer, window, max_documents: see `Stream`.
        rank, world_size: None for those of `torch.distributed`, where it runs when the packs are read.

    Raises:
        PlanError: no such rank, another collator; while iterating, several loader workers over rows that share themselves
            out among them, or a loader that does not take packs as they are.
    """

    def __init__(
        self,
        rows: Iterable[dict[str, Any]],
        collator: PackCollator,
        *,
        capacity: int,
        buffer: int = 1000,
        window: int | None = None,
        max_documents: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        if not hasattr(collator, "empty"):  # found out at the end of the rows otherwise, and only on some ranks
            what, fix = "must be a PackCollator", 'give packtrain.PackCollator(layout="flat")'
            raise PlanError(what, key="collator", value=type(collator).__name__, fix=fix)
        self.rank, self._given = rank or 0, (rank, world_size)
        self.collator = collator
        self.stream = Stream(
            rows,
            capacity=capacity,
            length_of=_tokens,
            buffer=buffer,
            window=window,
            max_documents=max_documents,
            world_size=world_size or 1,
        )
        # set in a worker of a data loader, read in the process that has started it
        self._read_by_workers = torch.zeros(1, dtype=torch.bool).share_memory_()
        self._find_rank()

    def _find_rank(self) -> None:
        """Takes what was not given from torch.distributed, which may have started since this was built."""
        rank, ranks = self._given
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank = torch.distributed.get_rank() if rank is None else rank
            ranks = ranks or torch.distributed.get_world_size()
            self.rank, self.stream.world_size = rank, ranks
        if not 0 <= self.rank < (ranks := self.stream.world_size):
            fix = "give world_size, too, or leave both to torch.distributed"
            what = f"must be from 0 to {ranks - 1}, because there are {ranks} ranks"
            raise PlanError(what, key="rank", value=self.rank, fix=fix)

    def __getstate__(self) -> dict[str, Any]:
        self._find_rank()  # a worker that is spawned has no ranks to ask
        return vars(self).copy()

    def __iter__(self) -> Iterator[Batch]:
        self._find_rank()
        worker = get_worker_info()
        self._read_by_workers.fill_(worker is not None)
        _refuse_reader(self.stream.world_size)
        workers, own = (worker.num_workers, worker.id) if worker else (1, 0)
        if workers > 1 and isinstance(self.stream.rows, IterableDataset):  # one of `datasets` is one of torch, too
            raise PlanError(
                "the dataset splits its rows among data-loading workers, and every worker must read all of them",
                key="num_workers",
                value=workers,
                fix="set num_workers to 0 or 1",
            )
        for number, group in enumerate(self._groups()):
            if number % workers == own:  # the loader asks its workers in turn, so the order stays
                pack = [row | {"example_id": number} for number, row in group[self.rank]]
                yield self.collator(pack) if pack else self.collator.empty()

    def _groups(self) -> Iterator[list[list[tuple[int, Any]]]]:
        """Yields the groups of an epoch; of the next one after a state that was taken at the end of the rows.

        A Trainer ends where its loader gives nothing, and would not make the updates that are left.
        """
        group, resumed = None, self.stream.state_dict()["rows_read"] > 0
        for group in self.stream:
            yield group
        if group is None and resumed:
            yield from self.stream

    def set_epoch(self, epoch: int) -> None:
        """Passes the epoch on to the rows, if they can be shuffled anew."""
        set_epoch = getattr(self.stream.rows, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Returns where the stream stands, as of the last pack; see `Stream.state_dict`.

        Raises:
            PlanError: data-loading workers read the packs, and only they know.
        """
        if bool(self._read_by_workers) and get_worker_info() is None:
            what = "were read by data-loading workers, so this process does not know where the stream stands"
            fix = "set num_workers to 0, or save the state of torchdata's StatefulDataLoader instead"
            raise PlanError(what, key="packs", fix=fix)
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iteration continue where `state_dict` was taken: at the end of the rows, with their beginning."""
        self._read_by_workers.fill_(False)
        self.stream.load_state_dict(state)


def _refuse_reader(world_size: int) -> None:
    """Looks among the callers for the data loader that reads the packs, and refuses one that would change them.

    A dataset is not told who reads it, and what comes of it otherwise is an error of torch about tensors that can't be
    stacked, or rows that are lost without one.

    Raises:
        PlanError: it collates the packs again, or deals them out to ranks again.
    """
    fix = "read them with `DataLoader(packs, batch_size=None)`; in a Trainer let `get_train_dataloader` return that"
    frame = inspect.currentframe()
    while frame is not None:
        reader: Any = frame.f_locals.get("self")
        kinds = {kind.__name__ for kind in type(reader).__mro__}
        if "_BaseDatasetFetcher" in kinds and reader.auto_collation:  # of torch's DataLoader
            what = "the packs of a PackedStream are batches already, and this data loader would collate them again"
            raise PlanError(what, key="batch_size", fix=fix)
        if world_size > 1 and kinds & {"IterableDatasetShard", "DataLoaderDispatcher"}:  # of accelerate
            what = "this rank's packs would be dealt out to the ranks again, so that rows are lost"
            raise PlanError(what, key="accelerator.prepare", fix=f"don't hand it the loader: {fix}")
        frame = frame.f_back


def _hash(rows: Iterable[Any]) -> str:
    """Hashes the token ids of rows, or rows of another kind as they are printed."""
    digest = hashlib.sha256()
    for row in rows:
        ids = row.get("input_ids") if isinstance(row, Mapping) else None
        content = repr(row).encode() if ids is None else np.asarray(ids, dtype=np.int64).tobytes()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _tokens(row: dict[str, Any]) -> int:
    return len(row["input_ids"])
