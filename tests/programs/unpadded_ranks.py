"""Two ranks, each with a batch of its own: an unpadded model under DistributedDataParallel, against padded ones."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from packtrain.modeling.unpad import unpad
from packtrain.training.ranks import settle
from tests.modeling.unpad.helpers import EXACT, apart, flat_calls, given, headed, ragged


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    batches = [ragged(lengths=lengths) for lengths in ((7, 3, 19, 12), (5, 9, 2, 11))]
    found = [given(headed("llama", "causal"), batch) for batch in batches]
    names = [name for name in found[0] if name.startswith("gradient")]
    mean = {name: (found[0][name] + found[1][name]) / 2 for name in names}
    batch = batches[dist.get_rank()]
    for inside in (False, True):
        model = headed("llama", "causal")
        if inside:
            unpad(model)
        wrapped = DistributedDataParallel(model)
        if not inside:
            unpad(wrapped)
        assert flat_calls(wrapped, "module.model", batch) == 1
        flat = {name.replace("module.", ""): part for name, part in given(wrapped, batch).items()}
        assert apart(mean, {name: flat[name] for name in names}) <= EXACT
        assert apart(mean, {name: found[dist.get_rank()][name] for name in names}) > 1e-2
    dist.barrier()
    settle()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
