"""TRL, `wrapped`: documents are laid end to end and cut, and nothing in a row says where one begins."""

from datasets import Dataset
from trl import pack_dataset

rows = Dataset.from_dict({"input_ids": [[1, 2, 3, 4, 5], [6, 7, 8]]})
packed = pack_dataset(rows, seq_length=4, strategy="wrapped")
print(packed.to_dict())
