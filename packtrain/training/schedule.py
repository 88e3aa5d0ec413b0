"""The learning rate of a resumed run that has another length now.

A resumed optimizer comes with the rate that the saved run had for its next update: after the last one of a `linear`
schedule that is 0, and Trainer's scheduler sets the rate of the new schedule only after the first update.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer


def continue_schedule(trainer: Trainer) -> str | None:
    """Gives the optimizer of a resumed run the rates that its schedule, of this run's length, has for the next update.

    All of transformers' schedules that depend on the length are a `LambdaLR`, whose rate is the base rate times a
    function of the updates made. Any other scheduler is left as it was restored.

    Returns:
        What to say where the rate jumps; None where it is what it was.
    """
    scheduler: Any = trainer.lr_scheduler
    while not isinstance(scheduler, LambdaLR) and hasattr(scheduler, "scheduler"):  # wrappers of accelerate
        scheduler = scheduler.scheduler
    if not isinstance(scheduler, LambdaLR):
        return None
    groups = scheduler.optimizer.param_groups
    before = [float(group["lr"]) for group in groups]
    lambdas = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    rates = [float(base) * float(factor(scheduler.last_epoch)) for base, factor in lambdas]
    if all(math.isclose(old, new, rel_tol=1e-6) for old, new in zip(before, rates, strict=True)):
        return None
    for group, rate in zip(groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    scheduler._last_lr = rates
    jump = f"the learning rate continues at {rates[0]:.1e} instead of {before[0]:.1e}"
    return f"it now ends at update {trainer.state.max_steps:,}: {jump}"
