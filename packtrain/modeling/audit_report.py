"""What an audit finds, as data and in words."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from packtrain.errors import ModelError

logger = logging.getLogger(__name__)
ISOLATED, LEAKS, WRONG, REFUSED, UNCLEAR = "isolated", "leaks", "wrong", "not supported", "unclear"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one combination does.

    Attributes:
        implementation, layout, mode: the combination.
        verdict: "isolated", "leaks", "wrong", "not supported" or "unclear", see `packtrain.modeling.audit`.
        difference: largest |logit difference| between documents together and alone.
        leak: largest change of a document's logits by a change of another document.
        sees: pairs (i, j): document i sees document j, by their place in the batch, from 0.
        gradient_difference: relative norm of the difference of the gradients, together and alone; in train modes.
        calls: how often the model called the attention function; for `packtrain_varlen`.
        scale: largest |logit|, to compare with.
        cause, error: why, where it can be known; the refusal.
        checked: what was run, where it was not all of the model.
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

    @property
    def safe(self) -> bool:
        return self.verdict == ISOLATED

    def what(self) -> str:
        """Verdict, amount and cause in words."""
        if self.verdict == REFUSED:
            return f"{REFUSED}: {self.error}"
        if self.verdict == UNCLEAR:
            return f"{UNCLEAR}: the outputs hardly depend on the context"
        if self.verdict == LEAKS:
            pairs = [f"{i} sees {j}" for i, j in self.sees[:3]]
            more = [f"{len(self.sees) - 3} more"] if len(self.sees) > 3 else []
            amount = f"by up to {self.leak:.2g} ({', '.join(pairs + more)})"
        else:
            amount = f"within {max(self.difference, self.leak):.0e} of alone"
        because = f"; {self.cause}" if self.cause else ""
        return f"{self.verdict} {amount}{because}" + (f" [{self.checked}]" if self.checked else "")

    def refuse(self, *, allow_contamination: bool = False) -> None:
        """Raises ModelError on a leak or a wrong result, unless that is allowed; then, and where the check could
        not be made, it is a warning."""
        if self.verdict in (REFUSED, UNCLEAR):
            logger.warning("whether documents of a %s batch keep to themselves is %s", self.layout, self.what())
        if self.verdict not in (LEAKS, WRONG):
            return
        what = f"documents of a {self.layout} batch don't keep to themselves with {self.implementation}: {self.what()}"
        if allow_contamination:
            logger.warning(what)
            return
        fix = (
            "`packtrain audit` says which attn_implementation is safe, a padded strategy (pad_longest) mostly is; "
            "allow_contamination: true trains anyway"
        )
        raise ModelError(what, key="model.attn_implementation", value=self.implementation, fix=fix)


@dataclass(frozen=True, kw_only=True)
class PaddingEffect:
    """How far filler reaches into the outputs of real tokens (largest |logit difference|).

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


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """All findings about one model."""

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

    def to_dict(self) -> dict:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """The report for people."""
        yield f"{self.model} ({self.architecture}, transformers {self.transformers})"
        alike: dict[tuple, list[Finding]] = {}
        for f in self.findings:
            key = (f.implementation, f.layout, f.verdict, f.cause, f.error, tuple(f.sees))
            alike.setdefault(key, []).append(f)
        for (implementation, layout, *_), group in sorted(alike.items(), key=lambda item: item[0][:2]):
            worst = max(group, key=lambda f: f.leak or 0.0)
            yield f"  {implementation}, {layout} ({', '.join(f.mode for f in group)}): {worst.what()}"
        reach: dict[tuple, list[PaddingEffect]] = {}
        for effect in self.padding:
            reach.setdefault((effect.side, effect.reaches), []).append(effect)
        for (side, reaches), effects in reach.items():
            largest = max(max(effect.by_content, effect.by_amount) for effect in effects)
            names = ", ".join(effect.implementation for effect in effects)
            verb = "reaches" if reaches else "does not reach"
            yield f"  {side} filler {verb} real tokens (by at most {largest:.1g}; {names})"
        yield from (f"  {line}" for line in self.notes + self.advice)
