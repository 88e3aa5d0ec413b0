"""Do all ranks train the same? Compared before the first update, as nothing in a collective would tell.

    data.path: 'b.jsonl' on rank 1, 'a.jsonl' on ranks 0, 2-7
    transformers: '5.23.0' on ranks 0-3, '5.22.1' on ranks 4-7

Ranks that differ in their data, seed or learning rate would train to the end and save weights of no run; others that
differ in their number of updates would wait for each other until a timeout.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor

from packtrain.errors import LaunchError, hidden, shorten

SAMPLED = 64  # values of every weight
SHOWN = 8  # differences in one message
_ABSENT = "absent"


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Compares what the ranks hold; collective, called on every rank at the same point.

    Args:
        facts: plain data by name, the same names or not. Only hashes travel for what is no text or number.

    Raises:
        LaunchError: on every rank, with what differs and where.
    """
    differing = find_differences(facts)
    if not differing:
        return
    lines = [f"\n    {difference}" for difference in differing[:SHOWN]]
    more = f"\n    and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    raise LaunchError(
        f"the {PartialState().num_processes} ranks differ, and would not train the same:{''.join(lines)}{more}",
        fix="start all ranks with the same command, files and packages",
    )


def find_differences(facts: Mapping[str, Any]) -> list[str]:
    """Returns what differs between the ranks, and where, the same on every rank; collective, as `check_agreement`."""
    if PartialState().num_processes == 1:
        return []
    told: list[dict[str, str]] = gather_object([{name: _told(value) for name, value in facts.items()}])
    names = sorted({name for one in told for name in one})
    values = {name: [one.get(name, _ABSENT) for one in told] for name in names}
    return [f"{name}: {_by_rank(of_ranks)}" for name, of_ranks in values.items() if len(set(of_ranks)) > 1]


def weights_hash(model: nn.Module) -> str:
    """Hashes names, shapes, dtypes and `SAMPLED` values of every parameter and buffer; what is sharded, by its name.

    Under ZeRO-3 that is every parameter: an adapter comes after the shards were filled, for which rank 0 alone has drawn
    numbers, and DeepSpeed takes rank 0's. A model of 135 million parameters takes about 10 ms.
    """
    digest = hashlib.sha256()
    parameters = dict(model.named_parameters())
    zero3 = any(hasattr(value, "ds_id") for value in parameters.values())
    for name, value in (*parameters.items(), *model.named_buffers()):
        digest.update(f"{name} {value.dtype}".encode())
        if value.is_meta or isinstance(value, DTensor) or (zero3 and name in parameters):
            continue  # another rank has it, or a part of it
        flat = value.detach().flatten()
        picked = flat[:: max(1, len(flat) // SAMPLED)]
        digest.update(f"{tuple(value.shape)}".encode() + picked.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _told(value: Any) -> str:
    """Returns a value in words, or its hash where that would be long."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= 200 else f"{shorten(text, 60)} ({hashlib.sha256(text.encode()).hexdigest()[:12]})"


def _by_rank(values: list[str]) -> str:
    """Says which ranks have which value, the rarest first."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    ordered = sorted(ranks.items(), key=lambda one: (len(one[1]), -one[1][0]))
    return ", ".join(f"{hidden(value)} on {_ranks(numbers)}" for value, numbers in ordered)


def _ranks(numbers: Iterable[int]) -> str:
    """Names ranks, runs of them by their ends.

    >>> _ranks([0, 2, 3, 4])
    'ranks 0, 2-4'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    single = len(runs) == 1 and len(runs[0]) == 1
    return f"rank{'' if single else 's'} {', '.join(words)}"
