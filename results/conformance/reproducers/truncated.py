"""TRL, `bfd`: what exceeds `max_length` is dropped while packing, without a message."""

from datasets import Dataset
from trl import pack_dataset

rows = Dataset.from_dict({"input_ids": [[1, 2, 3, 4, 5], [6, 7]], "attention_mask": [[1] * 5, [1] * 2]})
print(pack_dataset(rows, seq_length=4, strategy="bfd")["input_ids"])
