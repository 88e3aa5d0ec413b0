"""What a run measures of itself: real tokens, filler, and where the seconds of a step go."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch


@dataclass(frozen=True, kw_only=True)
class BatchCount:
    """Tokens of one micro-batch: `real` belong to examples, `computed` went through the model, filler included."""

    real: int
    computed: int
    supervised: int
    documents: int

    def __add__(self, other: BatchCount) -> BatchCount:
        mine, theirs = asdict(self), asdict(other)
        return BatchCount(**{key: mine[key] + theirs[key] for key in mine})


NOTHING = BatchCount(real=0, computed=0, supervised=0, documents=0)


def count_batch(batch: Mapping[str, object]) -> BatchCount:
    """Count the tokens of a collated micro-batch, padded or flat; a filler document counts as filler."""
    labels, example_ids = batch["labels"], batch["example_ids"]
    assert isinstance(labels, torch.Tensor) and isinstance(example_ids, torch.Tensor)
    is_real = example_ids >= 0  # [S] or [B]
    if "attention_mask" in batch:
        lengths = batch["attention_mask"].sum(dim=1)  # [B]
    else:
        lengths = batch["cu_seq_lens_q"].diff()  # [S]
    return BatchCount(
        real=int((lengths * is_real).sum()),
        computed=labels.numel(),
        supervised=int((labels != -100).sum()),
        documents=int(is_real.sum()),
    )


@dataclass
class Meter:
    """Running totals of one rank. `start_step` -> `count` -> `end_step`, once per update."""

    counts: BatchCount = NOTHING
    steps: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    _began: float = field(default=0.0, repr=False)

    def start_step(self) -> None:
        """Before the step's batches are fetched."""
        self._began = time.perf_counter()

    def fetched(self, batches: Sequence[Mapping[str, object]]) -> None:
        """The step's micro-batches are here."""
        self.data_seconds += time.perf_counter() - self._began
        self.counts = sum((count_batch(batch) for batch in batches), self.counts)

    def end_step(self) -> None:
        """After the optimizer step."""
        self.seconds += time.perf_counter() - self._began
        self.steps += 1

    def since(
        self, earlier: Meter, over_ranks: Callable[[list[int]], list[int]] = lambda counts: counts
    ) -> dict[str, float]:
        """Rates between an `earlier` copy and now, as they appear in the logs; the wait for data is this rank's.

        Args:
            over_ranks: sums counts of this rank over all.
        """
        seconds, now, then = self.seconds - earlier.seconds, self.counts, earlier.counts
        own = [now.real - then.real, now.computed - then.computed, now.supervised - then.supervised]
        real, computed, supervised = over_ranks(own)
        if not seconds or not computed:
            return {}
        return {
            "real_tokens_per_second": round(real / seconds, 1),
            "supervised_tokens_per_second": round(supervised / seconds, 1),
            "filler_share": round(1 - real / computed, 4),
            "data_wait_share": round((self.data_seconds - earlier.data_seconds) / seconds, 4),
        }
