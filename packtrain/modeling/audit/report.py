"""The findings of an audit, as data and in words."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from packtrain.errors import ModelError

logger = logging.getLogger(__name__)
ISOLATED, LEAKS, WRONG, REFUSED, UNCLEAR = "isolated", "leaks", "wrong", "not supported", "unclear"
SHORT = {ISOLATED: "ok", LEAKS: "leaks", WRONG: "wrong", REFUSED: "refused", UNCLEAR: "unclear"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The finding for one combination.

    Attributes:
        implementation, layout, mode: the combination.
        verdict: "isolated", "leaks", "wrong", "not supported" or "unclear", see `packtrain.modeling.audit.audit`.
        difference: largest |logit difference| between documents together and alone.
        leak: largest change of a document's logits by a change of another document.
        sees: pairs (i, j): document j leaks into document i, by their place in the batch, from 0.
        gradient_difference: relative norm of the difference of the gradients, together and alone; in train modes.
        calls: how often the model called the attention function; for `packtrain_varlen`.
        scale: largest |logit|, to compare with.
        cause, error: why, where it can be known; the refusal.
        checked: what was run, where it was not all of the model.
        threshold: the most tokens of a row with which the verdict would be "isolated", where its length is the reason.
    """

    implementation: str
    layout: str
    mode: str
    verdict: str
    difference: float | None = None
    leak: float | None = None
    sees: list[tuple[int, int]] = field(default_factory=list)
    gradient_difference: float | None = None
    calls: int | None = None
    scale: float | None = None
    cause: str | None = None
    error: str | None = None
    checked: str | None = None
    threshold: int | None = None

    @property
    def safe(self) -> bool:
        return self.verdict == ISOLATED

    @property
    def off(self) -> float:
        """The larger of difference and leak; 0 where neither was measured."""
        return max(self.difference or 0.0, self.leak or 0.0)

    def what(self) -> str:
        """Puts verdict, amount and cause into words."""
        amount = ""
        if self.verdict == LEAKS:
            amount = f" by up to {self.leak:.2g}"
        elif self.verdict in (ISOLATED, WRONG):
            amount = f" (outputs differ by at most {self.off:.0e} from each document alone)"
        return f"{self.verdict}{amount}{self.why()}" + (f" [{self.checked}]" if self.checked else "")

    def why(self) -> str:
        """Says which documents leak into which, the refusal and the cause, as far as there are any."""
        if self.verdict == REFUSED:
            return f": {self.error}" + (f"; {self.cause}" if self.cause else "")
        if self.verdict == UNCLEAR:
            return ": the outputs hardly depend on the context"
        pairs = [f"document {j} into {i}" for i, j in self.sees[:3]]
        more = [f"{len(self.sees) - 3} more"] if len(self.sees) > 3 else []
        seen = f" ({', '.join(pairs + more)})" if pairs else ""
        return seen + (f"; {self.cause}" if self.cause else "")

    def cell(self) -> str:
        """Returns verdict and amount as an entry of a table."""
        amounts = {LEAKS: self.leak, WRONG: self.difference}
        return SHORT[self.verdict] + (f" {amounts[self.verdict]:.2g}" if self.verdict in amounts else "")

    def refuse(self, *, allow_contamination: bool = False) -> None:
        """Raises ModelError on a leak or a wrong result, unless that is allowed; then, and where the check could
        not be made, it logs a warning."""
        if self.verdict in (REFUSED, UNCLEAR):
            logger.warning(
                "whether attention leaks between documents of a %s batch is not known: %s", self.layout, self.what()
            )
        if self.verdict not in (LEAKS, WRONG):
            return
        if self.verdict == LEAKS:
            problem = f"attention leaks between documents of a {self.layout} batch with {self.implementation}"
        else:
            problem = f"documents of a {self.layout} batch have other outputs than alone with {self.implementation}"
        what = f"{problem}: {self.what()}"
        if allow_contamination:
            logger.warning(what)
            return
        fix = (
            "run `packtrain audit` to find a safe attn_implementation, or choose a padded strategy (pad_longest), which "
            "is mostly safe; allow_contamination: true trains anyway"
        )
        if self.threshold is not None:
            fix = f"keep rows at {self.threshold:,} tokens or fewer; allow_contamination: true trains anyway"
            raise ModelError(what, key="data.max_length", fix=fix)
        raise ModelError(what, key="model.attn_implementation", value=self.implementation, fix=fix)


@dataclass(frozen=True, kw_only=True)
class PaddingEffect:
    """The reach of padding into the outputs of real tokens (largest |logit difference|).

    Attributes:
        side: "right" or "left" padding under a mask; "tail": pad tokens after the document and no mask, as diffusion
            language models train them.
        by_content: effect of other tokens in the padding; by_amount: of five more of them.
    """

    implementation: str
    side: str
    by_content: float
    by_amount: float
    reaches: bool


@dataclass(frozen=True, kw_only=True, repr=False)
class AuditReport:
    """All findings about one model; printed as the table of `packtrain audit`."""

    model: str
    architecture: str
    transformers: str
    position_start: int
    findings: list[Finding]
    padding: list[PaddingEffect]
    notes: list[str]
    advice: list[str]

    def find(self, implementation: str, layout: str, mode: str = "eval") -> Finding:
        wanted = (implementation, layout, mode)
        return next(f for f in self.findings if (f.implementation, f.layout, f.mode) == wanted)

    def __repr__(self) -> str:
        return "\n".join(self.lines())

    def to_dict(self) -> dict:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """Yields the report for people: a table of verdicts, what is behind those that are not `ok`, and what to do."""
        calls = next((f.calls for f in self.findings if f.calls is not None), None)
        called = "" if calls is None else f", calls the registered attention {calls} times per pass"
        starts = f", positions start at {self.position_start}" if self.position_start else ""
        yield f"{self.model} ({self.architecture}, transformers {self.transformers}{called}{starts})"
        yield from self._table()
        reach: dict[tuple, list[PaddingEffect]] = {}
        for effect in self.padding:
            reach.setdefault((effect.side, effect.reaches), []).append(effect)
        for (side, reaches), effects in reach.items():
            largest = max(max(effect.by_content, effect.by_amount) for effect in effects)
            names = ", ".join(effect.implementation for effect in effects)
            verb = "reaches" if reaches else "does not reach"
            yield f"  {side} padding {verb} real tokens (by at most {largest:.1g}; {names})"
        yield from (f"  {line}" for line in self.notes + self.advice)

    def _table(self) -> Iterator[str]:
        modes = list(dict.fromkeys(f.mode for f in self.findings))
        groups: dict[tuple[str, str], list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault((finding.implementation, finding.layout), []).append(finding)
        nowhere: dict[str, str] = {}  # implementations that this model or machine does not have at all, with the reason
        for implementation, _ in groups:
            whys = {(f.verdict, f.why()) for f in self.findings if f.implementation == implementation}
            if [verdict for verdict, _ in whys] == [REFUSED]:
                nowhere[implementation] = whys.pop()[1]
        rows, reasons = [["", "", *modes]], {}
        for (implementation, layout), found in groups.items():
            if implementation in nowhere:
                continue
            cells = []
            for finding in found:
                why = finding.why()
                number = reasons.setdefault((finding.verdict, why), len(reasons) + 1) if why else 0
                cells.append(finding.cell() + (f" [{number}]" if number else ""))
            rows.append([implementation, layout, *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows if len(rows) > 1 else ():
            yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        fine = [f for f in self.findings if f.safe]
        if fine:
            off = max(finding.off for finding in fine)
            yield f"  ok: within {off:.0e} of each document alone, where the largest output is {fine[0].scale:.2g}"
        for (verdict, why), number in reasons.items():
            yield f"  [{number}] {verdict}{why}"
        for why in dict.fromkeys(nowhere.values()):
            yield f"  {', '.join(name for name, other in nowhere.items() if other == why)}: {REFUSED}{why}"
