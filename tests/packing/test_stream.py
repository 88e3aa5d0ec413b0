"""Streams: every row once over all ranks, bounded waiting, and a resume that continues exactly."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from itertools import islice

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from packtrain import PackedStream
from packtrain.errors import CheckpointError, DataError, PlanError
from packtrain.packing.collator import PackCollator
from packtrain.packing.stream import Stream

streams = st.fixed_dictionaries(
    {
        "rows": st.lists(st.integers(1, 20), max_size=60),
        "capacity": st.integers(20, 50),
        "buffer": st.integers(1, 12),
        "max_documents": st.sampled_from([None, 1, 3]),
        "world_size": st.integers(1, 4),
    }
)


def numbers(groups) -> list[list[list[int]]]:
    return [[[number for number, _ in pack] for pack in group] for group in groups]


@settings(max_examples=300)
@given(streams)
def test_every_row_once_within_capacity_and_as_many_packs_on_every_rank(options):
    rows = options["rows"]
    groups = list(Stream(length_of=int, **options))
    seen = [pair for group in groups for pack in group for pair in pack]
    assert sorted(seen) == list(enumerate(rows))
    assert all(len(group) == options["world_size"] for group in groups)
    for pack in (pack for group in groups for pack in group):
        assert sum(row for _, row in pack) <= options["capacity"]
        assert len(pack) <= (options["max_documents"] or len(rows))
    empty = [not pack for group in groups for pack in group]
    assert sum(empty) < options["world_size"] and sorted(empty) == empty


@settings(max_examples=300)
@given(streams, st.integers(0, 20), st.integers(1, 4), st.data())
def test_resume_continues_exactly_also_on_other_ranks(options, more, ranks_after, data):
    options["window"] = options["buffer"] + more
    whole = numbers(Stream(length_of=int, **options))
    stop = data.draw(st.integers(0, len(whole)))
    first = Stream(length_of=int, **options)
    iterator = iter(first)
    before = numbers(next(iterator) for _ in range(stop))
    state = json.loads(json.dumps(first.state_dict()))
    assert len(state["waiting"]) <= options["buffer"]
    second = Stream(length_of=int, **options)
    second.load_state_dict(state)
    if stop < len(whole) or state["waiting"] or state["rows_read"] < len(options["rows"]):
        assert before + numbers(second) == whole
    other = Stream(length_of=int, **options | {"world_size": ranks_after})
    other.load_state_dict(state)
    flat = [pack for group in numbers(other) for pack in group if pack]
    assert flat == [pack for group in whole[stop:] for pack in group if pack]


@settings(max_examples=200)
@given(streams, st.integers(0, 10))
def test_no_row_waits_longer_than_the_window(options, more):
    """While a row waits, only the `window` rows from it on have been read; without a limit more would be."""
    window = options["buffer"] + more
    reads = []

    class Rows(list):
        def __iter__(self):
            for number, row in enumerate(super().__iter__()):
                reads.append(number)
                yield row

    options |= {"rows": Rows(options["rows"]), "world_size": 1}
    for group in Stream(length_of=int, window=window, **options):
        assert all(max(reads) < number + window for number, _ in group[0])


def test_packs_are_nearly_full():
    import numpy as np

    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 0.9, 5000), 10, 2048).astype(int).tolist()
    packs = [pack for group in Stream(lengths, capacity=2048, length_of=int) for pack in group]
    fewest = -(-sum(lengths) // 2048)
    assert len(packs) <= 1.01 * fewest
    narrow = [pack for group in Stream(lengths, capacity=2048, length_of=int, buffer=4) for pack in group]
    assert len(narrow) > 1.03 * fewest


def test_by_hand():
    """Oldest first (6), then the longest that fits (4); the 5 and the 3 follow."""
    stream = Stream([6, 5, 4, 3], capacity=10, length_of=int, buffer=3)
    iterator = iter(stream)
    assert [row for _, row in next(iterator)[0]] == [6, 4]
    state = stream.state_dict()
    assert state.pop("hash")
    assert state == {"rows_read": 3, "waiting": [1]}
    assert [row for _, row in next(iterator)[0]] == [5, 3]


def test_empty_and_second_epoch():
    assert list(Stream([], capacity=10, length_of=int)) == []
    stream = Stream([3, 4], capacity=10, length_of=int)
    assert numbers(stream) == numbers(stream) == [[[0, 1]]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(capacity=0), "capacity: must be a positive integer"),
        (dict(buffer=0), "buffer: must be"),
        (dict(max_documents=0), "max_documents: must be"),
        (dict(window=3, buffer=4), "window: must be at least"),
        (dict(rows=iter([1])), "iterated only once"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(PlanError, match=message):
        Stream(**{"rows": [1], "capacity": 5, "length_of": int} | options)


@pytest.mark.parametrize(
    ("row", "message"), [(6, "row 1 of the stream: has 6 tokens, more than"), (0, "has no tokens")]
)
def test_rows_that_cannot_be_packed_are_named(row, message):
    with pytest.raises(DataError, match=message):
        list(Stream([1, row], capacity=5, length_of=int))


# ------------------------------------------------------------------------------------------------------ in torch

ROWS = [{"input_ids": list(range(10 * i, 10 * i + 2 + i % 7)), "labels": None} for i in range(40)]


def packed(rank=0, world_size=1):
    return PackedStream(ROWS, PackCollator(), capacity=20, buffer=8, rank=rank, world_size=world_size)


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("state", [{"rows_read": 9, "waiting": [7]}, {"rows_read": 4, "waiting": []}])
def test_a_state_of_more_rows_is_refused_instead_of_ending_at_once(state, skips):
    """An epoch without a pack would have been trained in silence."""
    rows = Dataset.from_list([{"n": 3}] * 3).to_iterable_dataset() if skips else [{"n": 3}] * 3
    stream = Stream(rows, capacity=8, length_of=lambda row: row["n"])
    stream.load_state_dict(state)
    with pytest.raises(DataError, match=f"rows: end before row {state['rows_read'] - 1}, which was read"):
        list(stream)
    stream.load_state_dict({"rows_read": 3, "waiting": []})  # the control: at the end of these rows
    assert list(stream) == []


@pytest.mark.parametrize("skips", [False, True])
def test_a_state_of_other_rows_is_refused(skips):
    """Rows that were sorted or swapped since would be trained twice, or not at all."""

    def packs_of(rows):
        source = Dataset.from_list(rows).to_iterable_dataset() if skips else rows
        return PackedStream(source, PackCollator(), capacity=20, buffer=8)

    rows = [row | {"labels": row["input_ids"]} for row in ROWS]
    first = packs_of(rows)
    before = [batch["example_ids"].tolist() for batch in islice(first, 4)]
    state = json.loads(json.dumps(first.state_dict()))
    again = packs_of(rows)
    again.load_state_dict(state)
    assert again.state_dict() == state
    after = [batch["example_ids"].tolist() for batch in again]
    assert sorted(number for ids in before + after for number in ids if number >= 0) == list(range(40))
    last = state["rows_read"] - 1
    for changed in (rows[::-1], [*rows[:last], rows[last + 1], rows[last], *rows[last + 2 :]]):
        other = packs_of(changed)
        other.load_state_dict(state)
        with pytest.raises(DataError, match="rows: are not those that were read when the state was taken"):
            list(other)
    old = packs_of(rows[::-1])
    old.load_state_dict({name: state[name] for name in ("rows_read", "waiting")})  # the control: a state without a hash
    assert list(old)


def test_a_state_from_the_end_of_the_rows_goes_on_with_their_beginning():
    """A Trainer ends where its loader gives nothing, and left the updates out that were to come."""
    first, ids = packed(), []
    for batch in first:
        ids.append(batch["example_ids"].tolist())
        state = first.state_dict()
    again = packed()
    again.load_state_dict(state)
    assert [batch["example_ids"].tolist() for batch in again] == ids


@pytest.mark.parametrize(
    "state", [{}, None, {"rows_read": 3}, {"rows_read": "a", "waiting": []}, {"rows_read": 3, "waiting": [3]}]
)
def test_what_is_no_state_is_refused(state):
    with pytest.raises(CheckpointError, match="is not the state of a stream"):
        Stream([3], capacity=8, length_of=int).load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_all_ranks_hold_every_row_once(workers):
    loaders = [DataLoader(packed(rank, 3), batch_size=None, num_workers=workers) for rank in range(3)]
    batches = [list(loader) for loader in loaders]
    assert len({len(own) for own in batches}) == 1
    ids = [i for own in batches for batch in own for i in batch["example_ids"].tolist()]
    assert sorted(i for i in ids if i >= 0) == list(range(40))
    tokens = torch.cat([b["input_ids"][0] for own in batches for b in own if b["example_ids"][0] >= 0])
    assert sorted(tokens.tolist()) == sorted(t for row in ROWS for t in row["input_ids"])
    if workers:
        alone = [batch["example_ids"].tolist() for batch in packed(0, 3)]
        assert [batch["example_ids"].tolist() for batch in batches[0]] == alone


def test_a_dataset_resumes_with_skip():
    """A streaming dataset skips by itself; the continuation is that of the whole."""
    import datasets

    rows = datasets.Dataset.from_list([{"input_ids": row["input_ids"]} for row in ROWS]).to_iterable_dataset()
    whole = [batch["input_ids"].tolist() for batch in PackedStream(rows, PackCollator(), capacity=20, buffer=8)]
    first = PackedStream(rows, PackCollator(), capacity=20, buffer=8)
    iterator = iter(first)
    head = [next(iterator)["input_ids"].tolist() for _ in range(3)]
    second = PackedStream(rows, PackCollator(), capacity=20, buffer=8)
    second.load_state_dict(first.state_dict())
    assert head + [batch["input_ids"].tolist() for batch in second] == whole
    with pytest.raises(PlanError, match="rank"):
        packed(rank=3, world_size=3)


def test_ranks_may_meet_after_the_packs_are_built(monkeypatch):
    """`TrainingArguments` starts torch.distributed; until then all ranks would read every pack."""
    packs, given = PackedStream(ROWS, PackCollator(), capacity=20, buffer=8), packed(0, 1)
    whole = [batch["example_ids"].tolist() for batch in packs]
    with monkeypatch.context() as met:
        for name, value in {"is_initialized": True, "get_rank": 1, "get_world_size": 2}.items():
            met.setattr(torch.distributed, name, lambda value=value: value)
        own = [batch["example_ids"].tolist() for batch in packs]
        sent = pickle.dumps(PackedStream(ROWS, PackCollator(), capacity=20, buffer=8))
        assert [batch["example_ids"].tolist() for batch in given] == whole
    assert own == [batch["example_ids"].tolist() for batch in packed(1, 2)] != whole
    assert [batch["example_ids"].tolist() for batch in pickle.loads(sent)] == own  # as a spawned worker gets it


def test_what_workers_have_read_is_not_asked_of_this_process():
    """Its own stream has not moved: a run that resumed from that state would read all rows again."""
    packs = packed()
    assert packs.state_dict() == {"rows_read": 0, "waiting": []}
    iterator = iter(DataLoader(packs, batch_size=None, num_workers=1))
    next(iterator)
    with pytest.raises(PlanError, match="data-loading workers(.|\n)*num_workers to 0"):
        packs.state_dict()
    del iterator
    next(iter(packs))  # control: read here
    assert packs.state_dict()["rows_read"] > 0


def test_rows_that_are_not_tokenised_are_named():
    with pytest.raises(DataError, match="row 1 of the stream: .*KeyError: 'input_ids'(.|\n)*tokenise the rows first"):
        list(PackedStream([ROWS[0], {"text": "two"}], PackCollator(), capacity=20))


def test_a_collator_without_an_empty_batch_is_refused():
    """A rank without a pack in the last group needs one, long after the start."""
    with pytest.raises(PlanError, match="collator: must be a PackCollator .got 'function'"):
        PackedStream(ROWS, lambda rows: rows, capacity=20)  # ty: ignore[invalid-argument-type]


def rows_of(shards):
    for shard in shards:
        yield from ({"input_ids": row["input_ids"]} for row in ROWS[shard])


SLOW = [pytest.mark.slow, pytest.mark.ci]  # torch waits for workers that have failed


@pytest.mark.parametrize(
    "shards",
    [
        pytest.param([slice(40)], id="one shard"),
        pytest.param([slice(25), slice(25, 40)], id="two shards", marks=SLOW),
    ],
)
def test_rows_that_share_themselves_out_among_workers_are_refused(shards):
    """`datasets` gives each of several workers its own shards, and every worker must read all rows."""
    import datasets

    rows = datasets.IterableDataset.from_generator(rows_of, gen_kwargs={"shards": shards})
    assert rows.num_shards == len(shards)

    def read(workers: int) -> list[int]:
        packs = PackedStream(rows, PackCollator(), capacity=20, buffer=8)
        batches = DataLoader(packs, batch_size=None, num_workers=workers)
        return sorted(token for batch in batches for token in batch["input_ids"][0].tolist())

    assert read(0) == read(1) == sorted(token for row in ROWS for token in row["input_ids"])
    with pytest.raises(PlanError, match="num_workers: .*data-loading workers"):
        read(2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_would_collate_packs_again_is_refused(workers):
    """Torch would fail to stack them, or, of one at a time, give a model three dimensions."""
    for size in (1, 8):
        with pytest.raises(PlanError, match="batches already(.|\n)*DataLoader.packs, batch_size=None."):
            next(iter(DataLoader(packed(), batch_size=size, num_workers=workers)))
    assert len(next(iter(DataLoader(packed(), batch_size=None, num_workers=workers)))["input_ids"]) == 1  # control


@pytest.mark.parametrize("prepared", ["shard", "dispatcher"])
def test_packs_that_would_be_dealt_to_ranks_again_are_refused(prepared):
    """What `accelerator.prepare` makes of a loader on two ranks; each would take half of its own packs."""
    from accelerate.data_loader import DataLoaderDispatcher, IterableDatasetShard

    def read(packs: PackedStream):
        shard = IterableDatasetShard(packs, num_processes=2, process_index=0)
        loader = DataLoader(shard if prepared == "shard" else packs, batch_size=None)
        if prepared == "dispatcher":
            loader = DataLoaderDispatcher(packs, batch_size=None)
        return next(iter(loader))

    with pytest.raises(PlanError, match="rows are lost(.|\n)*don't hand it the loader"):
        read(packed(0, 2))


@pytest.mark.ci
@pytest.mark.slow
def test_a_stock_trainer_takes_the_packs_as_they_are(tmp_path):
    """The example of the module's docstring: one epoch, every row in one step, and a second one when steps are left."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    class StreamTrainer(Trainer):
        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, batch_size=None)

        def training_step(self, model, inputs, *args, **kwargs):
            seen.append(inputs["example_ids"].tolist())
            losses.append(super().training_step(model, inputs, *args, **kwargs).item())
            return torch.tensor(losses[-1])

    torch.manual_seed(0)
    seen, losses, packs = [], [], packed()
    epoch = [batch["example_ids"].tolist() for batch in packed()]
    config = LlamaConfig(
        vocab_size=512, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=len(epoch) + 2, ignore_data_skip=True, learning_rate=1e-2,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    StreamTrainer(LlamaForCausalLM(config), arguments, train_dataset=packs).train()
    assert seen == epoch + epoch[:2]
    assert sorted(i for batch in epoch for i in batch) == list(range(len(ROWS)))
    assert all(0 < loss < 20 for loss in losses)
    assert losses[len(epoch)] < losses[0]  # the same pack, an epoch later
    assert packs.state_dict()["rows_read"] > 0


@pytest.mark.slow
def test_two_ranks_see_every_row_once(tmp_path):
    """Stock trainers under torchrun: 25 rows of 4 pairs of packs or fewer; the ranks keep the same weights."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    words = [*command, "tests.programs.streamed_ranks", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [rank["ranks"] for rank in ranks] == [2, 2]
    assert len(ranks[0]["seen"]) == len(ranks[1]["seen"]) == 4
    pairs = [one + other for one, other in zip(*(rank["seen"] for rank in ranks), strict=True)]
    epoch = [row for pair in pairs for row in pair][:25]
    assert sorted(epoch) == list(range(25)), "every row once, before any a second time"
    assert all(rank["seen"][0] for rank in ranks) and ranks[0]["weights"] == ranks[1]["weights"]
