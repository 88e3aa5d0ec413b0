"""A stream of rows as a torch dataset of finished batches, for any training loop and for `transformers.Trainer`.

    rows = datasets.load_dataset(..., streaming=True).map(tokenise)     # {"input_ids", "labels"}
    packs = PackedStream(rows, PackCollator(layout="flat"), capacity=8192)

    class StreamTrainer(Trainer):                                       # a pack is a batch already
        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, batch_size=None)

    StreamTrainer(model, TrainingArguments(..., max_steps=1000, ignore_data_skip=True), train_dataset=packs).train()

The loader above is handed to the Trainer as it is: accelerate would shard it a second time, and `PackedStream` has taken
this rank's packs already. `packs.state_dict()` belongs into the checkpoint. Rows of a streaming dataset as above are read
without worker processes: in a worker it gives that worker's share only, so several workers would lose rows, and are
refused. Rows of a plain iterable may be read by several workers: each reads all of them, the packs come in the same order,
but the state lives in the workers: use torchdata's `StatefulDataLoader` to save it there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

from packtrain.errors import PlanError
from packtrain.packing.collator import Batch, PackCollator
from packtrain.packing.stream import Stream


class PackedStream(IterableDataset):
    """One rank's packs of a stream, collated.

    Args:
        rows: an iterable of `{"input_ids", "labels"}` that starts anew each time it is iterated, with all rows in
            every process that does.
        collator: makes the batches; its `filler()` stands in where a rank has no pack in the last group.
        rank, world_size: None for those of `torch.distributed`, where it runs.
        options: `capacity`, `buffer`, `window`, `max_documents` of `Stream`.

    Raises:
        PlanError: no such rank; while iterating, several loader workers over rows that share themselves out among them.
    """

    def __init__(
        self,
        rows: Iterable[dict[str, Any]],
        collator: PackCollator,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        **options: Any,
    ):
        running = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = rank if rank is not None else torch.distributed.get_rank() if running else 0
        world_size = world_size or (torch.distributed.get_world_size() if running else 1)
        if not 0 <= self.rank < world_size:
            raise PlanError(f"there are {world_size} ranks", key="rank", value=self.rank)
        self.collator = collator
        self.stream = Stream(rows, length_of=_tokens, world_size=world_size, **options)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        workers, own = (worker.num_workers, worker.id) if worker else (1, 0)
        if workers > 1 and isinstance(self.stream.rows, IterableDataset):  # one of `datasets` is one of torch, too
            raise PlanError(
                "the rows share themselves out among loader workers, and every worker must read them all",
                key="num_workers",
                value=workers,
                fix="load with num_workers=0 (1 is exact as well)",
            )
        for number, group in enumerate(self.stream):
            if number % workers == own:  # the loader asks its workers in turn, so the order stays
                pack = [row | {"example_id": number} for number, row in group[self.rank]]
                yield self.collator(pack) if pack else self.collator.filler()

    def set_epoch(self, epoch: int) -> None:
        """Passed on to the rows, if they can be shuffled anew."""
        if hasattr(self.stream.rows, "set_epoch"):
            self.stream.rows.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)


def _tokens(row: dict[str, Any]) -> int:
    return len(row["input_ids"])
