"""ms-swift: micro-batches of 2 packs, 4 of them an update: it sees not 8 examples but those of 8 packs."""

from types import SimpleNamespace

from datasets import Dataset
from swift.dataset import PackingDataset

rows = Dataset.from_dict({"lengths": [16] * 64})
packs = PackingDataset(SimpleNamespace(max_length=64), rows).packed_idx
print(sum(len(pack) for pack in packs[: 2 * 4]), "examples for", 2 * 4)
