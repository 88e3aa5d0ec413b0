"""TRL, packing: a batch size counts packs and no longer examples, so that an update of 8 sees as many examples as 8 packs
hold, and an epoch has fewer updates."""

from datasets import Dataset
from trl import pack_dataset

rows = Dataset.from_dict({"input_ids": [[number] * (2 + number % 3) for number in range(48)]})
packed = pack_dataset(rows, seq_length=12, strategy="bfd")
first = packed["seq_lengths"][:8]  # a micro-batch of 4 by an accumulation of 2
print(f"{sum(len(pack) for pack in first)} examples for 8, {-(-len(packed) // 8)} updates for {len(rows) // 8}")
