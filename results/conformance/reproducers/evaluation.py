"""transformers' `Trainer.evaluate`: a mean over micro-batches and not over tokens, so that it moves with their size."""

import tempfile

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.5))
rows = Dataset.from_list([{"input_ids": [5] * n, "labels": [-100] + [n % 16] * (n - 1)} for n in (3, 4, 30, 5)])


def collate(examples):
    width = max(len(one["input_ids"]) for one in examples)
    padded = {"input_ids": 0, "labels": -100}
    return {k: torch.tensor([one[k] + [p] * (width - len(one[k])) for one in examples]) for k, p in padded.items()}


for size in (1, 4):
    arguments = TrainingArguments(tempfile.mkdtemp(), per_device_eval_batch_size=size, use_cpu=True)
    print(size, Trainer(model, arguments, eval_dataset=rows, data_collator=collate).evaluate()["eval_loss"])
