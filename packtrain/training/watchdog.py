"""Says which rank the others wait for: a collective that one rank never joins is silent until its timeout.

    no progress for 60 seconds: waiting for rank 1, in micro-batch 3 of update 12 since 14:03:07

Every rank writes what it begins, and that it lives, to a store of its own next to the process group's; rank 0 reads it from
a thread, and names those that are behind, once for every stall. The run itself goes on, or ends by `training.ddp_timeout`.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

logger = logging.getLogger(__name__)
STALL = 60.0  # seconds without progress of any rank, and
TIMES = 10  # as long as the longest progress took, after which ranks are named
BEAT = 2.0  # seconds between signs of life
PATIENCE = timedelta(seconds=30)  # for the store


@dataclass(frozen=True)
class Told:
    """What a rank wrote last: how far it is, what that is in words, when that and its last sign of life were first read,
    in seconds of rank 0's `time.monotonic`: other clocks differ, and may be set."""

    at: tuple[int, int]
    doing: str
    since: float
    alive: float


class Watchdog(TrainerCallback):
    """Watches all ranks of a run while it trains; does nothing for one process.

    Args:
        say: where rank 0 names the ranks that are behind.
        stall: see `STALL`.
    """

    def __init__(self, say: Callable[[str], None] = logger.warning, *, stall: float = STALL):
        self.say, self.stall = say, stall
        self._store: dist.TCPStore | None = None
        self._rank = 0
        self._read_at: dict[str, tuple[bytes, float]] = {}  # key of the store -> what was read last, and when first
        self._stop = threading.Event()

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size == 1:
            return
        self._stop.clear()
        self._rank = args.process_index
        address: list[Any] = [os.environ.get("MASTER_ADDR", "127.0.0.1"), 0]
        if self._rank == 0:
            self._store = dist.TCPStore(address[0], 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
            address[1] = self._store.port
        broadcast_object_list(address)
        if self._rank > 0:
            self._store = dist.TCPStore(address[0], address[1], is_master=False, timeout=PATIENCE)
        self.begins((state.global_step, 0), "before its first update")
        threading.Thread(target=self._live, args=(self._store,), daemon=True).start()
        if self._rank == 0:
            threading.Thread(target=self._watch, args=(self._store, args.world_size), daemon=True).start()

    def on_train_end(self, args, state, control, **kwargs):
        self._stop.set()

    def begins(self, at: tuple[int, int], doing: str) -> None:
        """Writes that this rank begins something, of which no other rank waits for the end.

        Args:
            at: grows with every call, equally on all ranks: (update, step in it).
            doing: what, in words.
        """
        if self._store is not None and not self._stop.is_set():
            with suppress(RuntimeError):  # rank 0 has gone, of which the next collective says more
                self._store.set(f"doing/{self._rank}", json.dumps([*at, doing, time.time()]))

    def _live(self, store: dist.TCPStore) -> None:
        while not self._stop.is_set():
            with suppress(RuntimeError):
                store.set(f"alive/{self._rank}", str(time.time()))
            self._stop.wait(BEAT)

    def _watch(self, store: dist.TCPStore, ranks: int) -> None:
        usual, newest, said = 0.0, time.monotonic(), False
        while not self._stop.wait(min(1.0, self.stall / 4)):
            told = [self._read(store, rank) for rank in range(ranks)]
            since = max((one.since for one in told if one), default=newest)
            if since > newest:
                usual, newest, said = max(usual, since - newest), since, False
            seconds = time.monotonic() - newest
            if not said and seconds > max(self.stall, TIMES * usual) and (ranks_behind := _behind(told)):
                said = True
                self.say(f"no progress for {seconds:.0f} seconds: waiting for {ranks_behind}")

    def _read(self, store: dist.TCPStore, rank: int) -> Told | None:
        names = [f"doing/{rank}", f"alive/{rank}"]
        if not store.check(names):
            return None
        for name in names:
            found = store.get(name)
            if self._read_at.get(name, (None,))[0] != found:
                self._read_at[name] = found, time.monotonic()
        (doing, since), (_, alive) = (self._read_at[name] for name in names)
        update, step, words, _ = json.loads(doing)
        return Told((update, step), words, since, alive)


def _behind(told: list[Told | None]) -> str:
    """Names the ranks that the others wait for: those that don't live, else those that are not so far. None is while all
    evaluate, or wait for a checkpoint."""
    now, furthest = time.monotonic(), max((one.at for one in told if one), default=(0, 0))
    lifeless = [rank for rank, one in enumerate(told) if one and now - one.alive > 5 * BEAT]
    ranks = lifeless or [rank for rank, one in enumerate(told) if one is None or one.at < furthest]
    return "; ".join(f"rank {rank}, {_told_of(told[rank], lifeless=rank in lifeless)}" for rank in ranks)


def _told_of(one: Told | None, *, lifeless: bool) -> str:
    if one is None:
        return "which has not begun to train"
    since = time.strftime("%H:%M:%S", time.localtime(time.time() - (time.monotonic() - one.since)))
    return f"{one.doing} since {since}" + (" (its process gives no sign of life)" if lifeless else "")
