"""How often a run's model answers its held-out prompts rightly.

    packtrain evaluate out/sft/recipe.yaml --prompts 64

An example's prompt is everything before the last words that it supervises, and its reference is those words. Answers are
written at temperature 0, and stored next to the model with their references.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from packtrain.data.formats import IGNORED, KINDS
from packtrain.errors import DataError, ModelError, PacktrainError
from packtrain.generation.batches import MAX_TOKENS, end_token_ids, generate, rooms_for_answers
from packtrain.generation.held_out import check_held_out
from packtrain.generation.scores import Score, apply_score, exact
from packtrain.generation.trained import load_trained
from packtrain.objectives.task import load_task
from packtrain.recipe.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """The answers to held-out prompts.

    Attributes:
        prompts: how many.
        score: mean score; of `exact`, the share of right answers.
        low, high: 95% interval of a share (Wilson's); None where scores are not 0 or 1.
        ended: share of answers that ended by themselves.
        tokens, reference_tokens: mean lengths of answers and references.
    """

    prompts: int
    score: float
    low: float | None
    high: float | None
    ended: float
    tokens: float
    reference_tokens: float

    def lines(self) -> list[str]:
        """Returns the figures as a person reads them."""
        interval = "" if self.low is None else f" (95% interval {self.low:.1%} to {self.high:.1%})"
        return [
            f"score    {self.score:.1%} of {self.prompts:,} prompts{interval}",
            f"answers  {self.tokens:.1f} tokens (references {self.reference_tokens:.1f}), "
            f"{self.ended:.0%} ended by themselves",
        ]


def evaluate(
    recipe: Recipe,
    *,
    prompts: int = 64,
    max_new_tokens: int | None = None,
    max_tokens: int = MAX_TOKENS,
    score: Score = exact,
    base: bool = False,
) -> Evaluated:
    """Answers held-out prompts with the model in `training.output_dir`, and stores the answers in `evaluation/` there.

    Args:
        prompts: how many of the held-out examples, the first ones.
        max_new_tokens, max_tokens: see `generate`.
        score: of (answer, reference), both text.
        base: asks the model that the run started from.

    Raises:
        PacktrainError: nothing is held out or trained yet, the run held out other examples or had another tokenizer, an
            example has no prompt, or the score is not a number.
    """
    if recipe.objective.row_kind != "example":
        rows = KINDS[recipe.objective.row_kind].rows
        what, fix = f"learns from {rows}, and has no single right answer", "ask the model with `packtrain generate`"
        raise PacktrainError(what, key="objective", fix=fix)
    out = Path(recipe.training["output_dir"])
    trained, task = load_trained(out, base=base), load_task(recipe)
    check_held_out(recipe, task.held_out)
    assert task.held_out is not None
    if trained.tokenizer.get_vocab() != task.tokenizer.get_vocab():
        what = "was trained with another vocabulary than the recipe's tokenizer has, so that it can't read the examples"
        raise ModelError(
            what, key="training.output_dir", value=str(out), fix="evaluate the recipe that it was trained by"
        )
    examples = [task.held_out[number] for number in range(min(prompts, len(task.held_out)))]
    asked, references = zip(*(split(e["input_ids"], e["labels"]) for e in examples), strict=True)
    model, tokenizer = trained.model, trained.tokenizer
    rooms = rooms_for_answers(model, [len(prompt) for prompt in asked], max_new_tokens)
    answers = dict(generate(model, tokenizer, asked, max_new_tokens=max_new_tokens, max_tokens=max_tokens))
    ends = end_token_ids(model, tokenizer)
    rows: list[dict[str, object]] = []
    scores: list[float] = []
    for number, reference in enumerate(references):
        told, right = (str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (answers[number], reference))
        scores.append(apply_score(score, told, right))
        prompt = str(tokenizer.decode(asked[number]))
        rows.append({"prompt": prompt, "reference": right, "answer": told, "score": scores[-1]})
    directory, name = out / "evaluation", "base" if base else "model"
    directory.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (directory / f"answers-{name}.jsonl").write_text(lines, encoding="utf-8")
    low, high = wilson(scores) if set(scores) <= {0.0, 1.0} else (None, None)
    result = Evaluated(
        prompts=len(rows),
        score=float(np.mean(scores)),
        low=low,
        high=high,
        ended=float(np.mean([len(answer) < rooms[number] for number, answer in answers.items()])),
        tokens=float(np.mean([len(answer) for answer in answers.values()])),
        reference_tokens=float(np.mean([sum(token not in ends for token in reference) for reference in references])),
    )
    (directory / f"{name}.json").write_text(json.dumps(asdict(result), indent=1) + "\n")
    return result


def split(ids: np.ndarray, labels: np.ndarray) -> tuple[list[int], list[int]]:
    """Splits an example into its prompt and its last supervised words, token ids.

    Raises:
        DataError: nothing stands before them.
    """
    supervised = np.asarray(labels) != IGNORED
    end = int(np.flatnonzero(supervised)[-1]) + 1
    before = np.flatnonzero(~supervised[:end])
    start = int(before[-1]) + 1
    if start <= 1 and not supervised[0] and len(before) == 1:  # the first token of an example is never supervised
        fix = "use rows with prompts and completions, or conversations, with `data.completion_only_loss: true`"
        raise DataError("needs prompts, and these examples are supervised from their beginning", key="data", fix=fix)
    return np.asarray(ids)[:start].tolist(), np.asarray(ids)[start:end].tolist()


def wilson(scores: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Returns Wilson's interval of a share (Wilson 1927), which holds for few answers and for none that is right.

    >>> [round(bound, 3) for bound in wilson([1] * 3 + [0] * 47)]
    [0.021, 0.162]
    """
    z, n, share = NormalDist().inv_cdf(0.5 + confidence / 2), len(scores), sum(scores) / len(scores)
    middle, spread = share + z * z / (2 * n), z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)
