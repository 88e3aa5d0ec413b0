"""Loss and gradient of every update are finite, or the update does not happen.

After the backward pass of an update's last micro-batch and before the optimizer: one look at all losses and at the norm
of the gradients, agreed across ranks. What is found goes to `nonfinite.jsonl` in the run's directory, and then the run
stops (`batching.on_nonfinite: stop`), or the update is left out, `max_skipped_updates` times at most (`skip`).

    packtrain show RECIPE --examples results/run/nonfinite.jsonl

DeepSpeed updates inside the backward pass, so there only the losses are looked at, before it. Under fp16 the gradients
are those of a scaled loss, which may overflow and are the scaler's business; it needs all of them, so recipes refuse `skip`.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from transformers import Trainer

from packtrain.data.examples import AnyExamples
from packtrain.errors import NonFiniteError, PacktrainError
from packtrain.modeling.loading import of_weights, weights_not_finite

logger = logging.getLogger(__name__)

FILE = "nonfinite.jsonl"
SHOWN = 12  # example ids in a message; the file has all of them


class FiniteUpdates:
    """Checks every update's losses and gradients, and stops the run or leaves the update out.

    Attributes:
        skipped: updates left out so far, those before a resumed checkpoint included.
    """

    def __init__(self, trainer: Trainer, on_nonfinite: Literal["stop", "skip"], max_skipped: int):
        if on_nonfinite == "skip" and trainer.is_deepspeed_enabled:
            what, fix = "is not supported with DeepSpeed, which updates in the backward pass", "set it to stop"
            raise PacktrainError(what, key="batching.on_nonfinite", value="skip", fix=fix)
        self.trainer, self.on_nonfinite, self.max_skipped = trainer, on_nonfinite, max_skipped
        self.skipped = 0
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []  # loss [], example ids [S], of the update so far

    def saw(self, loss: torch.Tensor, example_ids: torch.Tensor) -> None:
        """Notes the loss of a micro-batch, before its backward pass."""
        self._seen.append((loss.detach(), example_ids))
        if self.trainer.is_deepspeed_enabled and self.trainer.accelerator.sync_gradients:
            self._judge(torch.zeros((), device=loss.device), None)

    def check(self, model: torch.nn.Module) -> None:
        """Checks an update, after the backward pass of its last micro-batch.

        Raises:
            NonFiniteError: on every rank.
        """
        if self.trainer.is_deepspeed_enabled:
            return
        scaled = self.trainer.accelerator.scaler is not None
        self._judge(torch.zeros((), device=self.trainer.args.device) if scaled else gradient_norm(model), model)

    def _judge(self, norm: torch.Tensor, model: torch.nn.Module | None) -> None:
        seen, self._seen = self._seen, []
        figures = torch.stack([norm, *(loss.to(norm) for loss, _ in seen)])  # [1 + micro-batches]
        finite = figures.isfinite()
        bad = torch.stack([~finite[0], ~finite[1:].all()]).long()  # of the gradients, of a loss
        bad_gradients, bad_losses = self.trainer.accelerator.reduce(bad, reduction="sum").tolist()
        if not (bad_gradients or bad_losses):
            return
        size, *losses = figures.tolist()
        found = [
            {"rank": self.trainer.args.process_index, "micro_batch": number, "loss": loss, **self._examples(ids)}
            for number, (loss, (_, ids)) in enumerate(zip(losses, seen, strict=True))
            if not (bad_losses and math.isfinite(loss))  # with finite losses, any of them may have made the gradients
        ]
        self._report("loss" if bad_losses else "gradient", size, gather_object(found))
        assert model is not None
        model.zero_grad()  # parameters without a gradient are left alone by the optimizer, its moments too

    def _examples(self, ids: torch.Tensor) -> dict[str, list[int]]:
        rows = cast(AnyExamples, self.trainer.train_dataset).rows
        known = [number for number in ids.tolist() if number >= 0]  # -1 is padding
        return {"example_ids": known, "rows": [int(rows[number]) for number in known]}

    def _report(self, what: str, norm: float, found: list[dict[str, Any]]) -> None:
        step = self.trainer.state.global_step
        path = Path(str(self.trainer.args.output_dir), FILE)
        ids = sorted({number for batch in found for number in batch["example_ids"]})
        if self.trainer.is_world_process_zero():
            figures = [batch | {"loss": str(batch["loss"])} for batch in found]  # JSON has no NaN
            record = {"step": step, "not_finite": what, "gradient_norm": str(norm), "example_ids": ids}
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record | {"micro_batches": figures}) + "\n")
        if self.on_nonfinite == "skip" and self.skipped < self.max_skipped:
            self.skipped += 1
            if self.trainer.is_world_process_zero():
                left_out = f"{self.skipped} of at most {self.max_skipped}, examples in {path}"
                logger.warning("skipped update %d: its %s is not finite (%s)", step, what, left_out)
            return
        skipped = f", after {self.skipped} skipped update{'s' if self.skipped > 1 else ''}" if self.skipped else ""
        where = f"update {step} (rank {found[0]['rank']}, micro-batch {found[0]['micro_batch']})" if found else ""
        own = self.trainer.accelerator.unwrap_model(self.trainer.model)
        bad = sorted({name for names in gather_object([weights_not_finite(own)]) for name in names})
        if bad:
            what = f"the {what} is not finite{skipped}{of_weights(bad)}"
            fix = (
                "start from whole weights (model.model_name_or_path) or an older checkpoint, or lower the learning rate"
            )
            raise NonFiniteError(what, where=where, fix=fix)
        shown = ", ".join(map(str, ids[:SHOWN])) + (f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else "")
        raise NonFiniteError(
            f"the {what} is not finite{skipped}; the weights are those before this update (examples {shown})",
            where=where,
            fix=f"look at them with `packtrain show RECIPE --examples {path}`; lower the learning rate, fix the data, "
            "or set batching.on_nonfinite: skip",
        )


def gradient_norm(model: torch.nn.Module) -> torch.Tensor:
    """Returns the 2-norm of this rank's gradients, float32 `[]`; of its own shards where they are sharded."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    return torch.nn.utils.get_total_norm(local).float()
