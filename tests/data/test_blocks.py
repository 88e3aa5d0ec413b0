"""Blocks of streamed rows: the examples of rows that are counted, in their order, from wherever a block begins."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from packtrain.data.blocks import Block, Blocks, Start
from packtrain.data.encoding import make_encoder
from packtrain.data.examples import Examples, build_examples
from packtrain.data.sources import open_rows
from packtrain.data.streamed_examples import StreamedExamples
from packtrain.data.streams import open_stream
from packtrain.errors import DataError

LONG = "one two three four five six seven " * 3


def row(number: int) -> dict | str:
    """Mostly short; some long, every 13th broken, every 7th a long prompt of which a cut leaves nothing to learn."""
    if number % 13 == 5:
        return '{"prompt": 3, "completion": "x"}' if number % 2 else "{"
    if number % 7 == 3:
        return {"prompt": LONG * 2, "completion": str(number)}
    return {"prompt": f"{number}? ", "completion": LONG * (number % 4) if number % 3 == 0 else f"It is {number}."}


def blocks_of(path, tokenizer, *, step=4, size=12, overflow="split", on_bad_row="skip", max_length=20) -> Blocks:
    encoder, notes = make_encoder(["prompt", "completion"], tokenizer)
    choices = dict(max_length=max_length, overflow=overflow, on_bad_row=on_bad_row)
    return Blocks(open_stream(str(path)), encoder, buffer_size=size, examples_per_step=step, notes=notes, **choices)


def epoch(blocks: Blocks) -> list[Block]:
    """The blocks of the first epoch."""
    found = [blocks.first()]
    while found[-1].next.epoch == 0:
        found.append(blocks.holding(found[-1].next.update))
        if found[-1].start.epoch:  # the rows ended with the block before
            return found[:-1]
    return found


def contents(examples: Examples) -> list[tuple[list[int], list[int]]]:
    return [(example["input_ids"].tolist(), example["labels"].tolist()) for example in examples]


@pytest.mark.parametrize("overflow", ["split", "truncate", "drop"])
def test_blocks_are_the_counted_examples_in_their_order(write_rows, tokenizer, overflow):
    """And so are the counts, whatever the size of a block."""
    path = write_rows(*map(row, range(90)))
    choices = dict(max_length=20, overflow=overflow, on_bad_row="skip")
    counted = build_examples(open_rows(path), tokenizer, **choices)
    told = counted.report
    for step, size in ((4, 12), (1, 1), (7, 20), (3, 1000)):
        blocks = blocks_of(path, tokenizer, step=step, size=size, overflow=overflow)
        found = epoch(blocks)
        assert sum((contents(block.examples) for block in found), []) == contents(counted)
        assert (
            np.concatenate([block.examples.rows + block.start.row for block in found]).tolist() == counted.rows.tolist()
        )
        assert [len(block.examples) for block in found[:-1]] == [blocks.size] * (len(found) - 1)
        assert blocks.size == -(-size // step) * step
        report = blocks.report()
        same = replace(told, files=(), notes=(), skipped=told.skipped[:10], more_skipped=len(told.skipped) - 10)
        if len(told.skipped) <= 10:
            same = replace(same, skipped=told.skipped, more_skipped=0)
        assert replace(report, notes=()) == same
        assert report.notes[1:] == told.notes and report.notes[0].startswith("streamed from rows.jsonl: ")
        again = blocks.holding(found[-1].updates.stop)  # the second epoch
        assert (again.start.epoch, again.start.row, again.start.updates_in_epoch) == (1, 0, found[-1].updates.stop)
        assert contents(again.examples) == contents(found[0].examples)
        assert blocks.report() == report  # rows are counted once


def test_a_block_is_read_again_from_where_it_begins(write_rows, tokenizer):
    """By way of JSON, also in the middle of a row that was split, ahead of time, and in a later epoch."""
    path = write_rows(*map(row, range(60)))
    blocks, inside = blocks_of(path, tokenizer, step=1, size=2), 0
    update = 0
    while (block := blocks.holding(update)).start.epoch < 2:
        start = Start.of(json.loads(json.dumps(asdict(block.start))))
        assert start == block.start
        other = blocks_of(path, tokenizer, step=1, size=2)
        other.go_on_from(start)
        same = other.holding(update)
        assert contents(same.examples) == contents(block.examples)
        assert (same.next, same.digest) == (block.next, block.digest)
        other.read_ahead(same)
        assert contents(other.holding(same.updates.stop).examples) == contents(
            blocks.holding(block.updates.stop).examples
        )
        assert other.state_after(update + 1) == blocks.state_after(update + 1)
        inside += start.piece > 0
        update = block.updates.stop
    assert inside > 4


def test_rows_before_a_block_are_skipped_without_being_tokenised(write_rows, tokenizer):
    """A row that was changed before it changes the hash alone; control: in the block, the examples too."""
    lines = [json.dumps({"prompt": f"{n}? ", "completion": "ok"}) for n in range(40)]
    start = blocks_of(write_rows(*lines), tokenizer).holding(6).start
    assert start.row == 24

    def read(changed: int) -> Block:
        blocks = blocks_of(write_rows(*lines[:changed], "no row at all", *lines[changed + 1 :]), tokenizer)
        blocks.go_on_from(start)
        return blocks.holding(6)

    before, within = read(3), read(27)
    assert contents(before.examples) != contents(within.examples)
    assert before.next.tally.bad_rows == 0 and within.next.tally.bad_rows == 1
    whole = blocks_of(write_rows(*lines), tokenizer)
    whole.go_on_from(start)
    assert contents(whole.holding(6).examples) == contents(before.examples)
    assert len({whole.holding(6).digest, before.digest, within.digest}) == 3


def test_rows_that_cannot_be_trained_on_end_the_reading(write_rows, tokenizer):
    good = [json.dumps({"prompt": f"{n}? ", "completion": "ok"}) for n in range(20)]
    late = blocks_of(write_rows(*good, '{"prompt": 3, "completion": "x"}', *good), tokenizer, on_bad_row="error")
    late.first()  # 12 rows
    with pytest.raises(
        DataError, match=r"data.on_bad_row: 1 of .* rows cannot be trained on:\n    rows.jsonl, line 21: "
    ):
        late.holding(3)
    long = blocks_of(write_rows(*good, json.dumps({"prompt": LONG, "completion": LONG})), tokenizer, overflow="error")
    with pytest.raises(DataError, match=r"data.overflow: 1 of .*\n    rows.jsonl, line 21: \d+ tokens"):
        long.holding(8)
    with pytest.raises(DataError, match="more than half, cannot be trained on"):
        blocks_of(write_rows(*["no JSON"] * 9, *good[:4]), tokenizer).first()
    dropped = blocks_of(write_rows(*[json.dumps({"prompt": LONG, "completion": LONG})] * 3), tokenizer, overflow="drop")
    with pytest.raises(DataError, match=r"none of 3 rows is left to train on \(got \['rows.jsonl'\]\)"):
        dropped.first()


def test_rows_that_change_between_epochs_are_refused(write_rows, tokenizer):
    good = [json.dumps({"prompt": f"{n}? ", "completion": "ok"}) for n in range(20)]
    blocks = blocks_of(write_rows(*good), tokenizer)
    assert blocks.holding(4).next.epoch == 1
    write_rows(*good[:-1], '{"prompt": "x", "completion": "y"}')
    blocks.holding(5)  # the first block of the second epoch is as it was
    with pytest.raises(DataError, match="data.path: has other rows than in the first epoch"):
        blocks.holding(9)


def test_examples_are_looked_up_by_their_numbers_in_the_run(write_rows, tokenizer):
    path = write_rows(*map(row, range(60)))
    examples = StreamedExamples(blocks_of(path, tokenizer), 20)
    counted = build_examples(open_rows(path), tokenizer, max_length=20, overflow="split", on_bad_row="skip")
    examples.blocks.holding(4)  # examples 12 to 23, and those before
    for ids in ([3, 1], [23, 12]):
        for mine, theirs in zip(examples.gather(ids), counted.gather(ids), strict=True):
            np.testing.assert_array_equal(mine, theirs)
        assert examples.rows[np.array(ids)].tolist() == counted.rows[ids].tolist()
        assert examples.supervised[np.array(ids)].tolist() == counted.supervised[ids].tolist()
    assert len(examples) == 24
    for ids in ([11, 12], [24]):
        with pytest.raises(DataError, match="are not at hand"):
            examples.gather(ids)


def test_a_source_without_an_end_is_read_as_far_as_it_is_needed(tokenizer):
    """A trillion rows; control: the block in their middle is another one."""
    encoder, _ = make_encoder(["prompt", "completion"], tokenizer)
    source = open_stream("packtrain:arithmetic", num_rows=10**12)
    blocks = Blocks(
        source, encoder, buffer_size=8, examples_per_step=4, max_length=256, overflow="drop", on_bad_row="error"
    )
    first = contents(blocks.first().examples)
    blocks.go_on_from(Start(block=10**11, update=2 * 10**11, example=8 * 10**11, row=8 * 10**11))
    assert contents(blocks.holding(2 * 10**11).examples) != first
    assert blocks.report().rows < 20
