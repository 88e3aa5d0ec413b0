"""Lets every rank of a run hear what one of them refuses, so that none waits for a rank that has left.

Ranks are asked with the same documents or with batches of their own, and one alone may refuse, run out of memory or fail.
What it has to say goes over a process group of its own, so that it is never taken for a collective of the trainer's loss.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from packtrain.errors import PacktrainError
from packtrain.training.guards.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

PATIENCE = timedelta(seconds=60)  # for ranks that may wait for this one inside of their loss
_BYTES = 4096  # of a message
_SHOWN = 400  # characters of what is wrong, and of its fix


class RankFailed(PacktrainError):
    """Another rank failed with an error that may end its process.

    Attributes:
        out_of_memory: whether it ran out of memory.
    """

    def __init__(self, what: str, *, out_of_memory: bool = False):
        self.out_of_memory = out_of_memory
        super().__init__(what)


class Verdicts:
    """Exchanges what ranks refuse; of one process it does nothing.

    Args:
        ranks: how many there are; every one of them makes this object at the same time.
    """

    def __init__(self, ranks: int):
        exchanges = ranks > 1 and dist.is_initialized() and dist.is_gloo_available()
        self._group = dist.new_group(backend="gloo") if exchanges else None

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Raises on every rank where one of them raises within.

        Raises:
            PacktrainError: another rank has refused what is within; names the rank.
            RankFailed: another rank has failed otherwise.
        """
        try:
            yield
        except Exception as error:
            if self._group is not None:
                self._tell(error)
            raise
        for rank, error in enumerate(self.gathered(None)):
            if error:
                what = f"rank {rank} has stopped: {error['what']}"
                if error["refuses"]:
                    raise PacktrainError(what, fix=error["fix"])
                raise RankFailed(what, out_of_memory=error["out_of_memory"])

    def gathered(self, value: Any) -> list[Any]:
        """Returns a small value of every rank, in order.

        Raises:
            RankFailed: another rank has ended.
        """
        if self._group is None:
            return [value]
        try:
            return self._exchange(value)
        except RuntimeError as error:
            raise RankFailed(f"another rank has ended before it answered: {error}") from error

    def _tell(self, error: Exception) -> None:
        packtrains = isinstance(error, PacktrainError)
        told = {
            "refuses": packtrains and not isinstance(error, RankFailed),
            "out_of_memory": ran_out_of_memory(error),
            "what": (error.what if packtrains else f"{type(error).__name__}: {error}")[:_SHOWN],
            "fix": (error.fix or "")[:_SHOWN] or None if packtrains else None,
        }
        try:
            self._exchange(told, PATIENCE)
        except RuntimeError:  # the others wait inside of their loss, and hear that this rank ends
            logger.warning("packtrain: the other ranks did not answer within %d seconds", PATIENCE.seconds)

    def _exchange(self, value: Any, patience: timedelta | None = None) -> list[Any]:
        encoded = json.dumps(value, ensure_ascii=False).encode().ljust(_BYTES)
        mine = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        of_all = [torch.empty_like(mine) for _ in range(dist.get_world_size(self._group))]
        work: Any = dist.all_gather(of_all, mine, group=self._group, async_op=True)
        work.wait() if patience is None else work.wait(patience)
        return [json.loads(bytes(each.tolist())) for each in of_all]

    def __enter__(self) -> Verdicts:
        return self

    def __exit__(self, *failure: object) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)


def ran_out_of_memory(error: BaseException) -> bool:
    """Returns whether this rank, or another that it heard of, ran out of memory."""
    return is_out_of_memory(error) or (isinstance(error, RankFailed) and error.out_of_memory)
