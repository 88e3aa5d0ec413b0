"""What an objective is, and the task that it makes of a run's tokenizer and examples. Imports no torch.

    recipe.objective                                    an Objective: its keys of the recipe, and everything asked about them
    task = recipe.objective.task(tokenizer, ...)        examples, collator, loss, and what the model needs
    PackTrainer(model, args, task=task, ...)

Nothing outside this folder looks at an objective's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from packtrain.data.formats import Kind
from packtrain.recipe.sections import Section, Settings, Verdicts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from packtrain.data.examples import AnyExamples, Examples
    from packtrain.packing.collator import PackCollator
    from packtrain.packing.strategies import Strategy

Rule = Callable[[Settings, Any], Verdicts]  # (settings, packtrain.packing.strategies.Strategy)


class Objective(Section):
    """One way to learn: its keys of a recipe's section `objective:`, and what a run has to know of it.

    A new objective is a subclass in a new file that imports no torch at its top, and one line in `OBJECTIVES`.

    Attributes:
        auto_class: the class of transformers that loads its models.
        new_weights: what the names of weights begin with that a pretrained checkpoint may lack.
        completions_only: learns completions only, wherever rows have any and the recipe doesn't say otherwise.
        keeps_examples: its examples are those of `packtrain.data`, so that their lengths are known without a tokenizer.
        brings_attention: its model gets the objective's own attention, made for its batches alone.
        weighs_tokens: its loss takes factors of tokens (a fractional `weight` of a message).
        predicts_next: it predicts every token from those before it, so that its model must be causal.
        row_kind: what its rows are, see `packtrain.data.formats.KINDS`.
        streams: its examples are those of `packtrain.data`, each made of its row alone, so that rows can be streamed.
        answers: its models answer `packtrain sample` and `packtrain evaluate`.
        weighing: its keys that only weigh losses: which tokens are scored, and how each is, stays the same.
        rules: what its keys contradict in other sections and in a strategy.
    """

    name: str

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    new_weights: ClassVar[tuple[str, ...]] = ()
    completions_only: ClassVar[bool] = False
    keeps_examples: ClassVar[bool] = True
    brings_attention: ClassVar[bool] = False
    weighs_tokens: ClassVar[bool] = False
    predicts_next: ClassVar[bool] = False
    row_kind: ClassVar[Kind] = "example"
    streams: ClassVar[bool] = False
    answers: ClassVar[bool] = False
    weighing: ClassVar[tuple[str, ...]] = ()
    rules: ClassVar[tuple[Rule, ...]] = ()

    @property
    def equal_lengths(self) -> bool:
        """Whether all documents of an update are made as long as its longest."""
        return False

    def logits(self, config: PreTrainedConfig) -> int:
        """Returns how many logits the model has at a supervised position."""
        return config.get_text_config().vocab_size

    def scores_like(self, other: Objective) -> bool:
        """Returns whether its losses, weights aside, are of the same predictions as those of `other`."""
        mine, theirs = (each.model_dump(exclude={*each.weighing}) for each in (self, other))
        return mine == theirs

    def unlike_sft(self) -> tuple[str, Any] | None:
        """Returns the key, with its value, by which its loss is another than that of supervised fine-tuning, the mean over
        supervised tokens of predicting the next, as trainers of other libraries have it; None where it is that."""
        return "objective.name", self.name

    def task(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train: Examples,
        held_out: Examples | None,
        *,
        seed: int,
        layout: Literal["flat", "padded"] = "flat",
    ) -> Task:
        """Makes the task of one run. The tokenizer may gain tokens.

        Args:
            train, held_out: the recipe's examples.
            seed: of everything that the objective draws.
            layout: of the run's strategy, for examples of several documents, whose tokens a plan counts by it.

        Raises:
            PacktrainError: examples that don't fit the objective's settings.
        """
        raise TypeError(f"{type(self).__name__} has no task")


def keeps_documents_whole(settings: Settings, strategy: Strategy) -> Verdicts:
    """Refuses strategies that split: the rule of objectives whose documents can't be cut."""
    if strategy.splits:
        what = f"cuts documents, and `{settings['objective.name']}` needs whole ones"
        yield "batching.strategy", what, "choose another strategy, such as bfd"


class Prepared(NamedTuple):
    """The result of `Task.prepare`: `peft.LoraConfig` fields that the objective needs under LoRA, and a note for people."""

    lora: dict[str, object]
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class TokenLosses:
    """The predictions of one micro-batch that are scored, N of them, in reading order.

    nll: float32 `[N]`, -log p(target).
    weights: float32 `[N]`, what each counts.
    index: int64 `[N]`, flat position of the target in `labels` (row-major over `[B, T]`).
    correct: bool `[N]`, whether the likeliest class is the target; None where nobody counts it.
    total: the sum of `weights * nll` where it alone has a gradient (see `chunks`); None where `nll` has.
    """

    nll: torch.Tensor
    weights: torch.Tensor
    index: torch.Tensor
    correct: torch.Tensor | None = None
    total: torch.Tensor | None = None

    def weighted_sum(self) -> torch.Tensor:
        """Returns the sum of `weights * nll`, a float32 scalar that carries gradients also when N is 0."""
        return (self.nll * self.weights).sum() if self.total is None else self.total


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss that is a sum over micro-batches divided by a sum over micro-batches, so that layout can't matter.

        loss of a step = sum of losses(model, batch).weighted_sum() / sum of denominator(batch)

    losses: `(model, batch, *, head) -> TokenLosses`.
    denominator: `batch -> float64 scalar`.
    head: `unwrapped model -> the module that gives logits`.
    sums: optional, `(TokenLosses, batch) -> {name: float64 [2]}`: its own figures, each a numerator and a
        denominator to be summed over micro-batches and ranks; logged as `name` and, held out, as `eval_name`.
    """

    losses: Callable[..., TokenLosses]
    denominator: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
    head: Callable[[PreTrainedModel], torch.nn.Module]
    sums: Callable[[Any, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None


def unchanged(model: PreTrainedModel) -> Prepared:
    """Leaves a model as it was loaded."""
    return Prepared({})


def nothing(trainer: Any) -> str | None:
    """Does nothing before the first step."""
    return None


@dataclass(frozen=True, kw_only=True)
class Task:
    """A run's objective and examples: what it learns, from what, and how its batches are made.

    Attributes:
        tokenizer: with the tokens that the objective has added.
        train, held_out: the examples as the plan and the collator see them; None where the recipe holds nothing out.
        loss: see `Loss`.
        make_collator: makes the collator from the arguments of `PackCollator` (`layout`, `pad_token_id`, ...).
        prepare: changes the loaded model in place.
        begin: does what needs the model where it will train, before the first step and before a checkpoint is read;
            collective. It takes the `PackTrainer` and returns a line for people, or None.
        config_fields: of the model's config, decided by the data.
        new_tokens: ids for which `prepare` makes rows.
        tokens: eos, pads and mask of a diffusion model (`TailTokens`).
    """

    tokenizer: PreTrainedTokenizerBase
    train: AnyExamples
    held_out: AnyExamples | None
    loss: Loss
    make_collator: Callable[..., PackCollator]
    prepare: Callable[[PreTrainedModel], Prepared] = unchanged
    begin: Callable[[Any], str | None] = nothing
    config_fields: Mapping[str, Any] = field(default_factory=dict)
    new_tokens: tuple[int, ...] = ()
    tokens: Any = None

    def collator(self, strategy: Strategy, *, max_length: int, position_start: int = 0) -> PackCollator:
        """Returns the collator of this task's examples for one strategy.

        Args:
            max_length: the width of a strategy that pads to it.
            position_start: the model's first position, see `packtrain.modeling.positions`.
        """
        return self.make_collator(
            layout=strategy.layout,
            padded_to=strategy.padded_to,
            pad_token_id=self.tokenizer.pad_token_id,
            max_length=max_length,
            position_start=position_start,
        )

    def longest(self) -> int:
        """Returns the tokens of the longest document, held out or not."""
        return max(part.longest for part in (self.train, self.held_out) if part is not None)
