"""`use_liger_kernel`: Liger's kernels for the layers of a model, and not for its loss.

Liger replaces the forward pass of a model by one that fuses the head with the mean loss of all labels. packtrain's loss
has weights per token, a denominator over the whole step, and chunks of its own (`packtrain.objectives.chunks`), so it is
kept; norms, MLPs and position embeddings are Liger's. TRL's SFTTrainer keeps its chunked loss in the same way.
"""

from __future__ import annotations

import logging

from transformers import TrainingArguments
from transformers.utils import is_liger_kernel_available

from packtrain.errors import PacktrainError

logger = logging.getLogger(__name__)
LOSSES = ("fused_linear_cross_entropy", "cross_entropy")


def keep_own_loss(args: TrainingArguments) -> None:
    """Takes Liger's losses out of what it replaces, in `args`; logs it.

    Raises:
        PacktrainError: Liger is not installed, the run is on a CPU, or one of its losses is asked for by name.
    """
    if not args.use_liger_kernel:
        return
    key = "training.use_liger_kernel"
    if not is_liger_kernel_available():
        what, fix = (
            "needs liger-kernel 0.3.0 or newer, which is not installed",
            "pip install liger-kernel, or leave it out",
        )
        raise PacktrainError(what, key=key, value=True, fix=fix)
    if args.device.type == "cpu":
        raise PacktrainError("needs a GPU, and this run is on a CPU", key=key, value=True, fix="leave it out")
    given = args.liger_kernel_config or {}
    for name in LOSSES:
        if given.get(name):
            what = f"cannot replace the loss ({name}): packtrain computes it at supervised positions, in chunks"
            raise PacktrainError(what, key="training.liger_kernel_config", value=given, fix=f"leave {name} out")
    args.liger_kernel_config = {**given, **dict.fromkeys(LOSSES, False)}
    logger.warning("packtrain: use_liger_kernel replaces layers; the loss stays packtrain's own, in chunks")
