"""Early stopping: transformers' EarlyStoppingCallback, which here survives a resume and says when it stops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from transformers import EarlyStoppingCallback


class EarlyStopping(EarlyStoppingCallback):
    """Stops after as many evaluations in a row that are no better than the best before them.

    Trainer writes the count into every checkpoint; a resumed run goes on counting from there.
    """

    console: Console | None = None
    began: float = float("inf")  # the step; evaluations up to it, and after the end, don't count

    @classmethod
    def asked(cls, training: Mapping[str, Any], console: Console | None = None) -> Iterator[EarlyStopping]:
        """Yields the callback where a recipe's `training:` asks for it."""
        patience = training.get("early_stopping_patience")
        if patience is not None:
            callback = cls(patience, float(training.get("early_stopping_threshold") or 0))
            callback.console = console
            yield callback

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.began = state.global_step
        stored = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and stored:
            self.early_stopping_patience_counter = stored["attributes"]["early_stopping_patience_counter"]

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if state.global_step <= self.began:
            return
        super().on_evaluate(args, state, control, metrics, **kwargs)
        stopping = self.early_stopping_patience_counter >= self.early_stopping_patience
        early = stopping and state.global_step < state.max_steps
        if early and self.console is not None and state.is_world_process_zero:
            count, by = self.early_stopping_patience_counter, self.early_stopping_threshold
            name, best = args.metric_for_best_model, state.best_metric
            better = f"more than {by:g} better than the best before it" if by else f"better than {best:.4f}"
            self.console.print(
                f"stopping early after step {state.global_step}: {count} evaluation{'s' * (count != 1)} in a row "
                f"without a {name} {better}",
                highlight=False,
                soft_wrap=True,
            )

    def on_train_end(self, args, state, control, **kwargs):
        self.began = float("inf")


def evaluations_without_better(state: Mapping[str, Any]) -> int:
    """Returns the count that a checkpoint's `trainer_state.json` has; 0 without early stopping."""
    stored = (state.get("stateful_callbacks") or {}).get(EarlyStopping.__name__)
    return stored["attributes"]["early_stopping_patience_counter"] if stored else 0
