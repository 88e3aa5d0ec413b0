"""Tails: what a diffusion language model learns to put behind an answer.

A masked-diffusion model writes on a canvas whose length is chosen before the answer is known, so it must
learn what the rest of the canvas looks like. The tail is that rest: supervised, attended, part of its example.

    kind       prompt   canvas of 9, answer a b c              E is eos, 0..K-1 are special pad tokens
    none       q q      a b c E                                the canvas is just long enough
    eos        q q      a b c E E E E E E                      what LLaDA and Dream were tuned with
    single     q q      a b c E 0 0 0 0 0
    rainbow    q q      a b c E 0 1 2 0 1                      K = 3; the cycle starts behind the eos
    random     q q      a b c E 2 0 0 1 2                      K = 3; drawn from (seed, example)

With one token for the whole tail, that token is the safest bet far to the right, is written there first, and
each one written moves the believed end of the answer to the left. A cycle can only be bet on knowing where
it began (Kim et al., "Rainbow Padding", ICLR 2026, arXiv:2510.03680).

The canvas is how many tokens answer, eos and tail have together:

    fixed        `size`
    multiple_of  the next multiple of `size`
    sampled      uniform between answer + eos and `size`, drawn from (seed, example)
    batch_max    up to the longest document of the update; the plan decides it, see `TailedExamples.gather`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from packtrain.data.examples import Examples
from packtrain.data.formats import IGNORED
from packtrain.data.report import DataReport
from packtrain.errors import DataError
from packtrain.objectives.examples import DerivedExamples

PROMPT, CONTENT, EOS, TAIL = 0, 1, 2, 3  # the parts of a document
_CANVAS, _FILL = 0x63616E76, 0x66696C6C  # "canv", "fill": keep these draws apart from others of the same seed
_TOKENS_AT_ONCE = 1 << 22
Kind = Literal["none", "eos", "single", "rainbow", "random", "void"]


@dataclass(frozen=True, kw_only=True)
class Tail:
    """The tokens that follow an answer.

    Attributes:
        kind: see the module's table.
        eos_token_id: the end of an answer; exactly one follows every answer.
        pad_token_ids: one for `single` and `void`, K for `rainbow` and `random`, none for `eos` and `none`. No answer
            may contain them.
    """

    kind: Kind
    eos_token_id: int
    pad_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        expected = {"none": "0", "eos": "0", "single": "1", "void": "1"}.get(self.kind, "2 or more")
        count = len(self.pad_token_ids)
        if not (count >= 2 if expected == "2 or more" else count == int(expected)):
            what = f"a tail of kind {self.kind!r} must have {expected} pad tokens"
            raise DataError(what, key="objective.pad_tokens", value=count)
        if len({self.eos_token_id, *self.pad_token_ids}) != count + 1:
            what = "eos and pad tokens of a tail must all differ"
            raise DataError(what, key="objective.pad_tokens", value=(self.eos_token_id, *self.pad_token_ids))

    @property
    def hides_end(self) -> bool:
        """Whether the eos is masked in every example, whatever the noise level, so that no model reads one."""
        return self.kind == "void"

    @property
    def is_sampled(self) -> bool:
        """Whether the tail is written when answers are sampled."""
        return self.kind != "void"

    def tokens(self, length: int, *, seed: int = 0, example_id: int = 0) -> np.ndarray:
        """Returns the eos and what follows it: int64 `[length]`. Longer tails of an example begin with its shorter ones."""
        if self.kind == "none":
            assert length <= 1, "a tail of kind 'none' is the eos alone"
        tokens = np.full(length, self.eos_token_id, dtype=np.int64)
        pads = np.array(self.pad_token_ids, dtype=np.int64)
        if len(pads) == 0:
            return tokens
        if self.kind == "random":
            choice = np.random.default_rng([_FILL, seed, example_id]).random(max(length - 1, 0))
            tokens[1:] = pads[(choice * len(pads)).astype(np.int64)]
        else:
            tokens[1:] = pads[np.arange(length - 1) % len(pads)]
        return tokens


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """The room that an answer gets; see the module's table.

    Attributes:
        policy: the rule.
        size: tokens; None for `batch_max`, which has no fixed size.
    """

    policy: Literal["fixed", "multiple_of", "sampled", "batch_max"]
    size: int | None = None

    def __post_init__(self):
        if (self.size is None) != (self.policy == "batch_max") or (self.size is not None and self.size < 1):
            fix = "leave it out for batch_max, and give a number of tokens for the others"
            raise DataError(
                f"does not go with the canvas policy {self.policy!r}",
                key="objective.canvas_size",
                value=self.size,
                fix=fix,
            )

    def lengths(self, needed: np.ndarray, *, seed: int = 0) -> np.ndarray:
        """Returns the canvas of each example.

        Args:
            needed: int64 `[n]`, tokens of the answer and its eos.

        Returns:
            int64 `[n]`, never below `needed`. For `batch_max` the smallest canvas: `needed`.

        Raises:
            DataError: an answer does not fit.
        """
        if self.policy == "batch_max":
            return needed
        if self.policy == "multiple_of":
            return -(-needed // self.size) * self.size
        if len(too_long := np.flatnonzero(needed > self.size)):
            first = int(too_long[0])
            what = f"{len(too_long):,} answers do not fit; the first is example {first} with {needed[first]} tokens"
            fix = f"raise it to {needed.max()} or more"
            raise DataError(what, key="objective.canvas_size", value=self.size, fix=fix)
        if self.policy == "fixed":
            return np.full_like(needed, self.size)
        draw = np.random.default_rng([_CANVAS, seed]).random(len(needed))
        return needed + (draw * (self.size - needed + 1)).astype(needed.dtype)


class TailedExamples(DerivedExamples):
    """Examples with their tails, as a plan and a collator for diffusion models need them.

    What follows the last supervised token of an example is cut off, so are blanks that a template puts behind its
    last eos (ChatML's newline, which a causal model does learn) and ends it already has; then exactly one eos and the
    tail are added.

    Args:
        examples: prompt and answer of each; an answer that was cut to `max_length` would get an end it
            does not have, so they must not have been truncated or split.
        tail: which tokens.
        canvas: how many; None for the kind `none`, which adds the eos only.
        seed: of the draws of `random` tails and `sampled` canvases.

    Attributes:
        contents: int64 `[n]`, tokens of prompt and answer, without any eos at the end.
        answers: int64 `[n]`, tokens of the (last) answer among them.
        lengths: int64 `[n]`, tokens of prompt and canvas: what a plan needs.
        supervised: int64 `[n]`, supervised tokens of the same.

    Raises:
        DataError: truncated examples, answers longer than their canvas, or pad tokens within an answer.
    """

    def __init__(self, examples: Examples, tail: Tail, canvas: Canvas | None = None, *, seed: int = 0):
        if (tail.kind == "none") != (canvas is None):
            fix = "leave the canvas out for `none`, and choose one for every other tail"
            raise DataError(f"does not go with the tail {tail.kind!r}", key="objective.canvas", value=canvas, fix=fix)
        report = examples.report
        if report.truncated_rows or report.split_rows:
            cut = report.truncated_rows + report.split_rows
            fix = "drop them (`data.overflow: drop`) or raise `data.max_length`"
            raise DataError("a truncated answer has no end to learn", key="data.overflow", value=cut, fix=fix)
        self.examples, self.tail, self.canvas, self.seed = examples, tail, canvas, seed
        self.contents, self.answers, supervised = _measure(examples, tail)
        canvases = self.answers + 1
        if canvas is not None:
            canvases = canvas.lengths(canvases, seed=seed)
        self.lengths = self.contents + canvases - self.answers
        self.supervised = supervised + canvases - self.answers
        self.fingerprint = f"{examples.fingerprint} {tail} {canvas} {seed}"

    @property
    def report(self) -> DataReport:
        """The examples' own report with the tails counted in."""
        tokens, added = int(self.lengths.sum()), int((self.lengths - self.contents).sum())
        kind = self.tail.kind + (f" ({len(self.tail.pad_token_ids)})" if len(self.tail.pad_token_ids) > 1 else "")
        policy = "" if self.canvas is None else f", canvas {self.canvas.policy}"
        note = f"tails: {kind}{policy}: {added:,} of {tokens:,} tokens are eos and tail"
        old = self.examples.report
        supervised = int(self.supervised.sum())
        return replace(old, tokens=tokens, supervised_tokens=supervised, notes=(*old.notes, note))

    def gather(
        self, example_ids: Sequence[int] | np.ndarray, starts: np.ndarray | None = None, stops: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns documents end to end, as `Examples.gather`.

        Args:
            example_ids: int `[S]`.
            starts: int `[S]`, all 0: a canvas is never cut.
            stops: int `[S]`, length of each document. More than its own `lengths` means a longer tail, which is
                how `batch_max` is asked for.
        """
        ids = np.asarray(example_ids, dtype=np.int64)
        assert starts is None or not np.any(starts), "a canvas can't be cut"
        lengths = self.lengths[ids] if stops is None else np.asarray(stops, dtype=np.int64)
        contents = self.contents[ids]
        assert (lengths > contents).all(), "every answer has an eos"
        content_ids, content_labels = self.examples.gather(ids, np.zeros_like(ids), contents)
        place = _places(lengths, contents)
        input_ids = np.empty(int(lengths.sum()), dtype=np.int64)
        labels = np.empty_like(input_ids)
        input_ids[place], labels[place] = content_ids, content_labels
        fills = [
            self.tail.tokens(int(length), seed=self.seed, example_id=int(example_id))
            for example_id, length in zip(ids, lengths - contents, strict=True)
        ]
        input_ids[~place] = labels[~place] = np.concatenate(fills)
        return input_ids, labels


def parts_of(input_ids: np.ndarray, labels: np.ndarray, lengths: np.ndarray, tail: Tail) -> np.ndarray:
    """Returns PROMPT, CONTENT, EOS or TAIL for each token of documents that `TailedExamples.gather` made: int8 `[T]`.

    No answer ends in an eos or contains a pad token, so the tail is the run of such tokens at the document's end.
    """
    ends = np.isin(input_ids, (tail.eos_token_id, *tail.pad_token_ids)) & (labels != IGNORED)
    contents = _last_where(~ends, lengths) + 1  # [S]
    parts = np.where(labels == IGNORED, PROMPT, CONTENT).astype(np.int8)
    behind = ~_places(lengths, contents)
    parts[behind] = TAIL
    firsts = np.cumsum(lengths) - lengths + contents  # [S]
    parts[firsts[contents < lengths]] = EOS
    return parts


def _measure(examples: Examples, tail: Tail) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts (tokens kept, of these the answer's last run, of these supervised), int64 `[n]` each, in chunks."""
    kept, answers, supervised = (np.zeros(len(examples), dtype=np.int64) for _ in range(3))
    bounds = np.cumsum(examples.lengths, dtype=np.int64) // _TOKENS_AT_ONCE
    blanks = examples.blanks
    for ids in np.split(np.arange(len(examples)), np.flatnonzero(np.diff(bounds)) + 1):
        lengths = examples.lengths[ids].astype(np.int64) - blanks[ids]
        input_ids, labels = examples.gather(ids, stops=lengths)
        learnt = labels != IGNORED
        contents = _last_where(learnt & (input_ids != tail.eos_token_id), lengths) + 1
        first = _first_where(learnt, lengths)
        kept[ids] = np.maximum(contents, first)  # an answer of eos alone is an empty answer
        inside = _places(lengths, kept[ids])
        supervised[ids] = _count(learnt & inside, lengths)
        gap = _last_where(~learnt & inside, lengths)  # the last unsupervised token before the answer ends
        answers[ids] = kept[ids] - gap - 1
        if np.isin(input_ids, tail.pad_token_ids).any():
            document = np.repeat(ids, lengths)[np.isin(input_ids, tail.pad_token_ids)][0]
            fix = "name reserved tokens that no text contains, or leave them out to add new ones"
            what = f"example {document} contains a pad token of the tail"
            raise DataError(what, key="objective.pad_tokens", value=tail.pad_token_ids, fix=fix)
    return kept, answers, supervised


def _places(lengths: np.ndarray, heads: np.ndarray) -> np.ndarray:
    """Returns bool `[T]`: whether a token is among the first `heads[d]` of its document d."""
    starts = np.cumsum(lengths) - lengths
    position = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
    return position < np.repeat(heads, lengths)


def _last_where(flags: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Finds the position within each document of its last True, -1 where there is none: int64 `[S]`."""
    starts = np.cumsum(lengths) - lengths
    position = np.arange(len(flags)) - np.repeat(starts, lengths)
    return np.maximum.reduceat(np.where(flags, position, -1), starts)


def _first_where(flags: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Finds the position within each document of its first True, its length where there is none: int64 `[S]`."""
    starts = np.cumsum(lengths) - lengths
    position = np.arange(len(flags)) - np.repeat(starts, lengths)
    return np.minimum.reduceat(np.where(flags, position, np.repeat(lengths, lengths)), starts)


def _count(flags: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.add.reduceat(flags.astype(np.int64), np.cumsum(lengths) - lengths)
