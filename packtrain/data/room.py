"""Is there room in memory for a row? A tokenizer that finds none ends the process, and a row of it is no example."""

from __future__ import annotations

from packtrain.data.report import BadRow

_SMALL = 1 << 28  # bytes, of which nobody takes stock


def check_room(size: int, doing: str) -> None:
    """Refuses a row that needs more memory than there is: a tokenizer that finds none ends the process.

    Args:
        size: bytes.
        doing: what needs them, in words.

    Raises:
        BadRow: neither the machine nor the limit of the process (`ulimit -v`) leaves so much.
    """
    if size < _SMALL:
        return
    import psutil

    free = psutil.virtual_memory().available
    if hasattr(psutil, "RLIMIT_AS"):  # Linux
        limit, _ = psutil.Process().rlimit(psutil.RLIMIT_AS)
        if limit != psutil.RLIM_INFINITY:
            free = min(free, limit - psutil.Process().memory_info().vms)
    if size > free:
        raise BadRow(
            f"{doing} takes about {size / (1 << 30):.1f} GiB of memory, and {free / (1 << 30):.1f} GiB are free"
        )
