"""ms-swift: of 13 rows on two ranks, an epoch of its batch sampler leaves one out, also without `drop_last`."""

from accelerate import PartialState, debug_launcher
from accelerate.utils import gather_object
from swift.dataloader import BatchSamplerShard


def epoch():
    PartialState(cpu=True)
    batches = BatchSamplerShard(total_samples=13, batch_size=2, shuffle=False, drop_last=False, data_seed=0)
    seen = gather_object([row for batch in batches for row in batch])
    if PartialState().is_main_process:
        print(sorted(seen))


debug_launcher(epoch, num_processes=2)
