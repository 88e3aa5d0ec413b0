"""The questions, each decided by what a run did; needs torch and transformers only.

A question is a function that gets a `Setting` and a directory and returns an `Answer`. Figures are relative, and those
that are zero in exact arithmetic must be below TOLERANCE: all is computed in float32, in another order.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from results.conformance.rows import (
    EOS,
    PACK,
    Job,
    Row,
    alone,
    apart,
    draw,
    even_rows,
    model_directory,
    ragged_rows,
    targets,
)
from results.conformance.watch import Trace, output, rows_of, watch

TOLERANCE = 1e-5
SAID = re.compile(r"trunc|longer|too long|exceed|lengthy|drop|discard|filter|cut|max_length|split", re.IGNORECASE)
Verdict = Literal["yes", "no", "refused", "n/a", "not asked"]


@dataclass(frozen=True)
class Answer:
    """A cell of the table.

    Attributes:
        verdict: `refused` where the trainer says that it can't, and trains nothing; `not asked` where the harness can't ask.
        figure: what was measured, in a few words.
    """

    verdict: Verdict
    figure: str = ""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A trainer with its settings.

    Attributes:
        name: as the table says it.
        packages: what it is made of, for the versions.
        build: makes a trainer for a job; everything that prepares rows is done in it.
        everywhere: whether it supervises all tokens whatever the row says.
        environment: where it runs, a key of `environments.PINNED`; "" for packtrain's.
        not_asked: question -> why it can't be asked.
    """

    name: str
    packages: tuple[str, ...]
    build: Callable[[Job], Any]
    everywhere: bool = False
    environment: str = ""
    not_asked: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Asked:
    """A setting that is being asked, in a directory: `train` runs a job of it, the same job once only."""

    def __init__(self, setting: Setting, directory: Path):
        self.setting, self.directory = setting, directory
        self.done: dict[Job, Trace] = {}
        self.jobs = 0

    def job(self, rows: tuple[Row, ...], **changes: Any) -> Job:
        everywhere = changes.pop("everywhere", self.setting.everywhere)
        self.jobs += 1
        out = self.directory / f"job{self.jobs}"  # the same on every rank
        out.mkdir(exist_ok=True)
        return Job(rows=rows, directory=str(out), everywhere=everywhere, **changes)

    def train(self, job: Job, **options: Any) -> Trace:
        same = dataclasses.replace(job, directory="")
        if options or same not in self.done:
            with output() as said:
                trace = watch(self.setting.build(job), probe=job.probe, **options)
            trace.said = said[0]
            if options:
                return trace
            self.done[same] = trace
        return self.done[same]

    def reference(self, rows: tuple[Row, ...]) -> tuple[float, dict]:
        directory = model_directory(self.job(rows), self.directory)
        return alone(directory, rows, self.setting.everywhere)


# What a batch is


def isolated(asked: Asked, model: str = "llama") -> Answer:
    """Does the loss of a document stay when other documents of its batch change? It must move when the document does."""
    job = asked.job(even_rows(), parts=1, updates=1, everywhere=True, probe=True, model=model)
    trace = asked.train(job)
    if trace.leak is None or trace.sensitivity is None:
        return Answer("n/a", "no batch has two documents")
    if trace.sensitivity < 1e-3:
        raise AssertionError(f"the loss of a document moved by {trace.sensitivity} only when the document changed")
    return judge(trace.leak)


def isolated_hybrid(asked: Asked) -> Answer:
    """The same for a model with short convolutions (LFM2), which see neighbours whatever the attention mask says."""
    return isolated(asked, "lfm2")


def first_labels(asked: Asked) -> Answer:
    """Is no first token of a document a label, which the document before it would predict? Everything is supervised."""
    trace = asked.train(asked.job(even_rows(), parts=1, updates=1, everywhere=True, probe=True))
    starts = [(batch, one) for batch in trace.batches for one in batch.documents if one.example is not None]
    across = sum(bool(batch.targets[one.row, one.start]) for batch, one in starts)
    return Answer("no", f"{across} of {len(starts)}") if across else Answer("yes")


def positions(asked: Asked) -> Answer:
    """Do positions restart at 0 with every document? Where a batch has none, they count from the beginning of its row."""
    trace = asked.train(asked.job(even_rows(), parts=1, updates=1))
    starts = [(batch, one) for batch in trace.batches for one in batch.documents if one.example is not None]
    wrong = sum(
        bool(one.start if batch.positions is None else batch.positions[one.row, one.start]) for batch, one in starts
    )
    return Answer("no", f"{wrong} of {len(starts)}") if wrong else Answer("yes")


def end_tokens(asked: Asked) -> Answer:
    """Is the end token of every row supervised once, with a tokenizer that pads with it? Padding must not be."""
    rows = ragged_rows(8)
    trace = asked.train(asked.job(rows, parts=1, updates=1, pad_is_eos=True))
    ends = sum(int((batch.labels[batch.targets] == EOS).sum()) for batch in trace.batches)
    return Answer("yes") if ends == len(rows) else Answer("no", f"{ends} of {len(rows)}")


def as_given(asked: Asked) -> Answer:
    """In an epoch of rows that fit, is every token seen and are exactly those supervised that the rows say?"""
    rows = ragged_rows(16)
    trace = asked.train(asked.job(rows, everywhere=False))
    tokens = sum(int((~batch.padded).sum()) for batch in trace.batches)
    found = collections.Counter(int(label) for batch in trace.batches for label in batch.labels[batch.targets])
    given = collections.Counter(label for row in rows for label in targets(row, everywhere=False))
    wrong = []
    if (lost := sum(len(row.ids) for row in rows) - tokens) != 0:
        wrong.append(f"{lost} tokens lost" if lost > 0 else f"{-lost} tokens too many")
    if missing := (given - found).total():
        wrong.append(f"{missing} labels lost")
    if more := (found - given).total():
        wrong.append(f"{more} labels too many")
    return Answer("no", ", ".join(wrong)) if wrong else Answer("yes")


def long_rows(asked: Asked) -> Answer:
    """Is a row longer than `max_length` trained whole, or is it said that something of it is not?

    What is said is what a run without that row does not say; an error counts.
    """
    rows = ragged_rows(8)
    long = draw(PACK * 2 + 10, len(rows), seed=5)
    before = asked.train(asked.job(rows))
    try:
        trace = asked.train(asked.job((*rows, long)))
    except Exception as error:
        return Answer("yes", "refused") if SAID.search(str(error)) else _failed(error)
    lost = sum(len(row.ids) for row in (*rows, long)) - sum(int((~batch.padded).sum()) for batch in trace.batches)
    if lost <= 0:
        return Answer("yes", "whole")
    known = {without_figures(line) for line in before.said.splitlines()}
    new = [line for line in re.split(r"[\n\r]", trace.said) if without_figures(line) not in known]
    said = any(SAID.search(line) for line in new)
    return Answer("yes", f"{lost} tokens lost, said") if said else Answer("no", f"{lost} tokens lost")


# What an update is


def gradients(asked: Asked) -> Answer:
    """Are loss and gradient of an update those of its rows, each alone, as a mean over supervised tokens?"""
    trace = asked.train(asked.job(even_rows(), parts=1, updates=1))
    loss, reference = asked.reference(rows_of(trace, even_rows(), 0))
    return judge(max(apart(trace.gradients, reference), abs(trace.losses[0] / loss - 1)))


def size_of_updates(asked: Asked) -> Answer:
    """Does an update see as many examples as were asked for: micro-batch size times accumulation?"""
    job = asked.job(ragged_rows(48))
    trace = asked.train(job, stop=1)
    seen, wanted = len(trace.examples(0)), job.per_device * job.accumulation
    return Answer("yes") if seen == wanted else Answer("no", f"{seen} for {wanted}")


def micro_batches(asked: Asked) -> Answer:
    """Are loss and gradient of an update the same in one micro-batch as in four?"""
    one, four = (asked.train(asked.job(even_rows(), parts=parts, updates=1)) for parts in (1, 4))
    if len([batch for batch in one.batches if batch.update == 0]) == len(four.batches):
        return Answer("n/a", "one micro-batch size only")
    return compare(one, four)


# A run


def resume(asked: Asked) -> Answer:
    """Are the weights after five updates the same when the run is stopped after two, in mid-epoch, and resumed?"""
    rows = ragged_rows(24)
    job = asked.job(rows, updates=5, save=2)
    straight = asked.train(asked.job(rows, updates=5, save=2))
    asked.train(job, stop=2)
    (checkpoint,) = Path(job.directory).glob("**/checkpoint-2")
    resumed = asked.train(job, resume=str(checkpoint))
    return judge(
        apart(
            {name: weight.double() for name, weight in resumed.weights.items()},
            {name: weight.double() for name, weight in straight.weights.items()},
        )
    )


def evaluation(asked: Asked) -> Answer:
    """Is the evaluation loss the same with one example in a micro-batch as with eight?"""
    losses = []
    for size in (1, 8):
        job = asked.job(even_rows(), held_out=ragged_rows(12, seed=4), per_device_eval=size)
        with output():
            losses.append(asked.setting.build(job).evaluate()["eval_loss"])
    return judge(abs(losses[0] / losses[1] - 1))


# On two ranks


def ranks(asked: Asked) -> Answer:
    """Are loss and gradient of an update on two ranks those of the same rows, each alone?"""
    trace = asked.train(asked.job(even_rows(), parts=1, updates=1))
    loss, reference = asked.reference(rows_of(trace, even_rows(), 0))
    return judge(max(apart(trace.gradients, reference), abs(trace.losses[0] / loss - 1) if trace.losses else 0.0))


def once(asked: Asked) -> Answer:
    """In an epoch of 13 rows on two ranks, is every row seen once?"""
    rows = ragged_rows(13)
    trace = asked.train(asked.job(rows, per_device=2, accumulation=2))
    seen = collections.Counter(
        document.example for batch in trace.batches for document in batch.documents if document.example is not None
    )
    twice, never = sum(count > 1 for count in seen.values()), len(rows) - len(seen)
    wrong = [f"{count} {what}" for count, what in ((twice, "twice"), (never, "never")) if count]
    return Answer("no", ", ".join(wrong)) if wrong else Answer("yes")


QUESTIONS: dict[str, Callable[[Asked], Answer]] = {
    "isolated": isolated,
    "isolated, hybrid": isolated_hybrid,
    "first labels": first_labels,
    "positions": positions,
    "end tokens": end_tokens,
    "as given": as_given,
    "long rows": long_rows,
    "gradients": gradients,
    "size": size_of_updates,
    "micro-batches": micro_batches,
    "ranks": ranks,
    "once": once,
    "resume": resume,
    "evaluation": evaluation,
}
ON_RANKS = ("ranks", "once")


def ask(asked: Asked, question: str) -> Answer:
    """Asks one question; what a trainer refuses to do is an answer."""
    if question in asked.setting.not_asked:
        return Answer("not asked", asked.setting.not_asked[question])
    try:
        return QUESTIONS[question](asked)
    except AssertionError:
        raise
    except Exception as error:
        return _failed(error)


def judge(difference: float) -> Answer:
    return Answer("yes" if difference < TOLERANCE else "no", f"{difference:.0e}")


def compare(one: Trace, other: Trace) -> Answer:
    loss = max(abs(a / b - 1) for a, b in zip(one.losses, other.losses, strict=True))
    return judge(max(apart(one.gradients, other.gradients), loss))


def without_figures(line: str) -> str:
    return re.sub(r"\d+", "#", line)


def _failed(error: Exception) -> Answer:
    lines = [line for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
    return Answer("refused", lines[0][:300])
