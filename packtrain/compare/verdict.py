"""The verdict on a comparison: sentences in plain words, made of nothing but measured numbers.

A sentence claims that something is faster only where the whole confidence interval says so, that losses are
the same only with the largest difference next to it, and says nothing of what was not measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from packtrain.compare.comparison import Comparison, Row
from packtrain.compare.statistics import Ratio
from packtrain.compare.trainers import TRAINERS
from packtrain.recipe.sections import STRATEGY

SAME_CURVE = 1e-3  # relative: float32 in another order of summation stays far below, another set of examples far above
FEW = 3  # pairs
MANY_PACKERS = 6  # of more than these only the fastest are spoken of; the table has all


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """`topic` is speed, loss, ranks, packing, peers, recommendation, failure or caution."""

    topic: str
    text: str


def verdict(comparison: Comparison) -> list[Sentence]:
    """Write the sentences in the order of their weight; the first one carries the headline."""
    if not comparison.measured:
        return [
            *_failures(comparison),
            Sentence(topic="caution", text="No variant was timed, so there is nothing to compare."),
        ]
    subject = headliner(comparison)
    sentences: list[Sentence] = []
    if comparison.reference.tokens_per_second is None:
        text = f"The reference, {_quoted(comparison.reference)}, was not timed, so there are no ratios to it."
        sentences.append(Sentence(topic="caution", text=text))
    elif subject is not None:
        sentences += _headline(subject, comparison)
    sentences += _own(subject, comparison)
    sentences += _same_updates(comparison)
    sentences += _other_scores(comparison)
    if subject is not None:
        sentences += _peers(subject, comparison)
    sentences += _waiting(subject or comparison.reference, comparison)
    sentences += _packing(subject or comparison.reference, comparison)
    sentences += _recommendation(comparison)
    return [*sentences, *_failures(comparison), *_caution(comparison)]


def note(comparison: Comparison) -> str | None:
    """Explain the words and brackets of the verdict; None where nothing was measured."""
    if not comparison.measured:
        return None
    text, seeds = "Fast means real tokens per second", comparison.seeds
    if comparison.pairs < 2:
        return f"{text}."
    text += f"; in brackets, the 95% interval over {comparison.pairs} paired "
    if seeds < 2:
        return f"{text}rounds of one seed: the machine's noise, not that of the data."
    repeats = len(comparison.manifest["rounds"]) // seeds
    return f"{text}seeds{f', each the mean of {repeats} rounds' if repeats > 1 else ''}."


def headliner(comparison: Comparison) -> Row | None:
    """Choose packtrain's variant to speak of: the fastest that keeps the updates, or the default if as fast.

    The default stands back only where it is measurably slower, and variants with settings of their own (a learning rate)
    where there is another.
    """
    ours = [row for row in comparison.ours if not comparison.is_reference(row)]
    candidates = [row for row in ours if not row.settings] or ours
    first = fastest(candidates)
    default = next((row for row in candidates if row.strategy == STRATEGY), None)
    if first is None or default is None or default is first:
        return first
    against = comparison.speed_of(default, first)
    return first if against is None or against.below_one else default


def fastest(rows: list[Row]) -> Row | None:
    """Find the row with the most real tokens per second; None where there are no rows."""
    return max(rows, key=lambda row: row.tokens_per_second or 0, default=None)


def _headline(subject: Row, comparison: Comparison) -> Iterator[Sentence]:
    reference, speed = comparison.reference, subject.speed
    if speed is None:
        return
    name, other = _quoted(subject), _quoted(reference)
    if speed.low is None:
        text = f"{name} was {speed.text()} as fast as {other} in the one round there is"
    elif speed.above_one or speed.below_one:
        text = f"{name} is {speed.text()} as fast as {other}"
    else:
        text = f"{name} is neither measurably faster nor slower than {other}, {speed.text()}"
    yield Sentence(topic="speed", text=text + _same_loss(subject, reference) + ".")


def _own(subject: Row | None, comparison: Comparison) -> Iterator[Sentence]:
    """Speak of the recipe's own strategy, and of functions of the user's, where the headline does not."""
    for row in comparison.measured:
        if not comparison.is_own(row) or comparison.is_reference(row) or row is subject or row.speed is None:
            continue
        own = ", the recipe's own strategy," if row.name == comparison.manifest.get("own_strategy") else ""
        text = f"{_quoted(row)}{own} {_speed(row.speed, _quoted(comparison.reference))}"
        against = comparison.speed_of(row, subject) if subject is not None else None
        if subject is not None and against is not None:
            text += f", and {_speed(against, _quoted(subject))}"
        if row.keeps_updates:
            text += _same_loss(row, comparison.reference)
        else:
            text = ", and ".join([text, *_updates(row, comparison.reference)]) + _losses(row, comparison)
        yield Sentence(topic="speed", text=f"{text}.")


def _same_loss(row: Row, reference: Row) -> str:
    difference = row.loss_difference
    if difference is None:
        return ""
    updates = min(len(row.learning_runs[0].updates), len(reference.learning_runs[0].updates))
    if difference <= SAME_CURVE:
        return f", with the same loss in every one of {updates:,} updates (largest relative difference {small(difference)})"
    alike = alike_until(row, reference)
    start = f" lies within {small(SAME_CURVE)} for {_first(alike)}, then" if alike else ""
    with_them = f"with {listed(row.settings)} " if row.settings else ""
    return f"; {with_them}its training loss{start} differs by up to {small(difference)} in one of {updates:,} updates"


def _first(updates: int) -> str:
    return "the first update" if updates == 1 else f"the first {updates:,} updates"


def alike_until(row: Row, reference: Row) -> int:
    """Count the updates from the start in which the training losses agree to `SAME_CURVE`, in every seed.

    Rounding grows from update to update, so the same training in another order of summation ends up apart where
    it goes on long enough; another training is apart at once.
    """
    others = {run.round: run for run in reference.learning_runs}
    counts = []
    for run in row.learning_runs:
        if run.round in others:
            pairs = list(zip(run.updates, others[run.round].updates, strict=False))
            apart = (n for n, (a, b) in enumerate(pairs) if not abs(a.loss - b.loss) <= SAME_CURVE * abs(b.loss))
            counts.append(next(apart, len(pairs)))
    return min(counts, default=0)


def _same_updates(comparison: Comparison) -> Iterator[Sentence]:
    """Say which variants that should lie on the reference's loss curve do."""
    reference = comparison.reference
    rows = [row for row in comparison.others if row.loss_difference is not None]
    same = [row for row in rows if (row.loss_difference or 0) <= SAME_CURVE]
    if len(same) > 1:
        worst = max(row.loss_difference or 0 for row in same)
        norms = [row.norm_difference for row in same if row.norm_difference is not None]
        norm = f", their gradient norms to {small(max(norms))}" if len(norms) == len(same) else ""
        yield Sentence(
            topic="loss",
            text=f"The loss curves of {listed([_quoted(row) for row in same])} lie on that of {_quoted(reference)}: "
            f"in every update the training losses agree to {small(worst)} (relative){norm}.",
        )
    for row in rows:
        if row not in same and row.settings:
            yield Sentence(
                topic="loss",
                text=f"{_quoted(row)} sees the same examples in the same updates as {_quoted(reference)}, with "
                f"{listed(row.settings)}: its training loss differs by up to {small(row.loss_difference or 0)} (relative)"
                f"{_final_losses(row, reference)}.",
            )
        elif row not in same:
            alike = alike_until(row, reference)
            but, start = ("and", f"lies within {small(SAME_CURVE)} of") if alike else ("but", "departs from")
            end = f" for {_first(alike)}, then departs" if alike else ""
            yield Sentence(
                topic="loss",
                text=f"{_quoted(row)} sees the same examples in the same updates, {but} its training loss {start} "
                f"that of {_quoted(reference)}{end} by up to {small(row.loss_difference or 0)} (relative)"
                f"{_final_losses(row, reference)}.",
            )


def _other_scores(comparison: Comparison) -> Iterator[Sentence]:
    """Say whose losses are not compared, as they are of other predictions (a tail of the answers, a tokenizer)."""
    for row in comparison.measured:
        if not row.scores_like_reference:
            text = f"{_quoted(row)} is scored on other predictions than {_quoted(comparison.reference)} "
            text += f"({listed(row.settings)}), so their losses are not compared."
            yield Sentence(topic="loss", text=text)


def _final_losses(row: Row, reference: Row) -> str:
    """Compare the held-out losses at the end, which tell most where training losses drifted apart."""
    if row.held_out is None or reference.held_out is None or row.held_out_ratio is None:
        return ""
    return f"; held-out at the end {row.held_out:.4f} against {reference.held_out:.4f} ({change(row.held_out_ratio)})"


def _peers(subject: Row, comparison: Comparison) -> Iterator[Sentence]:
    rows = [row for row in comparison.measured if row.is_peer]
    ratios = [(row, comparison.speed_of(subject, row)) for row in rows]
    against = sorted(((row, r) for row, r in ratios if r is not None), key=lambda pair: pair[1].estimate)
    if not against:
        return
    (closest, ratio), name = against[0], _quoted(subject)
    if all(other.above_one for _, other in against):
        some_failed = " that ran" if any(row.is_peer and row.failure for row in comparison.rows) else ""
        others = {1: "the one other trainer", 2: "both other trainers"}.get(
            len(against), f"all {len(against)} other trainers"
        )
        text = f"{name} is faster than {others}{some_failed}: {ratio.text()} as fast as {_quoted(closest)}, the closest"
        keeper = next(((row, r) for row, r in against if row.keeps_updates), None)
        if not closest.keeps_updates and keeper is not None:
            text += f", and {keeper[1].text()} as fast as {_quoted(keeper[0])}, the closest with the same updates"
    elif ratio.below_one:
        text = f"{_quoted(closest)} is faster than {name}: {ratio.inverse().text()} as fast"
    elif ratio.low is None:
        text = f"In the one round there is, {name} was {ratio.text()} as fast as {_quoted(closest)}, the closest other "
        text += "trainer"
    else:
        text = f"{name} and {_quoted(closest)}, the closest other trainer, are not measurably apart: {ratio.text()}"
    yield Sentence(topic="peers", text=f"{text}.")
    unaided = [_quoted(row) for row in rows if TRAINERS[row.trainer].is_flat and row.attention == "sdpa"]
    if unaided:
        text = f"Without flash-attention, the kernel for flat batches, {listed(unaided)} ran with sdpa."
        yield Sentence(topic="peers", text=text)


def _waiting(subject: Row, comparison: Comparison) -> Iterator[Sentence]:
    """Say how long ranks wait for each other, with the variant spoken of and with those that wait least and most."""
    if subject.waiting is None:
        return
    others = sorted(
        (waiting, _quoted(row))
        for row in comparison.measured
        if row is not subject and (waiting := row.waiting) is not None
    )
    ranks, share = comparison.ranks, f"{subject.waiting:.1%}"
    text = f"With {_quoted(subject)}, the mean of {ranks} ranks waits for the others {share} of the time"
    if len(others) == 1:
        text += f", with {others[0][1]} {others[0][0]:.1%}"
    elif others:
        (least, first), (most, last) = others[0], others[-1]
        text += f", with the rest from {least:.1%} ({first}) to {most:.1%} ({last})"
    yield Sentence(topic="ranks", text=f"{text}.")


def _packing(subject: Row, comparison: Comparison) -> Iterator[Sentence]:
    """Say what packing over the whole epoch gains and changes, of our fastest and of the others', then of the rest."""
    packers = [row for row in comparison.measured if not row.keeps_updates]
    rest = [row for row in packers if not comparison.is_own(row) and row is not subject]  # those have their sentences
    for is_peer in (False, True):
        row = fastest([row for row in packers if row.is_peer is is_peer])
        speed = comparison.speed_of(row, subject) if row is not None else None
        if row is None or speed is None or row not in rest:
            continue
        rest.remove(row)
        parts = [f"{_quoted(row)} {_speed(speed, _quoted(subject))}", *_updates(row, comparison.reference)]
        yield Sentence(topic="packing", text=", and ".join(parts) + _losses(row, comparison) + ".")
    if rest and len(packers) <= MANY_PACKERS:
        each = listed([f"{_quoted(row)} {_in_short(row, subject, comparison)}" for row in rest])
        text = f"Next to {_quoted(subject)}, the rest of those that make other updates: {each}."
        yield Sentence(topic="packing", text=text)


def _in_short(row: Row, subject: Row, comparison: Comparison) -> str:
    """Write `1.20x (1.18-1.22) as fast (held-out loss +1.0% after the same examples)`."""
    speed, ratio = comparison.speed_of(row, subject), row.held_out_ratio
    text = f"{speed.text()} as fast" if speed is not None else "not timed in the same rounds"
    if ratio is None or row.ends_with_reference is None:
        return text
    said = f"held-out loss after the same {row.ends_with_reference} {change(ratio)}"
    return f"{text} ({', '.join([said, *row.settings])})"


def _speed(speed: Ratio, other: str) -> str:
    if speed.low is None:
        return f"was {speed.text()} as fast as {other}"
    if speed.above_one:
        return f"is faster than {other}, {speed.text()}"
    if speed.below_one:
        return f"is slower than {other}, {speed.text()}"
    return f"is not measurably faster or slower than {other}, {speed.text()}"


def _updates(row: Row, reference: Row) -> Iterator[str]:
    if row.updates is None or not reference.updates:
        return
    if row.updates == reference.updates:
        sizes = [f"{each.examples_per_update[1]:.3g}" for each in (row, reference) if each.examples_per_update]
        other = f", of {sizes[0]} examples instead of {sizes[1]}" if len({*sizes}) == 2 else " of other examples"
        yield f"makes the same number of updates ({row.updates:,}){other}"
    elif row.updates < reference.updates:
        yield f"makes {reference.updates / row.updates:.1f}x fewer updates ({row.updates:,} for {reference.updates:,})"
    else:
        yield f"makes {row.updates / reference.updates:.1f}x more updates ({row.updates:,} for {reference.updates:,})"


def _losses(row: Row, comparison: Comparison) -> str:
    ratio, reference, axis = row.held_out_ratio, comparison.reference, row.ends_with_reference
    if ratio is None or axis is None or row.held_out is None or reference.held_out is None:
        return ""
    with_them = f"with {listed(row.settings)}, " if row.settings else ""
    text = (
        f"; {with_them}after the same {axis} its held-out loss is {row.held_out:.4f} against {reference.held_out:.4f}"
    )
    text += f" ({change(ratio)})"
    equal = row.equal_updates
    if equal is not None and axis == "examples" and row.updates != reference.updates:
        text += f", after the same {equal.update:,} updates {equal.loss:.4f} against {equal.reference:.4f}"
    dropped = (row.tokens_dropped or 0) - (reference.tokens_dropped or 0)
    return text + (f"; it dropped {dropped:,} tokens" if dropped > 0 else "")


def _recommendation(comparison: Comparison) -> Iterator[Sentence]:
    recommended = comparison.manifest.get("recommendation")
    if not recommended:
        return
    strategy = recommended["strategy"]
    rows = [row for row in comparison.ours if comparison.differs_in_strategy_alone(row)]
    chosen = next((row for row in rows if row.strategy == strategy), None)
    with_others = any(row.strategy == strategy for row in comparison.ours)
    start = f"From the lengths alone, `packtrain plan --recommend` picks `{strategy}`"
    if chosen is None:
        but = ", which ran with settings of its own only" if with_others else ", which was not among the variants"
        yield Sentence(topic="recommendation", text=f"{start}{but}.")
        return
    faster = []
    for row in rows:
        ratio = comparison.speed_of(row, chosen) if row is not chosen else None
        if ratio is not None and ratio.above_one:
            faster.append((ratio, _quoted(row)))
    if faster:
        ratio, name = max(faster, key=lambda pair: pair[0].estimate)
        yield Sentence(topic="recommendation", text=f"{start}: wrong here, {name} was faster, {ratio.text()}.")
    elif comparison.pairs < FEW:
        yield Sentence(topic="recommendation", text=f"{start}; the rounds are too few to say whether that was right.")
    else:
        yield Sentence(
            topic="recommendation",
            text=f"{start}: right, no variant with the same updates was measurably faster.",
        )


def _failures(comparison: Comparison) -> Iterator[Sentence]:
    for row in comparison.rows:
        if row.failure:
            yield Sentence(topic="failure", text=f"{_quoted(row)} failed: {row.failure}")


def _caution(comparison: Comparison) -> Iterator[Sentence]:
    if comparison.pairs == 1:
        text = "There is one timed round, which gives no confidence intervals; three `seeds` or more do."
        yield Sentence(topic="caution", text=text)
    elif 1 < comparison.pairs < FEW:
        pairs = f"{comparison.pairs} {'rounds' if comparison.seeds < 2 else 'seeds'}"
        yield Sentence(topic="caution", text=f"With {pairs} the intervals are wide; five `seeds` narrow them.")


def _quoted(row: Row) -> str:
    return f"`{row.name}`"


def listed(names: Sequence[str]) -> str:
    """Join names: `a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def change(ratio: Ratio) -> str:
    """Write a ratio of losses with its interval: `+13.9%, +12.1 to +15.8`, or `+13.9%, one seed`."""
    return f"{signed(ratio.estimate - 1)}, {interval_of(ratio) or 'one seed'}"


def interval_of(ratio: Ratio) -> str | None:
    """Write the interval of a relative change, in per cent: `+12.1 to +15.8`; None where there is none."""
    if ratio.low is None or ratio.high is None:
        return None
    return f"{100 * (ratio.low - 1):+.1f} to {100 * (ratio.high - 1):+.1f}"


def changes(ratio: Ratio) -> list[float]:
    """Return the relative change, and the ends of its interval where it has one."""
    return [value - 1 for value in (ratio.estimate, ratio.low, ratio.high) if value is not None]


def small(value: float) -> str:
    """Write a relative difference: `2e-6` when tiny, else per cent."""
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-") if value < 1e-3 else f"{value:.1%}"


def signed(value: float) -> str:
    """Write a relative change: `+13.9%`."""
    return "0%" if abs(value) < 5e-4 else f"{value:+.1%}"
