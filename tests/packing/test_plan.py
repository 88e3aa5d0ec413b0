"""The plan: every example once per epoch, equal work per rank, the same examples whatever the world size."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packtrain.errors import PlanError
from packtrain.packing.accumulation import micro_batch_tokens
from packtrain.packing.cost import Cost
from packtrain.packing.plan import make_plan
from packtrain.packing.strategies import STRATEGIES

EVERY = pytest.mark.parametrize("name", STRATEGIES)
STEP = [name for name, strategy in STRATEGIES.items() if strategy.scope == "step"]
EPOCH = [name for name, strategy in STRATEGIES.items() if strategy.scope == "epoch"]


def tokens_seen(plan, epoch: int) -> list[tuple[int, int]]:
    """(example, token) pairs that all ranks together compute in an epoch, sorted."""
    first = plan.epoch_starts[epoch]
    return sorted(
        (int(i), t)
        for step in range(first, first + plan.steps_in_epoch(epoch))
        for rank in range(plan.world_size)
        for part in plan.micro_batches(step, rank)
        for i, start, stop in zip(part.example_ids, part.starts, part.stops, strict=True)
        for t in range(start, stop)
    )


@EVERY
@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    capacity=st.sampled_from([40, 41, 100, 5000]),
    world_size=st.sampled_from([1, 2, 3, 7]),
    examples_per_step=st.integers(1, 20),
    seed=st.integers(-(2**40), 2**40),
)
def test_every_strategy_loses_nothing_and_keeps_ranks_equal(
    name, lengths, capacity, world_size, examples_per_step, seed
):
    plan = make_plan(
        lengths, strategy=name, seed=seed, examples_per_step=examples_per_step, max_tokens=capacity,
        world_size=world_size, num_epochs=2, cost=Cost(linear=1, quadratic=0.05),
    )  # fmt: skip
    everything = [(i, t) for i, length in enumerate(lengths) for t in range(length)]
    assert tokens_seen(plan, 0) == tokens_seen(plan, 1) == everything
    for step in range(plan.total_steps):
        computed = plan.layout_of(step)
        assert len(computed) == world_size * plan.gradient_accumulation_steps
        ids = np.concatenate([part.example_ids for part in computed])
        assert sorted(set(ids.tolist())) == sorted(plan.examples(step).tolist())
        width = getattr(plan.scope, "width", 0)
        assert max(micro_batch_tokens(part.lengths, STRATEGIES[name], width) for part in computed) <= capacity
        for rank in range(world_size):
            assert len(plan.micro_batches(step, rank)) == plan.gradient_accumulation_steps


@EVERY
def test_the_same_examples_on_any_number_of_ranks(name, sft_lengths):
    one, eight = (make_plan(sft_lengths, strategy=name, world_size=ranks, num_epochs=1.5) for ranks in (1, 8))
    assert one.total_steps == eight.total_steps and one.hash == eight.hash
    for step in range(one.total_steps):
        assert np.array_equal(np.sort(one.examples(step)), np.sort(eight.examples(step)))
        mixed = np.concatenate([part.example_ids for rank in range(8) for part in eight.micro_batches(step, rank)])
        assert set(mixed.tolist()) == set(one.examples(step).tolist())


@EVERY
def test_seed_and_epoch_change_the_examples_of_a_step(name, sft_lengths):
    plan = make_plan(sft_lengths, strategy=name, num_epochs=2, seed=1)
    same, other = (make_plan(sft_lengths, strategy=name, num_epochs=2, seed=seed) for seed in (1, 2))
    second_epoch = plan.epoch_starts[1]
    assert np.array_equal(plan.examples(5), same.examples(5)) and plan.hash == same.hash
    assert set(plan.examples(5)) != set(other.examples(5)) and plan.hash != other.hash
    assert set(plan.examples(5)) != set(plan.examples(second_epoch + 5))


@EVERY
def test_steps_in_any_order_and_after_pickling(name, sft_lengths):
    plan = make_plan(sft_lengths, strategy=name, num_epochs=3, world_size=2)
    forward = [plan.examples(step) for step in range(plan.total_steps)]
    copy = pickle.loads(pickle.dumps(plan))
    for step in reversed(range(plan.total_steps)):
        assert np.array_equal(copy.examples(step), forward[step])


def test_step_scope_strategies_see_the_same_examples(sft_lengths):
    plans = [make_plan(sft_lengths, strategy=name, num_epochs=2) for name in STEP]
    for step in range(plans[0].total_steps):
        assert len({tuple(plan.examples(step)) for plan in plans}) == 1
    assert len({plan.hash for plan in plans}) == 1
    bfd = make_plan(sft_lengths, strategy="bfd", num_epochs=2)  # the negative control
    assert sorted(bfd.examples(0)) != sorted(plans[0].examples(0))


def test_no_step_mixes_two_epochs():
    plan = make_plan([5] * 10, examples_per_step=4, num_epochs=2)
    assert [len(plan.examples(step)) for step in range(plan.total_steps)] == [4, 4, 2, 4, 4, 2]
    assert [plan.locate(step) for step in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    with pytest.raises(IndexError):
        plan.locate(6)


@pytest.mark.parametrize("name", ["balanced", "bfd", "next_fit"])
@pytest.mark.parametrize(("num_epochs", "max_steps"), [(0.3, -1), (1.0, -1), (2.5, -1), (1.0, 3), (1.0, 1000)])
def test_epochs_and_max_steps_as_trainer_counts_them(name, num_epochs, max_steps, sft_lengths):
    plan = make_plan(sft_lengths, strategy=name, num_epochs=num_epochs, max_steps=max_steps)
    if max_steps > 0:
        assert plan.total_steps == max_steps
    elif name != "next_fit":  # whose epochs differ in length
        assert plan.total_steps == math.ceil(num_epochs * plan.steps_in_epoch(0))
        assert plan.num_epochs == math.ceil(num_epochs)
    epoch, index = plan.locate(plan.total_steps - 1)
    assert epoch == plan.num_epochs - 1 and index < plan.steps_in_epoch(epoch)
    assert sum(plan.steps_in_epoch(e) for e in range(epoch)) == plan.epoch_starts[epoch]


def test_accumulation_by_hand():
    """Eight examples of 5 tokens: 40 tokens in micro-batches of 15 (three examples) on one or two ranks."""

    def steps(name, ranks):
        return make_plan([5] * 8, strategy=name, examples_per_step=8, max_tokens=15, world_size=ranks)

    for name in STEP:
        assert steps(name, 1).gradient_accumulation_steps == 3, name
        assert steps(name, 2).gradient_accumulation_steps == 2, name


@pytest.mark.parametrize("name", STEP)
@settings(max_examples=60)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=50), st.integers(30, 70), st.integers(1, 3), st.integers(1, 9))
def test_accumulation_is_the_smallest_that_fits(name, lengths, capacity, ranks, examples_per_step):
    options = dict(strategy=name, max_tokens=capacity, world_size=ranks, examples_per_step=examples_per_step)
    found = make_plan(lengths, **options).gradient_accumulation_steps
    assert make_plan(lengths, gradient_accumulation_steps=found, **options).gradient_accumulation_steps == found
    for fewer in range(1, found):
        with pytest.raises(PlanError, match=r"step \d+ needs \d+ micro-batches"):
            make_plan(lengths, gradient_accumulation_steps=fewer, **options)


def test_explicit_accumulation_is_used_as_given():
    plan = make_plan([5] * 8, examples_per_step=8, gradient_accumulation_steps=4, world_size=3)
    assert plan.gradient_accumulation_steps == 4
    assert sorted(len(part) for part in plan.layout_of(0)) == [0] * 4 + [1] * 8


def test_epoch_scope_steps(sft_lengths):
    by_examples = make_plan(sft_lengths, strategy="bfd", max_tokens=2048, examples_per_step=64)
    packs = len(by_examples.scope.packs(0))
    assert by_examples.scope.packs_per_step == round(64 * packs / 2000)
    by_tokens = make_plan(sft_lengths, strategy="bfd", max_tokens=2048, tokens_per_step=10_000, world_size=2)
    assert by_tokens.scope.packs_per_step == 5 and by_tokens.gradient_accumulation_steps == 3
    by_ranks = make_plan(sft_lengths, strategy="bfd", max_tokens=2048, gradient_accumulation_steps=3, world_size=2)
    assert by_ranks.scope.packs_per_step == 6 and by_ranks.total_steps == math.ceil(packs / 6)


def test_epoch_scope_ranks_are_level(sft_lengths):
    """The dearest packs of an update share a micro-step, and no rank has the dearest of them all."""
    cost = Cost(linear=1, quadratic=0.01)
    plan = make_plan(sft_lengths, strategy="bfd", max_tokens=2048, tokens_per_step=2048 * 8, world_size=2, cost=cost)
    table = np.array([cost(part.lengths).sum() for part in plan.layout_of(3)]).reshape(4, 2)
    assert (table[:-1].min(axis=1) >= table[1:].max(axis=1)).all()
    assert abs(table[:, 0].sum() - table[:, 1].sum()) < (table.max(axis=1) - table.min(axis=1)).sum()


def test_a_users_strategy_in_a_plan(sft_lengths):
    plan = make_plan(sft_lengths, strategy="packtrain.packing.strategies:next_fit", max_tokens=2048)
    own = make_plan(sft_lengths, strategy="next_fit", max_tokens=2048)
    assert plan.total_steps == own.total_steps
    assert all(np.array_equal(plan.examples(step), own.examples(step)) for step in range(own.total_steps))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_tokens=0), "max_tokens: must be a positive integer"),
        (dict(max_tokens=2.5), "max_tokens: must be a positive integer"),
        (dict(examples_per_step=-1), "examples_per_step: must be"),
        (dict(world_size=0), "world_size: must be"),
        (dict(gradient_accumulation_steps=0), "gradient_accumulation_steps: must be"),
        (dict(gradient_accumulation_steps=True), "gradient_accumulation_steps: must be"),
        (dict(num_epochs=0), "num_epochs: must be"),
        (dict(num_epochs=float("nan")), "num_epochs: must be"),
        (dict(strategy="bdf"), "did you mean 'bfd'"),
        (dict(tokens_per_step=100), "counts the examples of an update"),
        (dict(max_tokens=8), r"example 1 has 9 tokens, more than max_tokens = 8"),
        (dict(max_tokens=8, strategy="bfd"), r"example 1 has 9 tokens"),
        (dict(strategy="pad_max", max_length=7), r"example 1 has 9 tokens, more than max_length = 7"),
        (dict(strategy="pad_max", max_length=50, max_tokens=40), "raise max_tokens to at least 50"),
        (dict(strategy="bfd", max_tokens=9, tokens_per_step=50, gradient_accumulation_steps=2), "6 per rank"),
        (dict(lengths=[4, 0]), "example 1 has no tokens"),
        (dict(lengths=[]), "no examples"),
        (dict(lengths=[4, -2]), "negative"),
        (dict(lengths=[4.0]), "integers"),
        (dict(lengths=np.array([np.nan])), "integers"),
    ],
)
def test_errors_say_what_and_how_to_fix_it(options, message):
    lengths = options.pop("lengths", [4, 9, 2])
    with pytest.raises(PlanError, match=message):
        make_plan(lengths, **options)


def test_wrapped_takes_examples_beyond_the_capacity():
    plan = make_plan([25, 3], strategy="wrapped", max_tokens=10, tokens_per_step=10)
    assert tokens_seen(plan, 0) == [(0, t) for t in range(25)] + [(1, t) for t in range(3)]


def test_padded_width_counts_against_the_capacity():
    plan = make_plan([5] * 8, strategy="pad_max", max_length=20, max_tokens=40, examples_per_step=8)
    assert plan.gradient_accumulation_steps == 4


def test_planning_needs_no_torch():
    code = (
        "import sys; from packtrain.packing.plan import make_plan; from packtrain.packing.report import describe;"
        "describe(make_plan([3, 4, 5])); sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_more_epochs_than_can_be_planned_are_refused(sft_lengths):
    with pytest.raises(PlanError, match="training.max_steps: is more than 100,000 epochs"):
        make_plan(sft_lengths, strategy="balanced", max_steps=10**12)


@pytest.mark.parametrize("rank", [2, 5, -1, 0.5, None])
def test_a_rank_that_the_plan_does_not_have_is_refused(rank):
    """Who forgets `world_size` asks for it first of all."""
    plan = make_plan([5, 6, 7, 8] * 8, world_size=2, examples_per_step=8, max_tokens=64)
    with pytest.raises(PlanError, match="rank: is not one of this plan's 2 ranks") as refused:
        plan.micro_batches(0, rank=rank)
    assert "world_size" in refused.value.fix
    assert plan.micro_batches(0, rank=1)


@pytest.mark.parametrize(
    "given", [{"seed": 1.5}, {"seed": "a"}, {"max_steps": 1.5}, {"max_steps": "3"}, {"num_epochs": "2"}]
)
def test_numbers_that_are_none_are_refused(given):
    (key,) = given
    with pytest.raises(PlanError, match=f"{key}: must be "):
        make_plan([5, 6], **given)
