"""The tables of a comparison: one line per variant for people (Markdown, HTML), every number for machines (CSV)."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from packtrain.compare.comparison import PHASES, WAITING, Comparison, Row
from packtrain.compare.setting import facts, method, software
from packtrain.compare.statistics import Spread
from packtrain.compare.verdict import changes, interval_of, note, signed, small, verdict

ABSENT = ""
OTHER_PREDICTIONS = " (of other predictions)"  # behind a loss that is not to be compared with the reference's
SAME_UPDATES = "held-out loss, same updates"
DETAILS = (  # columns of the page's second table, so that a screen of 1,280 pixels shows every one
    "supervised tokens/s",
    "seconds/update: median (p10-p90)",
    "tokens dropped",
    "held-out loss, mean of examples",
    SAME_UPDATES,
    "gradient norm differs by",
    "start-up",
    "TFLOP/s",
    "MFU",
    "attention",
)

Column = tuple[str, Callable[[Row], str]]  # heading, cell


def columns(comparison: Comparison) -> list[Column]:
    """Choose the columns to show: the speed, and those in which any variant has a cell."""
    reference = comparison.manifest["reference"]
    axes = {row.ends_with_reference for row in comparison.rows} - {None}
    axis = axes.pop() if len(axes) == 1 else None
    end = {None: "", "updates": " after the same updates"}.get(axis, f", same {axis}")  # not the heading of a detail
    every: list[Column] = [
        (f"speed vs {reference}", lambda row: _speed(row, comparison)),
        ("real tokens/s", lambda row: _number(row.tokens_per_second)),
        ("training loss differs by", lambda row: _difference(row.loss_difference, row, comparison)),
        (f"held-out loss{end}", lambda row: _loss(row.held_out, row)),
        ("held-out loss differs by", lambda row: _change(row, comparison)),
        ("updates", lambda row: _number(row.updates)),
        ("examples per update", lambda row: _range(row.examples_per_update)),
        ("padding", lambda row: _percent(row.padding_share)),
        ("waiting for other ranks", lambda row: _percent(row.waiting)),
        ("peak memory", lambda row: _bytes(row.memory)),
        ("supervised tokens/s", lambda row: _number(row.supervised_per_second)),
        ("seconds/update: median (p10-p90)", lambda row: _spread(row.update_seconds)),
        ("tokens dropped", lambda row: _number(row.tokens_dropped)),
        ("held-out loss, mean of examples", lambda row: _loss(row.per_example, row)),
        (SAME_UPDATES, lambda row: "" if axis == "updates" else _after_equal_updates(row)),
        ("gradient norm differs by", lambda row: _difference(row.norm_difference, row, comparison)),
        ("start-up", lambda row: "" if row.startup_seconds is None else f"{row.startup_seconds:.1f} s"),
        ("TFLOP/s", lambda row: "" if row.flops_per_second is None else f"{row.flops_per_second / 1e12:.3g}"),
        ("MFU", lambda row: _percent(row.mfu)),
        ("attention", lambda row: row.attention or ABSENT),
    ]
    speed, *others = every
    return [speed, *((heading, cell) for heading, cell in others if any(cell(row) for row in comparison.rows))]


def render_markdown(comparison: Comparison) -> str:
    """Render verdict and table, for a README or a pull request."""
    shown = columns(comparison)
    lines = [f"# {comparison.name}", "", f"{'; '.join(facts(comparison))}.", ""]
    lines += [*(f"- {sentence.text}" for sentence in verdict(comparison)), ""]
    said = note(comparison)
    lines += [said, ""] if said else []
    lines.append("| variant | " + " | ".join(heading for heading, _ in shown) + " |")
    lines.append("|---" * (len(shown) + 1) + "|")
    for row in comparison.rows:
        lines.append(f"| {row.name.replace('|', chr(92) + '|')} | " + " | ".join(_cells(row, shown)) + " |")
    lines += ["", "How it was measured:", "", *(f"- {line}" for line in method(comparison)), "", software(comparison)]
    return "\n".join([*lines, "", f"`{comparison.manifest['command']}`", ""])


def render_shown_csv(comparison: Comparison) -> str:
    """Render the table that people read: its headings and cells."""
    shown, buffer = columns(comparison), io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["variant", *(heading for heading, _ in shown)])
    writer.writerows([_no_formula(row.name), *_cells(row, shown)] for row in comparison.rows)
    return buffer.getvalue()


def render_latex(comparison: Comparison) -> str:
    """Render the columns of the page's first table for a paper; needs the package booktabs.

    Where a variant makes other updates than the reference, the loss after as many updates is a column, too.
    """
    changes = not all(row.keeps_updates for row in comparison.rows)
    shown = [c for c in columns(comparison) if c[0] not in DETAILS or (changes and c[0] == SAME_UPDATES)]
    rows = [[_in_latex(heading) for heading in ("variant", *(heading for heading, _ in shown))]]
    rows += [[_in_latex(row.name), *map(_number_in_latex, _cells(row, shown))] for row in comparison.rows]
    lines = [" & ".join(cells) + r" \\" for cells in rows]
    head = rf"\begin{{tabular}}{{l{'r' * len(shown)}}}"
    return "\n".join([head, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}", ""])


def _in_latex(text: str) -> str:
    """Escape a cell.

    >>> print(_in_latex("pad_max 2% & more"))
    pad\\_max 2\\% \\& more
    """
    words = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater", "|": "bar"}
    words = {sign: rf"\text{name}{{}}" for sign, name in words.items()}  # bare < > | are other signs in TeX's own fonts
    return re.sub(r"[\\~^<>|&%$#_{}]", lambda found: words.get(found[0], f"\\{found[0]}"), text)


def _number_in_latex(text: str) -> str:
    """Write a cell as a paper does: powers of ten and minus signs in math mode, a dash between the ends of an interval.

    >>> print(_number_in_latex("2e-6"), _number_in_latex("1e-7"), _number_in_latex("2.41x (2.30-2.52)"))
    $2 \\times 10^{-6}$ $10^{-7}$ 2.41x (2.30--2.52)
    >>> print(_number_in_latex("-0.3% (-5.6 to +5.4)"))
    $-$0.3\\% ($-$5.6 to +5.4)
    >>> print(_number_in_latex("20.00x (0.01->1000)"))
    20.00x (0.01--\\textgreater{}1000)
    """
    text = re.sub(r"(?<=\d)-(?=[\d\\])", "--", _in_latex(text))
    text = re.sub(r"(?<![\w-])-(?=\d)", "$-$", text)
    text = re.sub(r"\b(\d+)e(-?\d+)\b", r"$\1 \\times 10^{\2}$", text)
    return text.replace(r"$1 \times ", "$")


def _no_formula(text: str) -> str:
    """Puts a quote before what a spreadsheet would compute.

    >>> _no_formula("=cmd()"), _no_formula("balanced 8k")
    ("'=cmd()", 'balanced 8k')
    """
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def _cells(row: Row, shown: Sequence[Column]) -> list[str]:
    cells = [cell(row) for _, cell in shown]
    if row.failure and row.tokens_per_second is None:
        cells[0] = "failed"
    return cells


def render_csv(comparison: Comparison) -> str:
    """Render every number with full precision; empty where it was not measured."""
    buffer = io.StringIO()
    phases = (*PHASES, WAITING) if comparison.ranks > 1 else PHASES
    records = [_numbers(row, phases) for row in comparison.rows]
    writer = csv.DictWriter(buffer, fieldnames=list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


def _numbers(row: Row, phases: Sequence[str]) -> dict[str, Any]:
    low, mean, high = row.examples_per_update or (None, None, None)
    return {
        "variant": _no_formula(row.name),
        "trainer": row.trainer,
        "strategy": row.strategy,
        "keeps_updates": row.keeps_updates,
        "scores_like_reference": row.scores_like_reference,
        "failure": row.failure and _no_formula(row.failure),
        "rounds": row.rounds,
        "real_tokens_per_second": row.tokens_per_second,
        "supervised_tokens_per_second": row.supervised_per_second,
        **_named("speed", row.speed, ("estimate", "low", "high")),
        **_named("update_tokens_per_second", row.update_rate, ("median", "p10", "p90")),
        **_named("update_supervised_per_second", row.supervised_update_rate, ("median", "p10", "p90")),
        **_named("update_seconds", row.update_seconds, ("median", "p10", "p90")),
        **{f"{phase}_share": (row.shares or {}).get(phase) for phase in phases},
        "filler_share": row.padding_share,  # the column's name in stored files
        "updates": row.updates,
        "examples_per_update_min": low,
        "examples_per_update_mean": mean,
        "examples_per_update_max": high,
        "tokens_dropped": row.tokens_dropped,
        "held_out_loss": row.held_out,
        "held_out_loss_per_example": row.per_example,
        **_named("held_out_ratio", row.held_out_ratio, ("estimate", "low", "high")),
        **_named("equal_updates", row.equal_updates, ("update", "loss", "reference")),
        "loss_difference": row.loss_difference,
        "grad_norm_difference": row.norm_difference,
        "peak_memory_bytes": row.memory,
        "memory_before_bytes": row.memory_before,
        "memory_of": row.memory_of,
        "startup_seconds": row.startup_seconds,
        "flops_per_second": row.flops_per_second,
        "mfu": row.mfu,
        "attention": row.attention,
        "dtype": row.dtype,
    }


def _named(prefix: str, value: object, fields: Sequence[str]) -> dict[str, Any]:
    return {f"{prefix}_{name}": getattr(value, name, None) for name in fields}


def _speed(row: Row, comparison: Comparison) -> str:
    return ABSENT if row.speed is None else "1" if comparison.is_reference(row) else row.speed.text()


def _number(value: float | None) -> str:
    if value is None:
        return ABSENT
    return f"{value:,.0f}" if value >= 100 or float(value).is_integer() else f"{value:,.1f}"


def _spread(value: Spread | None) -> str:
    return ABSENT if value is None else f"{value.median:.3g} ({value.p10:.3g}-{value.p90:.3g})"


def _percent(value: float | None) -> str:
    return ABSENT if value is None else "0%" if value < 5e-4 else f"{value:.1%}"


def _loss(value: float | None, row: Row) -> str:
    return ABSENT if value is None else f"{value:.4f}{'' if row.scores_like_reference else OTHER_PREDICTIONS}"


def _range(values: tuple[int, float, int] | None) -> str:
    if values is None:
        return ABSENT
    low, mean, high = values
    return f"{mean:.1f} ({low:,}-{high:,})" if low != high else f"{low:,}"


def _after_equal_updates(row: Row) -> str:
    equal = row.equal_updates
    if equal is None:
        return ABSENT
    of_reference = "" if row.keeps_updates else f" for {equal.reference:.4f}"
    return f"{equal.loss:.4f}{of_reference} after {equal.update:,}"


def _difference(value: float | None, row: Row, comparison: Comparison) -> str:
    return ABSENT if value is None or comparison.is_reference(row) else small(value)


def _change(row: Row, comparison: Comparison) -> str:
    ratio = row.held_out_ratio
    if ratio is None or comparison.is_reference(row) or row.ends_with_reference is None:
        return ABSENT
    interval = None if max(map(abs, changes(ratio))) < 5e-4 else interval_of(ratio)
    return signed(ratio.estimate - 1) + (f" ({interval})" if interval else "")


def _bytes(value: float | None) -> str:
    if value is None:
        return ABSENT
    return f"{value / 2**30:.1f} GiB" if value >= 10 * 2**30 else f"{value / 2**20:,.0f} MiB"
