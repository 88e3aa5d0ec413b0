"""Run under `accelerate launch` by plugin/test_ranks.py: a classifier, padded or unpadded, whose states an engine shards."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

import packtrain
from packtrain.modeling.flatten import Flatten
from tests.plugin.helpers import COMMON
from tests.plugin.trainers import classification
from tests.programs.two_ranks_attach import write


def main(output_dir: Path, how: str, trained: str, made: str) -> None:
    """Trains it.

    Args:
        how: "padded" or "unpadded".
        trained: "full" or "lora".
        made: "before" the arguments of training, or "after" them: ZeRO-3 then makes it in shards.
    """
    torch.set_num_threads(1)
    arguments = [TrainingArguments(output_dir=str(output_dir), **COMMON)] if made == "after" else []
    trainer = classification(output_dir, "llama", adapter=adapted if trained == "lora" else None)
    if how == "unpadded":
        packtrain.attach(trainer)
        hooks = [hook for module in trainer.model.modules() for hook in module._forward_pre_hooks.values()]
        assert any(isinstance(hook, Flatten) for hook in hooks)
    write(output_dir, trainer, [])
    arguments.clear()  # while they live, models are made in shards


def adapted(model):
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    torch.manual_seed(1)
    return get_peft_model(model, config)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
