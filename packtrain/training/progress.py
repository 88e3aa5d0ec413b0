"""A progress bar with the loss in it; plain lines where there is no terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

SHOWN = {  # key in the logs -> how a person reads it
    "loss": "loss {:.4f}",
    "grad_norm": "grad {:.2f}",
    "learning_rate": "lr {:.1e}",
    "real_tokens_per_second": "{:,.0f} real tokens/s",
    "eval_loss": "held-out loss {:.4f}",
    "eval_accuracy": "held-out accuracy {:.1%}",
}


class RichProgress(TrainerCallback):
    """Shows, on rank 0, updates done, time left and every log line."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console()
        self.progress: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[last]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.progress.start()
        self.progress.add_task("", total=state.max_steps, completed=state.global_step, last="")

    def on_step_end(self, args, state, control, **kwargs):
        if self.progress:
            self.progress.update(self.progress.task_ids[0], completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        shown = [text.format(logs[key]) for key, text in SHOWN.items() if key in logs]
        if not self.progress or not shown:
            return
        line = "  ".join(shown)
        self.console.print(f"step {state.global_step:>5}/{state.max_steps}  {line}", highlight=False)
        if "loss" in logs:
            self.progress.update(self.progress.task_ids[0], last=SHOWN["loss"].format(logs["loss"]))

    def on_train_end(self, args, state, control, **kwargs):
        self.stop()

    def stop(self) -> None:
        """Gives the terminal back; also after an error, where `on_train_end` does not come."""
        if self.progress:
            self.progress.stop()
            self.progress = None
