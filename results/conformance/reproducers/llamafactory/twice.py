"""LLaMA-Factory: of 13 rows on two ranks, an epoch of its trainer sees three twice."""

import tempfile

import torch
from accelerate import debug_launcher
from accelerate.utils import gather_object
from llamafactory.hparams import FinetuningArguments, TrainingArguments
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer


def epoch():
    arguments = TrainingArguments(tempfile.mkdtemp(), per_device_train_batch_size=2, use_cpu=True, report_to="none")
    given = dict(model=torch.nn.Linear(1, 1), args=arguments, train_dataset=range(13), data_collator=list)
    trainer = CustomSeq2SeqTrainer(FinetuningArguments(), None, tokenizer=None, **given)
    seen = gather_object([row for batch in trainer.get_train_dataloader() for row in batch])
    if trainer.is_world_process_zero():
        print(sorted(seen))


debug_launcher(epoch, num_processes=2)
