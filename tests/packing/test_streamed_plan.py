"""The plan of streamed rows: a plan's own, block by block, whatever the ranks."""

from __future__ import annotations

import json

import numpy as np
import pytest

from packtrain.data.blocks import Blocks
from packtrain.data.encoding import make_encoder
from packtrain.data.streams import open_stream
from packtrain.errors import PlanError
from packtrain.packing.plan import make_plan
from packtrain.packing.strategies import STRATEGIES
from packtrain.packing.streamed_plan import StreamedPlan, plan_stream
from packtrain.recipe.sections import BatchingSection, Schedule
from tests.data.helpers import make_tokenizer

LENGTHS = np.clip(np.random.default_rng(3).lognormal(2.5, 0.8, 103), 3, 60).astype(int).tolist()
STEP_SCOPE = [name for name, rule in STRATEGIES.items() if rule.scope == "step"]


@pytest.fixture
def rows(write_rows):
    """A row of token ids for each of `LENGTHS`."""
    return write_rows(*({"input_ids": [9] * length} for length in LENGTHS))


def plan(rows, size: int, *, ranks: int = 1, micro="auto", strategy="balanced", steps=40) -> StreamedPlan:
    encoder, _ = make_encoder(["input_ids"], make_tokenizer())
    blocks = Blocks(
        open_stream(str(rows)),
        encoder,
        buffer_size=size,
        examples_per_step=8,
        max_length=60,
        overflow="error",
        on_bad_row="error",
    )
    batching = BatchingSection(strategy=strategy, examples_per_step=8, max_tokens=120)
    schedule = Schedule(seed=7, max_steps=steps, gradient_accumulation_steps=micro)
    return plan_stream(batching, schedule, blocks, max_length=60, world_size=ranks)


def shown(parts) -> list[tuple[list[int], list[int]]]:
    return [(part.example_ids.tolist(), part.lengths.tolist()) for part in parts]


@pytest.mark.parametrize("strategy", STEP_SCOPE)
def test_rows_of_one_block_are_planned_as_if_they_were_counted(rows, strategy):
    """Three epochs, micro-batch by micro-batch; control: in blocks, the first one differs."""
    for ranks in (1, 2):
        streamed = plan(rows, 1000, ranks=ranks, strategy=strategy)
        counted = make_plan(
            LENGTHS,
            strategy=strategy,
            seed=7,
            examples_per_step=8,
            max_tokens=120,
            max_length=60,
            world_size=ranks,
            max_steps=40,
            gradient_accumulation_steps=streamed.gradient_accumulation_steps,
        )
        for step in range(40):
            (epoch, index), mine = streamed.locate(step), streamed.layout_of(step)
            assert (epoch, index) == counted.locate(step)
            own = [(np.array(ids) - epoch * len(LENGTHS)).tolist() for ids, _ in shown(mine)]
            assert [*zip(own, (lengths for _, lengths in shown(mine)), strict=True)] == shown(counted.layout_of(step))
        assert streamed.epochs_after(40) == counted.epochs_after(40)
    assert shown(plan(rows, 16, strategy=strategy).layout_of(0)) != shown(counted.layout_of(0))


@pytest.mark.parametrize("size", [1, 16, 40])
def test_every_example_is_seen_once_an_epoch_on_any_number_of_ranks(rows, size):
    one, three = plan(rows, size), plan(rows, size, ranks=3)
    assert one.hash == three.hash != plan(rows, size + 8).hash
    seen: list[list[int]] = [[], [], []]
    for step in range(39):
        ids = one.examples(step).tolist()
        dealt = [i for rank in range(3) for part in three.micro_batches(step, rank) for i in part.example_ids.tolist()]
        assert sorted(dealt) == sorted(ids)
        assert len({len(three.micro_batches(step, rank)) for rank in range(3)}) == 1
        seen[one.locate(step)[0]] += ids
    for epoch, ids in enumerate(seen):
        assert sorted(ids) == [*range(epoch * len(LENGTHS), (epoch + 1) * len(LENGTHS))]
    orders = [np.array(ids) - epoch * len(LENGTHS) for epoch, ids in enumerate(seen)]
    for block in range(0, len(LENGTHS), one.blocks.size):  # no example leaves its block, and its order changes
        places = slice(block, block + one.blocks.size)
        assert all(sorted(order[places]) == sorted(orders[0][places]) for order in orders)
    assert not (orders[0] == orders[1]).all()
    assert one.examples_after(5) == 40 and one.examples_after(20) == len(LENGTHS)
    assert one.epochs_after(5) == 0 and one.epochs_after(26) == 2
    assert one.said_before(13) == "the rows have ended after 103 of them, 103 examples: epoch 2 begins with update 13"
    assert one.said_before(12) is None and one.said_before(0) is None


def test_any_step_can_be_asked_for_and_a_state_skips_the_rows_before_it(rows):
    unbroken = plan(rows, 16)
    expected = [shown(unbroken.layout_of(step)) for step in range(40)]
    other = plan(rows, 16)
    for step in (17, 3, 38, 0):
        assert shown(other.layout_of(step)) == expected[step]
    for step in (1, 7, 14, 31):
        resumed = plan(rows, 16, ranks=2)
        resumed.go_on_from(json.loads(json.dumps(unbroken.state_after(step))))
        stretches = [steps for _, steps in resumed.stretches(step)]
        assert [n for steps in stretches for n in steps] == [*range(step, 40)]
        ids = {i for part in resumed.layout_of(step) for i in part.example_ids.tolist()}
        assert ids == {i for part, _ in expected[step] for i in part}
        assert resumed.figures_after(step + 1) == unbroken.figures_after(step + 1)


def test_micro_batches_always_suffice_or_the_step_that_needs_more_is_named(rows):
    assert plan(rows, 16).gradient_accumulation_steps == 4  # 8 examples of 60 tokens, 120 in each
    for step in range(40):
        assert max(part.lengths.sum() for part in plan(rows, 16).layout_of(step)) <= 120
    few = plan(rows, 16, micro=1)
    with pytest.raises(
        PlanError, match=r"step \d+ needs [23] micro-batches of 120 tokens .*\n    fix: .* 4 always suffice"
    ):
        for step in range(40):
            few.layout_of(step)
