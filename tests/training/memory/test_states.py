"""ZeRO's formulas, to the byte."""

from __future__ import annotations

import pytest

from packtrain.training.memory.states import DEVICE, ENGINES, HOST, NVME, Parameters, model_states

P = 1_200_000


def parameters(trained=(P,), frozen=(), trained_itemsize=4, frozen_itemsize=2):
    return Parameters(
        trained=trained,
        frozen=frozen,
        trained_itemsize=trained_itemsize,
        frozen_itemsize=frozen_itemsize,
        layer=1000,
        outside=500,
        hidden_size=4,
    )


def exact(engine, ranks, p, *, half=True, accumulates=True, where=DEVICE):
    lines = model_states(p, engine, ranks, half=half, accumulates=accumulates)
    return sum(line.bytes for line in lines if line.basis == "exact" and not line.transient and line.where == where)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_bytes_of_a_trained_parameter_in_mixed_precision(ranks):
    """Rajbhandari et al. 2020, table 1: (2 + 2 + 12) P, then with its parts divided by the ranks."""
    p = parameters()
    assert exact("ddp", ranks, p) == 16 * P  # float32 weights: 4 + 4 + 8
    assert exact("zero1", ranks, p) == 4 * P + 12 * P // ranks
    assert exact("zero2", ranks, p) == 2 * P + 14 * P // ranks
    assert exact("zero3", ranks, p) == 16 * P // ranks
    assert exact("fsdp2", ranks, p) == 16 * P // ranks


def test_without_accumulation_zero1_shards_gradients_too():
    assert exact("zero1", 4, parameters(), accumulates=False) == exact("zero2", 4, parameters())


def test_frozen_parameters_have_no_gradients_and_no_optimizer_states():
    lora = parameters(trained=(1000,), frozen=(P,))
    assert exact("ddp", 4, lora) == 16 * 1000 + 2 * P
    assert exact("zero2", 4, lora) == 2 * 1000 + 14 * 250 + 2 * P
    assert exact("zero3", 4, lora) == 18 * 250 + 2 * P // 4  # which leaves an adapter in float32


def test_in_float32_deepspeed_keeps_a_second_copy_of_the_weights():
    assert exact("ddp", 2, parameters(), half=False) == 16 * P
    assert exact("zero2", 2, parameters(), half=False) == 4 * P + (4 + 4 + 8) * P // 2


def test_shards_are_padded_and_small_parameters_stay_whole():
    p = parameters(trained=(5, 1001))
    assert exact("zero2", 4, p) == 2 * 1008 + 14 * 252  # one buffer of 1006, padded to a multiple of 2 x ranks
    assert exact("zero3", 4, p) == 16 * (2 + 251) + 2 * 5  # each cut into four; 5 is not above 10 x hidden_size


def test_offload_moves_bytes_and_loses_none():
    held = exact("zero3", 2, parameters())
    assert exact("zero3_offload_cpu", 2, parameters()) == 0
    extra = 4 * P // 2  # the float32 gradients that the CPU's optimizer reads
    assert exact("zero3_offload_cpu", 2, parameters(), where=HOST) == held + extra
    lines = model_states(parameters(), "zero3_offload_nvme", 2, half=True)
    on_drive = sum(line.bytes for line in lines if line.where == NVME)
    assert on_drive == 14 * P // 2
    assert on_drive + exact("zero3_offload_nvme", 2, parameters(), where=HOST) == held + extra


def test_every_engine_says_what_is_exact():
    for engine in ENGINES:
        lines = model_states(parameters(), engine, 2, half=True)
        assert {line.basis for line in lines} <= {"exact", "estimated"}
        assert all(line.bytes >= 0 for line in lines)
