"""Short examples first: every example once and whole, as many tokens in every update, the same examples on any ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from packtrain.errors import PlanError
from packtrain.packing.accumulation import micro_batch_tokens
from packtrain.packing.phases import plan_phases
from packtrain.packing.plan import Plan, make_plan
from packtrain.packing.report import describe_phases
from packtrain.packing.strategies import STRATEGIES

STEP = [name for name, strategy in STRATEGIES.items() if strategy.scope == "step"]
SCHEDULE = [(0.06, 64), (0.4, 256)]


def first_epoch(plan: Plan) -> list[np.ndarray]:
    return [plan.examples(step) for step in range(plan.steps_in_epoch(0))]


def tokens_of(plan: Plan, step: int) -> list[int]:
    """Tokens that every micro-batch of an update computes, padding included."""
    width = plan.scope.width
    return [micro_batch_tokens(part.lengths, plan.scope.strategy, width) for part in plan.layout_of(step)]


@pytest.mark.parametrize("strategy", STEP)
@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=20, max_size=80),
    limits=st.lists(st.integers(8, 40), min_size=1, max_size=3, unique=True),
    taken=st.floats(0.1, 0.9),
    capacity=st.sampled_from([40, 41, 100]),
    examples_per_step=st.integers(1, 12),
    world_size=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 2**40),
)
def test_every_example_is_seen_once_and_whole_and_micro_batches_fit(
    strategy, lengths, limits, taken, capacity, examples_per_step, world_size, seed
):
    schedule, until, array = [], 0.0, np.array(lengths)
    for limit in sorted(limits):  # each phase takes this share of what there may be for it, as far as rounding lets it
        until += taken * max(0.0, array[array <= limit].sum() / array.sum() - until)
        schedule.append((until, limit))
    settings = dict(
        strategy=strategy, seed=seed, examples_per_step=examples_per_step, max_tokens=capacity, num_epochs=2
    )
    try:
        plan = make_plan(lengths, schedule=schedule, world_size=world_size, **settings)
    except PlanError as error:
        assert error.key.startswith("batching.schedule.") and error.fix
        event("refused")
        return
    plain = make_plan(lengths, **settings)
    found, after = first_epoch(plan), plan.steps_in_epoch(0)
    assert sorted(np.concatenate(found).tolist()) == list(range(len(lengths)))
    for step in range(plan.total_steps):
        parts = plan.layout_of(step)
        assert len(parts) == world_size * plan.gradient_accumulation_steps
        assert sorted(i for part in parts for i in part.example_ids) == sorted(plan.examples(step).tolist())
        assert all((part.starts == 0).all() and (part.stops == plan.lengths[part.example_ids]).all() for part in parts)
        assert max(tokens_of(plan, step)) <= capacity
    for step in range(after, plan.total_steps):  # the second epoch is that of a plan without a schedule
        assert (plan.examples(step) == plain.examples(step - after + plain.steps_in_epoch(0))).all()


def test_phases_have_short_examples_and_updates_the_same_tokens(sft_lengths):
    """Control: without a schedule the first updates have long examples, too."""
    options = dict(examples_per_step=32, max_tokens=4096)
    plan, plain = make_plan(sft_lengths, schedule=SCHEDULE, **options), make_plan(sft_lengths, **options)
    reports, step = describe_phases(plan), 0
    assert describe_phases(plain) == [] and len(reports) == 3
    wanted = 32 * sft_lengths.mean()
    for report, bound in zip(reports, (64, 256, 1024), strict=True):
        steps = range(step, step + report.updates)
        tokens = [int(sft_lengths[plan.examples(each)].sum()) for each in steps]
        assert max(int(sft_lengths[plan.examples(each)].max()) for each in steps) == report.longest <= bound
        assert np.mean(tokens[:-1]) == pytest.approx(wanted, rel=0.08)
        assert sum(len(plan.examples(each)) for each in steps) == report.examples
        assert [len(plan.examples(each)) for each in steps[:-1]] == [report.examples_per_update] * (report.updates - 1)
        step += report.updates
    assert step == plan.total_steps == pytest.approx(plain.total_steps, abs=3)
    assert [round(report.until, 2) for report in reports] == pytest.approx([0.06, 0.4, 1.0], abs=0.02)
    assert reports[0].examples_per_update > 2 * reports[1].examples_per_update > 2 * reports[2].examples_per_update
    assert max(sft_lengths[plain.examples(0)]) > 256
    mixed = [bool((sft_lengths[plan.examples(step)] <= 64).any()) for step in range(plan.total_steps)]
    assert mixed[reports[0].updates], "short examples that the first phase left are in the second"


def test_the_examples_are_those_of_any_layout_and_world_size(sft_lengths):
    one = make_plan(sft_lengths, schedule=SCHEDULE, examples_per_step=32, max_tokens=4096)
    for strategy in STEP:
        other = make_plan(
            sft_lengths, schedule=SCHEDULE, strategy=strategy, examples_per_step=32, max_tokens=8192, world_size=4
        )
        assert other.hash == one.hash and other.total_steps == one.total_steps
        for step in (0, 3, 17, one.total_steps - 1):
            assert (other.examples(step) == one.examples(step)).all()
    for changed in ({"schedule": None}, {"schedule": SCHEDULE[:1]}, {"schedule": SCHEDULE, "seed": 1}):
        assert make_plan(sft_lengths, examples_per_step=32, max_tokens=4096, **changed).hash != one.hash


@pytest.mark.parametrize("strategy", ["balanced", "pad_longest", "group_by_length"])
def test_micro_batches_are_as_few_as_fit_in_every_phase(sft_lengths, strategy):
    """Also where the phase of short examples is the one that needs most of them."""
    lengths = np.concatenate([np.full(1500, 8), sft_lengths])
    settings = dict(strategy=strategy, schedule=[(0.02, 8)], examples_per_step=32, max_tokens=1200, world_size=2)
    plan = make_plan(lengths, **settings)
    fewer = plan.gradient_accumulation_steps - 1
    with pytest.raises(PlanError, match=rf"step \d+ needs {plan.gradient_accumulation_steps} micro-batches"):
        make_plan(lengths, gradient_accumulation_steps=fewer, **settings)
    given = make_plan(lengths, gradient_accumulation_steps=plan.gradient_accumulation_steps, **settings)
    assert all(max(tokens_of(given, step)) <= 1200 for step in range(given.total_steps))


@pytest.mark.parametrize(
    ("schedule", "key", "what"),
    [
        ([(0.4, 64), (0.2, 256)], "1.until", "above that of the phase before"),
        ([(1.0, 64)], "0.until", "below 1"),
        ([(0.2, 256), (0.4, 64)], "1.max_length", "short examples come first"),
        ([(0.5, 64)], "0.until", "takes .* examples of at most 64 tokens, and .* are left for it"),
        ([(0.1, 4)], "0.until", "and 0 are left"),
    ],
)
def test_what_is_refused_says_why_and_what_to_do(sft_lengths, schedule, key, what):
    with pytest.raises(PlanError, match=what) as refused:
        make_plan(sft_lengths, schedule=schedule)
    assert refused.value.key == f"batching.schedule.{key}" and refused.value.fix


def test_the_share_that_is_suggested_fits(sft_lengths):
    with pytest.raises(PlanError, match="set it to at most 0.0") as refused:
        plan_phases(sft_lengths, [(0.5, 64)], examples_per_step=32)
    share = float(refused.value.fix.split("at most ")[1].split(",")[0])
    first, _ = plan_phases(sft_lengths, [(share, 64)], examples_per_step=32)
    assert first.examples > 0.8 * (sft_lengths <= 64).sum()
    with pytest.raises(PlanError, match="are left"):
        plan_phases(sft_lengths, [(share + 0.04, 64)], examples_per_step=32)


def test_packers_of_the_epoch_have_no_phases(sft_lengths):
    with pytest.raises(PlanError, match="'bfd'.* packs mix lengths") as refused:
        make_plan(sft_lengths, strategy="bfd", schedule=SCHEDULE)
    assert refused.value.key == "batching.schedule"
