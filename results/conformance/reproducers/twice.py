"""accelerate, under `Trainer` and all that build on it: of 13 rows on two ranks, an epoch sees some twice."""

from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

batches = BatchSampler(range(13), batch_size=2, drop_last=False)
print([list(BatchSamplerShard(batches, num_processes=2, process_index=rank)) for rank in (0, 1)])
