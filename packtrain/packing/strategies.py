"""The strategies: which examples lie together in memory. One function and one line in `STRATEGIES` each.

Step scope, the layouts of one update's examples over ranks and micro-steps:

    function(lengths, *, micro_steps, ranks, capacity, cost) -> micro_steps * ranks index arrays

  `lengths` are those of the step's examples, in the order of the shuffle. Array `m * ranks + r` is what rank r computes
  in micro-step m; it may be empty (a micro-batch of padding stands in). Each index occurs exactly once. A function that
  can fill the numbers of tokens to which micro-batches are padded (`batching.shapes`) takes `sizes` too.

Epoch scope, the packs of a whole epoch:

    function(lengths, capacity, key) -> a sequence of index arrays

  Each index occurs exactly once and no pack exceeds `capacity` tokens. A function that can keep packs to a number of
  documents takes `max_documents` too. A strategy that splits examples returns rows
  (index, start, stop) instead. `key` is a 64-bit integer for seeded choices, another one in every epoch. The plan
  shuffles the order of the packs; with `by_order` the lengths arrive in the order of the epoch's shuffle.

A recipe may name any other function, `my_package.my_module:function`: it is taken as epoch scope; or the name of a
`Strategy`, which says its scope and layout itself. The results of both are checked. recipes/README.md has examples.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from packtrain.errors import PlanError
from packtrain.imports import import_module
from packtrain.packing.balance import balanced
from packtrain.packing.cost import Cost
from packtrain.packing.lengths import histogram
from packtrain.packing.optimal import lower_bound, near_optimal
from packtrain.packing.packers import best_fit_decreasing, first_fit_decreasing
from packtrain.packing.packs import ListedPacks, PatternPacks, sort_by_length
from packtrain.packing.phases import contradictions_of
from packtrain.packing.shuffle import permute
from packtrain.recipe.fields import did_you_mean
from packtrain.recipe.sections import Settings, Verdicts

OPEN_PACKS = 16  # packs among which `random` chooses


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """The rule of a strategy, and how its micro-batches are laid out.

    Attributes:
        function: see the module's docstring.
        scope: "step" lays out the examples of one update, "epoch" packs the whole epoch first.
        layout: "padded" `[B, T]` or "flat" `[1, T]`.
        padded_to: of a padded layout, the width of a micro-batch.
        splits: whether examples are cut.
        by_order: epoch scope; the packs depend on the order of the examples.
        pack_order: epoch scope; "shuffled", or "cost": an update's packs are neighbours in cost. The ranks are then level
            whatever the data, at the price of the mix: updates of long documents only, and of short ones only.
    """

    function: Callable
    scope: Literal["step", "epoch"] = "epoch"
    layout: Literal["padded", "flat"] = "flat"
    padded_to: Literal["max_length", "longest"] | None = None
    splits: bool = False
    by_order: bool = False
    pack_order: Literal["shuffled", "cost"] = "shuffled"


def equal_counts(lengths: np.ndarray, *, micro_steps: int, ranks: int, capacity: int, cost: Cost) -> list[np.ndarray]:
    """Takes neighbours of the shuffle, the same number in every micro-batch (differing by one where it must).

    >>> equal_counts(np.array([5, 9, 2, 7, 1]), micro_steps=2, ranks=1, capacity=99, cost=Cost())
    [array([0, 1, 2]), array([3, 4])]
    """
    return np.array_split(np.arange(len(lengths)), micro_steps * ranks)


def sorted_groups(lengths: np.ndarray, *, micro_steps: int, ranks: int, capacity: int, cost: Cost) -> list[np.ndarray]:
    """Sorts by length and cuts where the largest padded micro-batch (rows x longest) is smallest.

    Found by bisection on that area: a group is filled from the longest remaining example on while rows x longest stays
    within the area, which needs the fewest groups for it. The strongest padded baseline there is.

        >>> [part.tolist() for part in
        ...  sorted_groups(np.array([9, 2, 2, 8, 3]), micro_steps=2, ranks=1, capacity=99, cost=Cost())]
        [[0, 3], [4, 1, 2]]
    """
    groups = micro_steps * ranks
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    descending = lengths[order].tolist()

    def cuts(area: int) -> list[int]:
        ends, place = [], 0
        while place < len(descending):
            place += max(1, area // descending[place]) if descending[place] else len(descending)
            ends.append(min(place, len(descending)))
        return ends

    low, high = (descending[0] if descending else 0), sum(descending[:1]) * len(descending)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(cuts(middle)) <= groups else (middle + 1, high)
    parts = np.split(order, cuts(low)[:-1])
    return parts + [order[:0]] * (groups - len(parts))


def bfd(lengths: np.ndarray, capacity: int, key: int, max_documents: int | None = None) -> PatternPacks:
    """Packs by best-fit decreasing: the longest first, each into the fullest pack that still takes it."""
    return _pattern_packs(lengths, key, capacity, max_documents, best_fit_decreasing)


def ffd(lengths: np.ndarray, capacity: int, key: int, max_documents: int | None = None) -> PatternPacks:
    """Packs by first-fit decreasing: the longest first, each into the pack opened first that still takes it."""
    return _pattern_packs(lengths, key, capacity, max_documents, first_fit_decreasing)


def optimal(lengths: np.ndarray, capacity: int, key: int, max_documents: int | None = None) -> PatternPacks:
    """Packs by best-fit decreasing; where it leaves more than 0.1% to gain, column generation (see `optimal.py`)."""
    return _pattern_packs(lengths, key, capacity, max_documents, near_optimal)


def _pattern_packs(lengths, key, capacity, max_documents, algorithm) -> PatternPacks:
    counts = histogram(lengths)
    bound = lower_bound(counts, capacity, max_documents)
    patterns = algorithm(counts, capacity, max_documents)
    if isinstance(patterns, tuple):  # with its own bound
        patterns, bound = patterns
    return PatternPacks(
        patterns=patterns, counts=counts, by_length=sort_by_length(lengths, counts), key=key, bound=bound
    )


def next_fit(lengths: np.ndarray, capacity: int, key: int, max_documents: int | None = None) -> ListedPacks:
    """Keeps the order: a pack takes neighbours until the next one doesn't fit.

    >>> next_fit(np.array([3, 3, 4, 6, 1]), 10, key=0)[:]
    [array([0, 1, 2]), array([3, 4])]
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    following = np.searchsorted(ends, ends - lengths + capacity, side="right")
    if max_documents:
        following = np.minimum(following, np.arange(len(lengths)) + max_documents)
    following, offsets = following.tolist(), [0]
    while offsets[-1] < len(lengths):
        offsets.append(following[offsets[-1]])
    return ListedPacks(items=np.arange(len(lengths)), offsets=np.array(offsets))


def random(lengths: np.ndarray, capacity: int, key: int, max_documents: int | None = None) -> ListedPacks:
    """Puts each example, in the given order, into one of `OPEN_PACKS` open packs chosen at random among those with room.

    When none has room, the fullest is closed and a new one opened. Loose packs with a random mix: what packing costs
    when nothing is optimised.
    """
    choices = permute(np.arange(len(lengths)), 1 << 31, key).tolist()  # distinct 31-bit random numbers
    packs: list[list[int]] = []
    opened: list[list] = []  # [tokens left, pack]
    for index, (length, choice) in enumerate(zip(lengths.tolist(), choices, strict=True)):
        roomy = [pack for pack in opened if pack[0] >= length and len(pack[1]) != max_documents]
        if not roomy:
            if len(opened) == OPEN_PACKS:
                opened.remove(min(opened, key=lambda pack: pack[0]))
            opened.append([capacity, []])
            packs.append(opened[-1][1])
            roomy = opened[-1:]
        pack = roomy[choice % len(roomy)]
        pack[0] -= length
        pack[1].append(index)
    return ListedPacks.of(packs)


def wrapped(lengths: np.ndarray, capacity: int, key: int) -> ListedPacks:
    """Concatenates and cuts every `capacity` tokens: full packs, and documents split between them.

    Returns rows (index, start, stop). The pieces of a split document are isolated from each other.

        >>> wrapped(np.array([3, 5, 2]), 4, key=0)[:]
        [array([[0, 0, 3],
               [1, 0, 1]]), array([[1, 1, 5]]), array([[2, 0, 2]])]
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.arange(capacity, total, capacity)
    edges = np.unique(np.concatenate([[0], ends, cuts]))  # pieces of no tokens vanish here
    starts, stops = edges[:-1], edges[1:]
    index = np.searchsorted(ends, starts, side="right")
    begin = ends[index] - lengths[index]
    items = np.stack([index, starts - begin, stops - begin], axis=1)
    offsets = np.searchsorted(starts, np.concatenate([[0], cuts, [total]]))
    return ListedPacks(items=items, offsets=offsets if total else np.zeros(1, np.int64))


STRATEGIES: dict[str, Strategy] = {
    "pad_max": Strategy(function=equal_counts, scope="step", layout="padded", padded_to="max_length"),
    "pad_longest": Strategy(function=equal_counts, scope="step", layout="padded", padded_to="longest"),
    "group_by_length": Strategy(function=sorted_groups, scope="step", layout="padded", padded_to="longest"),
    "padding_free": Strategy(function=equal_counts, scope="step"),
    "balanced": Strategy(function=balanced, scope="step"),
    "bfd": Strategy(function=bfd),
    "ffd": Strategy(function=ffd),
    "optimal": Strategy(function=optimal),
    "global_balance": Strategy(function=bfd, pack_order="cost"),
    "next_fit": Strategy(function=next_fit, by_order=True),
    "random": Strategy(function=random, by_order=True),
    "wrapped": Strategy(function=wrapped, by_order=True, splits=True),
}


def resolve_strategy(name: str) -> Strategy:
    """Returns the strategy of that name, or the function or Strategy that `package.module:name` names."""
    if not isinstance(name, str):
        fix = "write it into a file, and name it as my_module:function, where every rank and a resumed run find it"
        raise PlanError("must be the name of a strategy", key="strategy", value=name, fix=fix)
    if name in STRATEGIES:
        return STRATEGIES[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        near = did_you_mean(name, STRATEGIES)
        raise PlanError(
            "there is no such strategy",
            key="strategy",
            value=name,
            fix=(f"did you mean {near!r}? " if near else "")
            + f"Known: {', '.join(STRATEGIES)}; or my_package.my_module:function; "
            "for rows that can't be counted, packtrain.PackedStream in your own trainer",
        )
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise PlanError(
            f"could not import the strategy: {error}",
            key="strategy",
            value=name,
            fix="name an importable function as my_package.my_module:function",
        ) from error
    if isinstance(found, Strategy):
        return found if found in STRATEGIES.values() else checked(found, name)
    if not callable(found):
        fix = "name a function of (lengths, capacity, key), which returns lists of indices, or a Strategy"
        raise PlanError("is not a function", key="strategy", value=name, fix=fix)
    if not _takes_lengths(found):  # `os:system`, say, which would be called
        what = "is not a function of (lengths, capacity, key)"
        fix = "name a function with these three arguments, which returns lists of indices, or a Strategy"
        raise PlanError(what, key="strategy", value=name, fix=fix)
    return checked(Strategy(function=found, by_order=True), name)


def _takes_lengths(function: Callable) -> bool:
    """Returns whether a function takes three arguments in their order, and can't do with fewer."""
    try:
        signature = inspect.signature(function)
        signature.bind(None, None, None)
    except (TypeError, ValueError):  # other arguments; or written in C, and silent about them
        return False
    needed = [one for one in signature.parameters.values() if one.default is one.empty and one.kind <= 1]
    takes_any = any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in signature.parameters.values())
    return len(needed) == 3 or (takes_any and not inspect.isbuiltin(function))


def checked(rule: Strategy, name: str) -> Strategy:
    """Returns a strategy with the result of its function checked: every token exactly once, packs within the capacity.

    The function gets a copy of the lengths, int64 `[n]`, whatever integers they are stored as. It is called twice, as one
    that draws from a global generator gives ranks and resumed runs other packs than this one.
    """
    function = rule.function

    @functools.wraps(function)
    def packs_of(lengths: np.ndarray, capacity: int, key: int, **more: Any) -> ListedPacks | PatternPacks:
        lengths = np.array(lengths, dtype=np.int64)
        found = _listed(lambda: function(lengths.copy(), capacity, key, **more), name)
        again = _listed(lambda: function(lengths.copy(), capacity, key, **more), name)
        packs = _written_down(found)
        _check_repeatable(packs, _written_down(again), name, "draw what is random from `np.random.default_rng(key)`")
        if rule.splits:
            tokens = _tokens_of_pieces(packs.items, lengths, name)
        else:
            _check_indices(packs.items, len(lengths), name)
            tokens = lengths[packs.items]
        sums = np.add.reduceat(np.append(tokens, 0), packs.offsets[:-1]) if len(packs) else np.zeros(0, np.int64)
        if len(sums) and sums.max() > capacity:  # no listed pack is empty
            what = f"the strategy {name!r} made a pack of {sums.max()} tokens, more than the capacity of {capacity}"
            raise PlanError(what, fix="begin another pack where `lengths` add up to more than `capacity`")
        most = more.get("max_documents")
        if most and len(packs) and (held := int(np.diff(packs.offsets).max())) > most:
            what = f"the strategy {name!r} made a pack of {held} documents, more than max_documents = {most}"
            raise PlanError(what, fix="begin another pack after `max_documents` examples")
        return found

    @functools.wraps(function)
    def parts_of(lengths: np.ndarray, *, micro_steps: int, ranks: int, **more: Any) -> list[np.ndarray]:
        lengths, number = np.array(lengths, dtype=np.int64), micro_steps * ranks
        parts = list(function(lengths.copy(), micro_steps=micro_steps, ranks=ranks, **more))
        again = list(function(lengths.copy(), micro_steps=micro_steps, ranks=ranks, **more))
        if len(parts) != number:
            what = f"the strategy {name!r} must return {micro_steps} x {ranks} micro-batches, and returned {len(parts)}"
            raise PlanError(what, fix="return micro_steps * ranks lists of indices; some may be empty")
        listed = _listed(lambda: parts, name)
        assert isinstance(listed, ListedPacks), "lists of indices"
        _check_indices(listed.items, len(lengths), name)
        same = [len(part) for part in parts] == [len(part) for part in again]  # an empty one is not listed
        _check_repeatable(
            listed, ListedPacks.of(again if same else []), name, "let nothing random decide how examples are dealt"
        )
        return [np.asarray(part, dtype=np.int64) for part in parts]

    return replace(rule, function=packs_of if rule.scope == "epoch" else parts_of)


def _written_down(packs: ListedPacks | PatternPacks) -> ListedPacks:
    if isinstance(packs, ListedPacks):
        return packs
    items, offsets = packs.take(np.arange(len(packs)))
    return ListedPacks(items=items, offsets=offsets)


def _listed(function: Callable, name: str) -> ListedPacks | PatternPacks:
    try:
        packs = function()
        return packs if isinstance(packs, PatternPacks) else ListedPacks.of(packs)
    except (TypeError, ValueError) as error:
        raise PlanError(
            f"the strategy {name!r} failed: {error}",
            fix="it is called as function(lengths, capacity, key) and returns lists of indices",
        ) from error


def _check_repeatable(packs: ListedPacks, again: ListedPacks, name: str, fix: str) -> None:
    """Raises PlanError unless both calls of a function have returned the same packs."""
    if not (np.array_equal(packs.items, again.items) and np.array_equal(packs.offsets, again.offsets)):
        what = f"the strategy {name!r} returned different packs when it was called again with the same arguments"
        raise PlanError(what, fix=f"let its result depend on its arguments alone: {fix}")


def _check_indices(items: np.ndarray, number: int, name: str) -> None:
    """Raises PlanError unless each index below `number` occurs exactly once."""
    if items.ndim != 1:
        what = f"the strategy {name!r} must return lists of indices, and returned lists of lists"
        raise PlanError(what, fix="to split examples, name a Strategy with splits=True")
    if np.array_equal(np.sort(items), np.arange(number)):
        return
    times = np.bincount(items[(items >= 0) & (items < number)], minlength=number)
    wrong = np.flatnonzero(times != 1)
    beyond = items[(items < 0) | (items >= number)]
    what = f"index {wrong[0]} occurs {times[wrong[0]]} times" if len(wrong) else ""
    fix = f"return every index from 0 to {number - 1} in exactly one pack"
    if len(beyond):
        what = f"index {beyond[0]} is not one of them"
        fix = f"return indices into `lengths`, from 0 to {number - 1}, and not the lengths themselves"
    raise PlanError(f"the strategy {name!r} must place each example exactly once, but {what}", fix=fix)


def _tokens_of_pieces(items: np.ndarray, lengths: np.ndarray, name: str) -> np.ndarray:
    """Returns the tokens of rows (index, start, stop), int64 `[m]`. Raises PlanError unless they are all tokens once."""
    rows = items if items.ndim == 2 and items.shape[1] == 3 else np.zeros((0, 3), np.int64)
    index, starts, stops = rows.T
    if good := len(rows) > 0 and bool(np.all((index >= 0) & (index < len(lengths)) & (starts >= 0) & (starts < stops))):
        begin = (np.cumsum(lengths) - lengths)[index]
        order = np.argsort(begin + starts, kind="stable")
        edges = np.append((begin + starts)[order], lengths.sum()), np.append(0, (begin + stops)[order])
        good = bool(np.all(stops <= lengths[index])) and np.array_equal(*edges)
    if not good:
        what = f"the strategy {name!r} must place every token exactly once, as rows (index, start, stop)"
        raise PlanError(
            what, fix="return for each pack its rows, whose pieces of an example follow each other from 0 on"
        )
    return stops - starts


# ------------------------------------------------------------------------------------- what a strategy contradicts


def _longest_example_fits(settings: Settings, strategy: Strategy) -> Verdicts:
    max_tokens, max_length = settings["batching.max_tokens"], settings["data.max_length"]
    if max_tokens < max_length and not strategy.splits:
        fix = f"raise it to {max_length} or more, or lower `data.max_length` to {max_tokens}"
        yield "batching.max_tokens", f"is below `data.max_length` ({max_length}): an example may not fit", fix


def _noise_goes_by_rows(settings: Settings, strategy: Strategy) -> Verdicts:
    if settings.get("training.neftune_noise_alpha") and strategy.layout != "padded":
        padded = ", ".join(name for name, known in STRATEGIES.items() if known.layout == "padded")
        what = "scales its noise by 1 / sqrt(tokens of a row), and a row of this strategy holds many documents"
        fix = f"leave it out, or choose a strategy with one document per row: {padded}"
        yield "training.neftune_noise_alpha", what, fix


def _shapes_are_flat(settings: Settings, strategy: Strategy) -> Verdicts:
    if settings["batching.shapes"] is not None and strategy.layout != "flat":
        flat = ", ".join(name for name, known in STRATEGIES.items() if known.layout == "flat")
        what = "pads flat micro-batches to a few numbers of tokens, and those of this strategy have rows"
        yield "batching.shapes", what, f"leave it out, or choose a flat strategy: {flat}"


def _phases_follow_each_other(settings: Settings, strategy: Strategy) -> Verdicts:
    if settings["batching.schedule"] is None:
        return
    if strategy.scope == "epoch":
        keeping = ", ".join(name for name, known in STRATEGIES.items() if known.scope == "step")
        what = "changes the examples of an update with their length, and this strategy packs the whole epoch"
        yield "batching.schedule", what, f"leave it out, or choose a strategy that keeps updates: {keeping}"
    phases = [(phase["until"], phase["max_length"]) for phase in map(dict, settings["batching.schedule"])]
    for place, what, fix in contradictions_of(phases):
        yield f"batching.schedule.{place}", what, fix
    if phases[-1][1] >= settings["data.max_length"]:
        what = f"is not below `data.max_length` ({settings['data.max_length']}): no example is longer"
        yield f"batching.schedule.{len(phases) - 1}.max_length", what, "lower it, or leave the phase out"


RULES = (_longest_example_fits, _noise_goes_by_rows, _shapes_are_flat, _phases_follow_each_other)
