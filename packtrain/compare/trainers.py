"""The trainers that can run a variant: packtrain, and its peers. Names only; imports nothing heavy.

A peer gets the same model, tokenised examples and seed. Its batch sizes are those that packtrain's planner
finds for the strategy it is `like` under the same `max_tokens`, so that every micro-batch has the same memory
to spend. Of several ranks each gets as many examples of an update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

PACKTRAIN = "packtrain"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another trainer.

    Attributes:
        package: what has to be installed.
        like: the strategy of packtrain that lays out the same way; its plan sizes the peer's batches.
        keeps_order: whether it is given the examples in the plan's order, which is a shuffle, so that its updates see
            what packtrain's do (a packer, or a sampler over the whole epoch, mixes them itself).
        says_documents: whether its batches show where documents end.
        options: for its configuration class.
    """

    package: str
    like: str
    keeps_order: bool = True
    says_documents: bool = True
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def is_flat(self) -> bool:
        """Whether its batches are rows of several documents that flash-attention isolates."""
        return self.like != "pad_longest" and self.says_documents

    @property
    def packs(self) -> bool:
        """Whether it packs the epoch into rows of `max_length`."""
        return bool(self.options.get("packing"))


TRAINERS: dict[str, Peer] = {
    "trl:padding": Peer(package="trl", like="pad_longest"),
    "trl:padding_free": Peer(package="trl", like="padding_free", options={"padding_free": True}),
    "trl:packing_bfd": Peer(
        package="trl", like="bfd", keeps_order=False, options={"packing": True, "packing_strategy": "bfd"}
    ),
    "trl:packing_wrapped": Peer(
        package="trl",
        like="wrapped",
        keeps_order=False,
        says_documents=False,
        options={"packing": True, "packing_strategy": "wrapped"},
    ),
    "transformers:random": Peer(package="transformers", like="pad_longest"),
    "transformers:flattening": Peer(package="transformers", like="padding_free"),
    "transformers:batch_rebalance": Peer(
        package="transformers", like="pad_longest", options={"train_sampling_strategy": "batch_rebalance"}
    ),
    "transformers:group_by_length": Peer(
        package="transformers",
        like="pad_longest",
        keeps_order=False,
        options={"train_sampling_strategy": "group_by_length"},
    ),
}
