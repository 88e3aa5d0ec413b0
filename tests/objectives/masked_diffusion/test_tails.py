"""Tails, token by token: one eos behind every answer, the cycle from there on, and nobody's filler."""

from __future__ import annotations

import datasets
import numpy as np
import pytest

from packtrain.data.examples import Examples
from packtrain.errors import DataError
from packtrain.objectives.masked_diffusion.tails import (
    CONTENT,
    EOS,
    PROMPT,
    TAIL,
    Canvas,
    Tail,
    TailedExamples,
    parts_of,
)
from tests.data.helpers import make_tokenizer

E = 9  # eos
P = (20, 21, 22)  # pads


def examples(*rows: tuple[list[int], list[int]]) -> Examples:
    """(prompt, answer) pairs."""
    made = [{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, a in rows]
    return Examples.from_dataset(datasets.Dataset.from_list(made))


TWO = (([1, 2], [3, 4, 5]), ([1], [6]))


@pytest.mark.parametrize(
    ("kind", "pads", "first", "second"),
    [
        ("eos", (), [1, 2, 3, 4, 5, E, E, E, E], [1, 6, E, E, E, E, E, E]),
        ("single", P[:1], [1, 2, 3, 4, 5, E, 20, 20, 20], [1, 6, E, 20, 20, 20, 20, 20]),
        ("void", P[:1], [1, 2, 3, 4, 5, E, 20, 20, 20], [1, 6, E, 20, 20, 20, 20, 20]),
        ("rainbow", P, [1, 2, 3, 4, 5, E, 20, 21, 22], [1, 6, E, 20, 21, 22, 20, 21]),
        ("rainbow", P[:2], [1, 2, 3, 4, 5, E, 20, 21, 20], [1, 6, E, 20, 21, 20, 21, 20]),
    ],
)
def test_the_tail_begins_at_the_eos_of_each_document(kind, pads, first, second):
    tail = Tail(kind=kind, eos_token_id=E, pad_token_ids=pads)
    tailed = TailedExamples(examples(*TWO), tail, Canvas(policy="fixed", size=7))
    assert tailed.lengths.tolist() == [9, 8]
    assert tailed.supervised.tolist() == [7, 7]
    ids, labels = tailed.gather([1, 0])
    assert ids.tolist() == second + first
    assert labels.tolist() == [-100, *second[1:], -100, -100, *first[2:]]


def test_no_tail_is_the_eos_alone():
    tailed = TailedExamples(examples(*TWO), Tail(kind="none", eos_token_id=E))
    assert tailed.gather([0, 1])[0].tolist() == [1, 2, 3, 4, 5, E, 1, 6, E]


def test_random_tails_use_all_pads_and_belong_to_the_example():
    tail = Tail(kind="random", eos_token_id=E, pad_token_ids=P)
    tailed = TailedExamples(examples(*TWO), tail, Canvas(policy="fixed", size=60), seed=3)
    drawn = [tailed[i]["input_ids"][-40:].tolist() for i in (0, 1)]
    assert all(set(tokens) == set(P) for tokens in drawn) and drawn[0] != drawn[1]
    again = TailedExamples(examples(*TWO), tail, Canvas(policy="batch_max"), seed=3)
    assert again.gather([0], stops=[30])[0].tolist() == tailed[0]["input_ids"][:30].tolist()


@pytest.mark.parametrize(
    ("policy", "size", "expected"),
    [("fixed", 8, [8, 8]), ("multiple_of", 3, [6, 3]), ("multiple_of", 4, [4, 4]), ("batch_max", None, [4, 2])],
)
def test_canvas_policies(policy, size, expected):
    needed = np.array([4, 2])  # three and one tokens of answer, and the eos
    assert Canvas(policy=policy, size=size).lengths(needed).tolist() == expected


def test_sampled_canvases_cover_their_range_evenly():
    lengths = Canvas(policy="sampled", size=6).lengths(np.full(6000, 3), seed=1)
    counts = np.bincount(lengths)
    assert counts[:3].sum() == 0 and len(counts) == 7
    assert np.all(np.abs(counts[3:] - 1500) < 150)
    assert not np.array_equal(lengths, Canvas(policy="sampled", size=6).lengths(np.full(6000, 3), seed=2))


def test_the_longest_document_of_an_update_has_an_eos_too():
    tailed = TailedExamples(
        examples(*TWO), Tail(kind="rainbow", eos_token_id=E, pad_token_ids=P), Canvas(policy="batch_max")
    )
    longest = tailed.lengths.max()
    ids, _ = tailed.gather([0, 1], stops=[longest, longest])
    assert ids.reshape(2, -1).tolist() == [[1, 2, 3, 4, 5, E], [1, 6, E, 20, 21, 22]]


@pytest.mark.parametrize("ends", [[], [E], [E, E, E]])
def test_there_is_one_eos_however_the_answer_ended(ends):
    tail = Tail(kind="single", eos_token_id=E, pad_token_ids=P[:1])
    tailed = TailedExamples(examples(([1], [3, 4, *ends])), tail, Canvas(policy="fixed", size=5))
    assert tailed[0]["input_ids"].tolist() == [1, 3, 4, E, 20, 20]


def test_what_follows_the_answer_is_no_part_of_it():
    """A chat template's last newline, and an eos within an earlier turn."""
    row = {"input_ids": [1, 3, E, 2, 4, 5, E, 7], "labels": [-100, 3, E, -100, 4, 5, E, -100]}
    made = Examples.from_dataset(datasets.Dataset.from_list([row]))
    tailed = TailedExamples(made, Tail(kind="eos", eos_token_id=E), Canvas(policy="fixed", size=4))
    assert tailed[0]["input_ids"].tolist() == [1, 3, E, 2, 4, 5, E, E]
    assert tailed[0]["labels"].tolist() == [-100, 3, E, -100, 4, 5, E, E]
    assert tailed.supervised.tolist() == [6]


CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>BEHIND{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize("behind", ["", "\n", " \n\n"])
@pytest.mark.parametrize("answer", ["four", "four\n"])
@pytest.mark.parametrize("chosen", [{}, {"overflow": "drop", "max_length": 40}], ids=["all", "a view"])
def test_a_chat_template_may_put_blanks_behind_its_eos(build, behind, answer, chosen):
    """ChatML ends every turn, the last one too, in an eos and a newline."""
    tokenizer = make_tokenizer(chat_template=CHATML.replace("BEHIND", behind), bos=False, eos_token="<|end|>")
    rows = [{"question": "one", "answer": answer}, {"question": "one " * 50, "answer": answer}]
    made = build(rows, tokenizer, **chosen)
    tail = Tail(kind="eos", eos_token_id=tokenizer.eos_token_id)
    tailed = TailedExamples(made, tail, Canvas(policy="multiple_of", size=8))
    turn = f"<|user|>\none<|end|>{behind}<|assistant|>\n"
    shown = tailed[0]
    learnt = shown["labels"] != -100
    assert tokenizer.decode(shown["input_ids"][~learnt]) == turn
    assert tokenizer.decode(shown["input_ids"][learnt]).replace("<|end|>", "") == answer
    parts = parts_of(shown["input_ids"], shown["labels"], tailed.lengths[:1], tail)
    assert tokenizer.decode(shown["input_ids"][parts == CONTENT]) == answer and (parts == EOS).sum() == 1
    # a causal model learns what the template renders, to its last token
    assert tokenizer.decode(made[0]["input_ids"][made[0]["labels"] != -100]) == f"{answer}<|end|>{behind}"


def test_blanks_that_no_eos_stands_before_belong_to_the_answer(build):
    template = CHATML.replace("<|end|>BEHIND", "\n")
    tokenizer = make_tokenizer(chat_template=template, bos=False, eos_token="<|end|>")
    tail = Tail(kind="none", eos_token_id=tokenizer.eos_token_id)
    tailed = TailedExamples(build([{"question": "one", "answer": "four"}], tokenizer), tail)
    assert tokenizer.decode(tailed[0]["input_ids"]) == "<|user|>\none\n<|assistant|>\nfour\n<|end|>"


def test_an_empty_answer_is_an_eos():
    tailed = TailedExamples(examples(([1, 2], [E])), Tail(kind="eos", eos_token_id=E), Canvas(policy="fixed", size=2))
    assert tailed[0]["input_ids"].tolist() == [1, 2, E, E]


@pytest.mark.parametrize(("kind", "pads"), [("eos", ()), ("rainbow", P), ("none", ())])
def test_parts(kind, pads):
    tail = Tail(kind=kind, eos_token_id=E, pad_token_ids=pads)
    canvas = None if kind == "none" else Canvas(policy="fixed", size=5)
    tailed = TailedExamples(examples(*TWO), tail, canvas)
    ids, labels = tailed.gather([0, 1])
    expected = [PROMPT, PROMPT, CONTENT, CONTENT, CONTENT, EOS, TAIL, PROMPT, CONTENT, EOS, TAIL, TAIL, TAIL]
    if kind == "none":
        expected = [part for part in expected if part != TAIL]
    assert parts_of(ids, labels, tailed.lengths, tail).tolist() == expected


def test_the_report_counts_the_tails():
    tailed = TailedExamples(examples(*TWO), Tail(kind="eos", eos_token_id=E), Canvas(policy="fixed", size=7))
    assert tailed.report.tokens == 17 and tailed.report.supervised_tokens == 14
    assert tailed.report.lines()[-1] == "tails: eos, canvas fixed: 10 of 17 tokens are eos and tail"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Tail(kind="single", eos_token_id=E, pad_token_ids=P),
        lambda: Tail(kind="void", eos_token_id=E, pad_token_ids=P),
        lambda: Tail(kind="void", eos_token_id=E),
        lambda: Tail(kind="rainbow", eos_token_id=E, pad_token_ids=(E, 20)),
        lambda: Tail(kind="rainbow", eos_token_id=E, pad_token_ids=(20, 20)),
        lambda: Canvas(policy="fixed"),
        lambda: Canvas(policy="batch_max", size=4),
        lambda: Canvas(policy="fixed", size=3).lengths(np.array([2, 4])),
        lambda: TailedExamples(examples(*TWO), Tail(kind="eos", eos_token_id=E)),
        lambda: TailedExamples(
            examples(([1], [20])),
            Tail(kind="single", eos_token_id=E, pad_token_ids=(20,)),
            Canvas(policy="fixed", size=9),
        ),
        lambda: TailedExamples(
            Examples.from_dataset(
                datasets.Dataset.from_list([{"input_ids": list(range(8))}]), max_length=4, overflow="truncate"
            ),
            Tail(kind="eos", eos_token_id=E),
            Canvas(policy="fixed", size=9),
        ),
    ],
)
def test_refusals(make):
    with pytest.raises(DataError):
        make()
