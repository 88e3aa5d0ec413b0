"""LLaMA-Factory: its trainer evaluates as transformers' does, with a mean over micro-batches and not over tokens."""

import tempfile

import torch
from llamafactory.hparams import FinetuningArguments, TrainingArguments
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.5))
rows = [{"input_ids": [5] * n, "labels": [-100] + [n % 16] * (n - 1)} for n in (3, 4, 30, 5)]


def collate(examples):
    width = max(len(one["input_ids"]) for one in examples)
    padded = {"input_ids": 0, "labels": -100}
    return {k: torch.tensor([one[k] + [p] * (width - len(one[k])) for one in examples]) for k, p in padded.items()}


for size in (1, 4):
    arguments = TrainingArguments(tempfile.mkdtemp(), per_device_eval_batch_size=size, use_cpu=True, report_to="none")
    given = dict(model=model, args=arguments, eval_dataset=rows, data_collator=collate, tokenizer=None)
    trainer = CustomSeq2SeqTrainer(FinetuningArguments(), None, **given)
    print(size, trainer.evaluate()["eval_loss"])
