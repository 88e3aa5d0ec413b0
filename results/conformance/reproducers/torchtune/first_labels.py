"""torchtune, packed: with rows supervised from their first token, the last token of a document
learns the first of the next."""

from torchtune.datasets import PackedDataset

rows = [{"tokens": [1, 2, 3], "labels": [1, 2, 3]}, {"tokens": [4, 5], "labels": [4, 5]}]
pack = PackedDataset(rows, max_seq_len=6)[0]
print(pack["tokens"].tolist(), pack["labels"].tolist())  # the loss shifts labels by one
