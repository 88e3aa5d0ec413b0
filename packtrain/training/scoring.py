"""Scores of a recipe's training examples: loss, perplexity and EL2N, from forward passes in its layout.

    score(load_recipe("my_run.yaml"), out=Path("out/scores.parquet"), models=["out/my_run/checkpoint-40"])

Each is a mean over the supervised tokens of an example, all of which count the same; perplexity is the exponential of
the loss. Of several models, loss and EL2N are means over them: the Data Diet paper averages EL2N over ten runs early in
training. An example's scores are its own: they depend neither on the layout nor on what shares a micro-batch with it, up
to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from rich.console import Console
from rich.progress import track
from scipy.stats import spearmanr
from torch import nn
from transformers import TrainingArguments

from packtrain.data.examples import Examples
from packtrain.data.scores import About, check_target, write_scores
from packtrain.errors import LaunchError, ModelError, PacktrainError, hidden
from packtrain.generation.trained import load_trained
from packtrain.modeling.attention.varlen import choose_implementation
from packtrain.modeling.audit.causality import check_causal
from packtrain.modeling.audit.settings import base, switchable
from packtrain.modeling.isolation import check_isolation, compute_dtype
from packtrain.modeling.loading import load_config
from packtrain.modeling.per_document import compute_per_document
from packtrain.modeling.positions import check_positions, position_start
from packtrain.objectives.causal import supervised_index
from packtrain.objectives.difficulty import token_difficulty
from packtrain.objectives.logits import output_head
from packtrain.objectives.objective import Task
from packtrain.objectives.task import load_task, refuse_streaming
from packtrain.packing.collator import MicroBatches
from packtrain.packing.plan import Plan, plan_evaluation
from packtrain.packing.strategies import resolve_strategy
from packtrain.recipe.recipe import Recipe
from packtrain.recipe.sections import SCORES
from packtrain.training.arguments import training_arguments
from packtrain.training.guards.out_of_memory import explaining_out_of_memory
from packtrain.training.meters import document_of
from packtrain.training.ranks import asked_world_size
from packtrain.training.run import prepare_model

_OF_ENGINES = ("deepspeed", "fsdp", "fsdp_config")  # training: keys without effect on one process that only looks


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The scores of a recipe's training examples.

    Attributes:
        path: where they were written.
        models: what gave them.
        lengths: int `[n]`, tokens of each example.
        scores: float64 `[n]` by name.
        seconds: of the forward passes of all models.
    """

    path: Path
    models: tuple[str, ...]
    lengths: np.ndarray
    scores: dict[str, np.ndarray]
    seconds: float

    def lines(self) -> list[str]:
        """Returns the scores in a few figures, as a person reads them; rank correlations are Spearman's."""
        count = len(self.lengths)
        found = [f"{'':<12}{'5%':>10}{'median':>10}{'95%':>10}   rank correlation with length"]
        for name, values in self.scores.items():
            low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
            found.append(f"{name:<12}{low:>10.4g}{middle:>10.4g}{high:>10.4g}   {_correlation(values, self.lengths)}")
        each = 1000 * self.seconds / count / len(self.models)
        found.append(
            f"{count:,} examples, {len(self.models)} models" if len(self.models) > 1 else f"{count:,} examples"
        )
        found[-1] += f": {self.seconds:.1f} s in forward passes, {each:.1f} s per 1,000 examples and model"
        return found


def score(recipe: Recipe, *, out: Path, models: Sequence[str] = (), console: Console | None = None) -> Scored:
    """Scores all training examples of a recipe, whatever its `data.keep`, and writes them to a Parquet file.

    Args:
        out: the file; one with other scores is replaced.
        models: folders of runs, of models or of checkpoints, or names on the Hub; none for the model that the recipe
            starts from.
        console: where progress goes; nowhere by default.

    Raises:
        PacktrainError: an objective that predicts no next token, several processes, data or models that can't be read,
            attention that leaks between documents, a loss that is not finite, or a file that can't be written.
    """
    console = console or Console(quiet=True)
    _refuse(recipe)
    check_target(out)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"keep": None})})
    task = load_task(recipe)
    examples = task.train
    assert isinstance(examples, Examples), "a causal objective trains on the examples as they are"
    for line in examples.report.lines():
        _say(console, line)
    plan = _plan(recipe, task)
    args = _arguments(recipe, plan)
    names = tuple(models) or (hidden(recipe.model.model_name_or_path or f"from scratch, seed {args.seed}"),)
    given = (recipe, task, plan, args, console)
    sums, seconds = np.zeros((2, len(examples))), 0.0
    for number, name in enumerate(names):
        model = _load_saved(name, *given) if models else _load_first(*given)
        _check(model, *given)
        began = time.perf_counter()
        doing = f"scoring by model {number + 1} of {len(names)}" if len(names) > 1 else "scoring"
        longest = recipe.data.max_length
        losses = score_examples(model, task, plan, args, max_length=longest, console=console, doing=doing)
        seconds += time.perf_counter() - began
        _refuse_not_finite(losses, examples, name)
        sums += losses
        del model  # before the next one is loaded
    loss, el2n = sums / len(names)
    scores = dict(zip(SCORES, (loss, np.exp(loss), el2n), strict=True))
    write_scores(out, examples, scores, About(data=examples.fingerprint, examples=len(examples), models=names))
    return Scored(path=out, models=names, lengths=examples.lengths, scores=scores, seconds=seconds)


@torch.no_grad()
def score_examples(
    model: nn.Module,
    task: Task,
    plan: Plan,
    args: TrainingArguments,
    *,
    max_length: int,
    console: Console | None = None,
    doing: str = "scoring",
) -> np.ndarray:
    """Returns the mean nll and the mean EL2N per supervised token of each training example, float64 `[2, n]`.

    Args:
        model: on its device, in eval mode.
        plan: of one epoch; no document is cut.
        max_length: as `Task.collator`.
    """
    strategy, head = resolve_strategy(plan.strategy), output_head(model)
    collator = task.collator(strategy, max_length=max_length, position_start=position_start(model))
    batches = MicroBatches(task.train, collator)
    parts = [part for step in range(plan.total_steps) for part in plan.layout_of(step) if len(part)]
    half = {True: torch.bfloat16, False: torch.float16}[args.bf16] if args.bf16 or args.fp16 else None
    autocast = nullcontext() if half is None else torch.autocast(args.device.type, half)
    count = len(task.train.lengths)
    sums, tokens = np.zeros((2, count)), np.zeros(count, dtype=np.int64)
    for part in track(
        parts, doing, console=console, transient=True, disable=console is None or not console.is_terminal
    ):
        batch = batches[part]
        ids = batch["example_ids"][document_of(batch).flatten()[supervised_index(batch)]].numpy()  # [N]
        with explaining_out_of_memory(batch, doing, max_tokens=plan.scope.max_tokens, args=args), autocast:
            found = token_difficulty(model, send_to_device(batch, args.device), head=head)
        for total, values in zip(sums, found, strict=True):
            total += np.bincount(ids, weights=values.double().cpu().numpy(), minlength=count)
        tokens += np.bincount(ids, minlength=count)
    assert (tokens == task.train.supervised).all(), "every supervised token is scored once"
    return sums / tokens


def _refuse(recipe: Recipe) -> None:
    refuse_streaming(recipe, "has no scores: they are of all examples, by their numbers")
    if not recipe.objective.predicts_next or recipe.objective.row_kind != "example":
        what = "predicts no next token of single examples, so that they have no such scores"
        fix = "score the rows with a recipe whose objective is causal_lm"
        raise PacktrainError(what, key="objective.name", value=recipe.to_dict()["objective"]["name"], fix=fix)
    if (ranks := asked_world_size()) > 1:
        raise LaunchError(
            f"scores are computed by one process, and {ranks} were launched", fix="start it without torchrun"
        )


def _plan(recipe: Recipe, task: Task) -> Plan:
    """Plans one pass over the training examples in the layout of the recipe's strategy, by its `max_tokens`."""
    return plan_evaluation(
        recipe.batching.model_copy(update={"shapes": None}),
        task.train.lengths,
        layout=resolve_strategy(recipe.batching.strategy).layout,
        max_length=recipe.data.max_length,
    )


def _arguments(recipe: Recipe, plan: Plan) -> TrainingArguments:
    """Returns the recipe's precision, device and seed."""
    training = {name: value for name, value in recipe.training.items() if name not in _OF_ENGINES}
    return training_arguments(recipe.model_copy(update={"training": training}), plan, evaluate=False)


def _load_first(recipe: Recipe, task: Task, plan: Plan, args: TrainingArguments, console: Console) -> Any:
    """Loads the model that training would start from, on its device."""
    config = load_config(recipe.model, tokenizer=task.tokenizer, new_tokens=task.new_tokens, fields=task.config_fields)
    model = prepare_model(recipe, task, config, args, layout=plan.layout, console=console)
    return model if getattr(base(model), "is_quantized", False) else model.to(args.device)  # those are there already


def _load_saved(name: str, recipe: Recipe, task: Task, plan: Plan, args: TrainingArguments, console: Console) -> Any:
    """Loads a saved model with the attention of the layout.

    Raises:
        ModelError: there is none, or it has another vocabulary than the recipe's tokenizer.
    """
    try:
        trained = load_trained(name, device=str(args.device))
    except ModelError as error:
        error.key = "--model" if error.key == "RUN_OR_MODEL" else error.key
        raise
    if trained.tokenizer.get_vocab() != task.tokenizer.get_vocab():
        what = "has another vocabulary than the recipe's tokenizer, so that it can't read the examples"
        raise ModelError(
            what, key="--model", value=name, fix="name a model of this recipe, or a recipe with its tokenizer"
        )
    model = trained.model
    inner, asked = base(model), recipe.model.attn_implementation
    attention = choose_implementation(asked, plan.layout, args.device, compute_dtype(args, model.dtype))
    if attention is not None and (asked != "auto" or switchable(inner, attention)):
        inner.set_attn_implementation(attention)
    if far := check_positions(model, task.longest()):
        _say(console, f"warning      {far}")
    compute_per_document(model)
    return model


def _check(model: Any, recipe: Recipe, task: Task, plan: Plan, args: TrainingArguments, console: Console) -> None:
    """Asks the model whether it sees ahead and whether attention leaks between documents, and leaves it in eval mode."""
    check_causal(model)
    found = check_isolation(
        model,
        plan.layout,
        args.device,
        dtype=compute_dtype(args, model.dtype),
        allow_contamination=recipe.batching.allow_contamination,
        longest=int(task.train.lengths.max()),
    )
    _say(console, f"documents of a {plan.layout} batch: {found.says}")
    model.eval()


def _refuse_not_finite(losses: np.ndarray, examples: Examples, name: str) -> None:
    bad = np.flatnonzero(~np.isfinite(losses).all(axis=0))
    if bad.size:
        row = int(examples.rows[bad[0]])
        where = examples.source.where(row) if examples.source is not None else f"row {row}"
        what = f"gives {bad.size:,} examples a loss that is not finite, such as that of {where}"
        fix = "check the model; float16 overflows where bfloat16 does not (training.bf16: true)"
        raise ModelError(what, key="model", value=name, fix=fix)


def _correlation(values: np.ndarray, lengths: np.ndarray) -> str:
    constant = len(values) < 2 or np.ptp(values) == 0 or np.ptp(lengths) == 0
    return "-" if constant else f"{spearmanr(values, lengths).statistic:+.2f}"


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
