"""Answers of the model while it trains: `training.sample_prompts`, at temperature 0, at every evaluation.

They are printed and kept in `samples.jsonl` of the run, a line for each prompt and evaluation:

    {"step": 40, "prompt": "2+2? ", "answer": "4"}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from packtrain.errors import PacktrainError, shorten
from packtrain.generation.batches import generate, rooms_for_answers
from packtrain.generation.prompts import encode_prompts
from packtrain.generation.trained import Trained
from packtrain.recipe.recipe import Recipe
from packtrain.training.trainer import PackTrainer

FILE = "samples.jsonl"
MOST_TOKENS = 128  # of an answer


class SampleAnswers(TrainerCallback):
    """Answers the prompts on rank 0 after every evaluation; the run's random numbers are left as they are.

    Args:
        trainer: whose model answers.
        prompts: text; a user's turn where the model is trained on conversations.

    Raises:
        PacktrainError: the model has no room for a prompt, or its weights are split over ranks.
    """

    def __init__(self, trainer: PackTrainer, recipe: Recipe, prompts: Sequence[str], console: Console | None = None):
        self.trainer, self.prompts, self.console = trainer, list(prompts), console
        if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            what, fix = "can't be answered while weights are split over ranks", "leave it out, or train by ddp or zero2"
            raise PacktrainError(what, key="training.sample_prompts", fix=fix)
        tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)
        model = trainer.accelerator.unwrap_model(trainer.model)
        self.trained = Trained(model=model, tokenizer=tokenizer, recipe=recipe, prompts=trainer.trained_on.prompts)
        self.encoded = encode_prompts(tokenizer, self.prompts, self.trained.prompts)
        self.room = min(MOST_TOKENS, *rooms_for_answers(model, [len(ids) for ids in self.encoded], None))
        self.answered: set[int] = set()  # the steps

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.global_step:
            return
        self.answered = {state.global_step}  # by the run that is resumed
        path = Path(str(args.output_dir)) / FILE
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            with suppress(ValueError):  # a line that a killed run has cut short
                step = json.loads(line)["step"]
                self.answered |= {step} if step < state.global_step else set()

    def on_evaluate(self, args, state, control, **kwargs):
        again = state.global_step in self.answered  # the evaluation after the end, of the last model or of the best
        if again or not state.is_world_process_zero:
            return
        self.answered.add(state.global_step)
        model, tokenizer = self.trained.model, self.trained.tokenizer
        was_training = model.training
        model.eval()
        try:
            with torch.random.fork_rng():
                found = dict(generate(model, tokenizer, self.encoded, max_new_tokens=self.room))
        finally:
            model.train(was_training)
        answers = [
            str(tokenizer.decode(found[number], skip_special_tokens=True)) for number in range(len(self.prompts))
        ]
        with (Path(str(args.output_dir)) / FILE).open("a", encoding="utf-8") as file:
            for prompt, answer in zip(self.prompts, answers, strict=True):
                row = {"step": state.global_step, "prompt": prompt, "answer": answer}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                if self.console is not None:
                    line = f"sample at step {state.global_step}: {shorten(prompt)} -> {shorten(answer)}"
                    self.console.print(line, markup=False, highlight=False, soft_wrap=True)
