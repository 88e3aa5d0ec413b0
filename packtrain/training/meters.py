"""What a run measures of itself: real tokens and padding, the seconds of a step, held-out losses, and peak memory.

Losses are sums over tokens and over examples, divided once at the end: means that don't depend on how a set was batched.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from packtrain.objectives.objective import TokenLosses


@dataclass(frozen=True, kw_only=True)
class BatchCount:
    """Tokens of one micro-batch: `real` belong to examples, `computed` went through the model, padding included."""

    real: int
    computed: int
    supervised: int
    documents: int

    def __add__(self, other: BatchCount) -> BatchCount:
        mine, theirs = asdict(self), asdict(other)
        return BatchCount(**{key: mine[key] + theirs[key] for key in mine})


NOTHING = BatchCount(real=0, computed=0, supervised=0, documents=0)


def count_batch(batch: Mapping[str, Any]) -> BatchCount:
    """Counts the tokens of a collated micro-batch, padded or flat; a document without an example counts as padding."""
    labels, example_ids = batch["labels"], batch["example_ids"]
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
    """Running totals of one rank. `start_step` -> `fetched` -> `end_step`, once per update."""

    counts: BatchCount = NOTHING
    steps: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    after: int = 0  # the update after which counting began; 0 for the whole run
    _began: float = field(default=0.0, repr=False)

    def start_step(self) -> None:
        """Starts the clock, before the step's batches are fetched."""
        self._began = time.perf_counter()

    def fetched(self, batches: Sequence[Mapping[str, object]]) -> None:
        """Counts the step's micro-batches, once they are here."""
        self.data_seconds += time.perf_counter() - self._began
        self.counts = sum((count_batch(batch) for batch in batches), self.counts)

    def end_step(self) -> None:
        """Stops the clock, after the optimizer step."""
        self.seconds += time.perf_counter() - self._began
        self.steps += 1

    def carried(self, over_ranks: Callable[[list[int]], list[int]]) -> dict[str, Any]:
        """Returns the totals of the run so far, counts summed over ranks, for a checkpoint to carry; on every rank."""
        counts = asdict(self.counts)
        counts = dict(zip(counts, over_ranks(list(counts.values())), strict=True))
        times = {"steps": self.steps, "seconds": self.seconds, "data_seconds": self.data_seconds}
        return {"counts": counts, **times, "after": self.after}

    def go_on(self, carried: Mapping[str, Any] | None, step: int, *, counting: bool) -> None:
        """Starts from the totals of a resumed checkpoint.

        Args:
            carried: as `carried` gave them; None where the checkpoint has none, so that counting begins after `step`.
            counting: whether this rank stands for the counts of all ranks before.
        """
        if carried is None:
            self.after = step
            return
        self.counts = BatchCount(**carried["counts"]) if counting else NOTHING
        self.steps, self.seconds = carried["steps"], carried["seconds"]
        self.data_seconds, self.after = carried["data_seconds"], carried["after"]

    def since(
        self, earlier: Meter, over_ranks: Callable[[list[int]], list[int]] = lambda counts: counts
    ) -> dict[str, float]:
        """Returns rates between an `earlier` copy and now, as they appear in the logs; the wait for data is this rank's.

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
            "padding_share": round(1 - real / computed, 4),
            "data_wait_share": round((self.data_seconds - earlier.data_seconds) / seconds, 4),
        }


# ----------------------------------------------------------------------------------------------------- losses


def add_sums(total: dict[str, torch.Tensor], more: dict[str, torch.Tensor]) -> None:
    """Adds to `total` in place: name -> float64 `[2]`, numerator and denominator."""
    for name, pair in more.items():
        total[name] = total[name] + pair if name in total else pair


def means_of(sums: dict[str, torch.Tensor], skip: tuple[str, ...] = ()) -> dict[str, float]:
    """Returns numerator / denominator of each sum that counted anything."""
    pairs = {name: pair.tolist() for name, pair in sums.items() if name not in skip}
    return {name: numerator / count for name, (numerator, count) in pairs.items() if count}


def evaluation_sums(losses: TokenLosses, batch: dict[str, Any]) -> torch.Tensor:
    """Returns float64 `[4]`: sum of nll, supervised tokens, sum over examples of their mean nll, examples."""
    documents = document_of(batch).flatten()[losses.index]  # [N]
    count = len(batch["example_ids"])
    nll = losses.nll.double()
    per_document = torch.zeros(2, count, dtype=torch.float64, device=nll.device)
    per_document[0].index_add_(0, documents, nll)
    per_document[1].index_add_(0, documents, torch.ones_like(nll))
    scored = per_document[1] > 0
    means = per_document[0][scored] / per_document[1][scored]
    return torch.stack([nll.sum(), per_document[1].sum(), means.sum(), scored.sum().double()])


def document_of(batch: dict[str, Any]) -> torch.Tensor:
    """Returns which document of the micro-batch each position belongs to: int64, the shape of `labels`."""
    if "cu_seq_lens_q" in batch:
        lengths = batch["cu_seq_lens_q"].diff()  # [S]
        return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)[None]
    rows, width = batch["labels"].shape
    return torch.arange(rows, device=batch["labels"].device)[:, None].expand(rows, width)


# ----------------------------------------------------------------------------------------------------- memory


def reset_peak() -> None:
    """Starts a new peak on a CUDA device; a process's own peak cannot be reset."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> tuple[int, str]:
    """Returns peak bytes so far and what they count: `device` (CUDA allocator) or `process` (resident set, `getrusage`)."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated(), "device"
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process"


def max_peak(earlier: tuple[int, str] | None) -> tuple[int, str]:
    """Returns `peak_memory`, or the peak before a resume where that was higher and counts the same."""
    peak, peak_of = peak_memory()
    return (max(peak, earlier[0]), peak_of) if earlier and earlier[1] == peak_of else (peak, peak_of)
