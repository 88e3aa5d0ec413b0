"""How sentences and tables write names and differences."""

from __future__ import annotations


def listed(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def small(value: float) -> str:
    """A relative difference: `2e-6` when tiny, else per cent."""
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-") if value < 1e-3 else f"{value:.1%}"


def signed(value: float) -> str:
    """`+13.9%`."""
    return f"{value:+.1%}"
