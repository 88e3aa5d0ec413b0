"""Token ids, labels and counts of every row format under every loss mask and overflow, and the batches made of them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from packtrain import PackCollator
from packtrain.data.examples import Examples, build_examples
from packtrain.data.sources import open_rows
from packtrain.errors import PacktrainError
from packtrain.modeling.tokenizer import train_bpe
from packtrain.packing.bounds import Bounds
from tests.golden.store import facts, load, plain, save

CORPUS = [
    "What is 2+2? It is 4. What is 30 + 12? It is 42.",
    "Question: how many coins does Mia have now? Answer: the sum of two numbers",
    "one two three four five six seven; be short, be kind, and say what is so",
]
USER, MIA = {"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4."}
MORE = [{"role": "user", "content": "and 30 + 12?"}, {"role": "assistant", "content": "It is 42, the sum."}]
SYSTEM = {"role": "system", "content": "be short"}
TURNS = [{"from": "human", "value": "What is 2+2?"}, {"from": "gpt", "value": "It is 4."}]
PARTS = {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "so?"}]}
ROWS: dict[str, list[dict]] = {
    "messages": [
        {"messages": [USER, MIA]},
        {"messages": [SYSTEM, USER, MIA, *MORE]},
        {"messages": [PARTS, {"role": "assistant", "content": "größer 😀\n"}], "source": "unused"},
    ],
    "prompt_completion": [
        {"prompt": "What is 2+2?", "completion": " It is 4."},
        {"prompt": "one two", "completion": "three four five six seven and the sum of two numbers"},
        {"prompt": "how many co", "completion": "ins"},
    ],
    "prompt_completion of messages": [
        {"prompt": [USER], "completion": [MIA]},
        {"prompt": [SYSTEM, USER, MIA, MORE[0]], "completion": [MORE[1]]},
    ],
    "sharegpt": [
        {"conversations": TURNS},
        {"conversations": [{"from": "system", "value": "be kind"}, *TURNS, *TURNS]},
        {"conversations": [USER, MIA]},
    ],
    "alpaca": [
        {"instruction": "say what is so", "output": "one two", "input": ""},
        {"instruction": "add", "output": "It is 42.", "input": "30 + 12"},
    ],
    "question_answer": [
        {"question": "What is 2+2?", "answer": "It is 4."},
        {"question": "how many coins?", "answer": "three"},
    ],
    "text": [{"text": "What is 2+2? It is 4."}, {"text": "seven"}, {"text": "größer 😀 than\n\n one"}],
    "input_ids": [
        {"input_ids": [7, 8, 9, 10]},
        {"input_ids": [7, 8, 9, 10, 2], "labels": [-100, -100, 9, 10, 2]},
        {"input_ids": [7, 8, 9], "completion_mask": [0, 1, 1]},
        {"input_ids": [7, 8, 9, 11], "completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 1, 0, 1]},
        {"input_ids": [7, 8], "attention_mask": [1, 1]},
    ],
}
BAD_ROWS: dict[str, list[Any]] = {
    "messages": ["{broken", {"messages": []}, {"messages": [{"role": "boss", "content": "x"}]}, {"messages": "x"}],
    "prompt_completion": [{"prompt": "x"}, {"prompt": "", "completion": "y"}, {"prompt": [USER], "completion": "y"}, 7],
    "text": [{"text": None}, {"text": 3}, {"text": "  "}, {"text": "\ud800"}],
    "input_ids": [
        {"input_ids": []},
        {"input_ids": [1, "x"]},
        {"input_ids": [1, 2], "labels": [1]},
        {"input_ids": [99999]},
    ],
    "sharegpt": [{"conversations": [{"from": "nobody", "value": "x"}]}, {"conversations": TURNS[:1]}],
    "alpaca": [{"instruction": "x"}, {"instruction": ["x"], "output": "y"}],
    "question_answer": [{"question": "x", "answer": ""}],
}
MASKS = {
    f"completion {completion}, assistant {assistant}": (completion, assistant)
    for completion in (None, True, False)
    for assistant in (False, True)
}


@functools.cache
def tokenizer(template: bool = True):
    """A byte-level BPE trained on `CORPUS`, with a chat template or without."""
    trained = train_bpe(CORPUS, 340)
    if not template:
        trained.chat_template = None
    return trained


def written(directory: Path, rows: list[Any]) -> Path:
    """The rows as JSON lines; a string is a line as it stands."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def shown(examples: Examples) -> dict:
    report = examples.report.to_dict()
    return {
        "examples": [[example["input_ids"].tolist(), example["labels"].tolist()] for example in examples],
        "lengths": examples.lengths.tolist(),
        "supervised": examples.supervised.tolist(),
        "rows": examples.rows.tolist(),
        "blanks": examples.blanks.tolist(),
        "report": {key: value for key, value in report.items() if key not in ("notes", "skipped")},
        "notes": len(report["notes"]),
        "skipped": [[where, *facts(why)[1:]] for where, why in report["skipped"]],
    }


def built(directory: Path, rows: list[Any], *, template: bool = True, **options: Any) -> dict:
    """The examples of these rows, or why there are none."""
    path = written(directory, rows)
    try:
        examples = build_examples(open_rows(path), tokenizer(template), cache_dir=directory / "cache", **options)
    except PacktrainError as error:
        return {"refused": facts(str(error).replace(str(directory), "DIRECTORY"))}
    return shown(examples)


def of_formats(directory: Path) -> dict:
    values = {}
    for name, rows in ROWS.items():
        for mask, (completion, assistant) in MASKS.items():
            for template in (True, False):
                case = f"{name}/{mask}/{'template' if template else 'no template'}"
                options = dict(completion_only_loss=completion, assistant_only_loss=assistant, template=template)
                values[case] = built(directory, rows, format=name.split()[0], **options)
    return values


def of_overflow(directory: Path) -> dict:
    values = {}
    for name, rows in ROWS.items():
        for overflow in ("error", "truncate", "drop", "split"):
            for limit in (3, 14):
                values[f"{name}/{overflow}/{limit}"] = built(directory, rows, max_length=limit, overflow=overflow)
    return values


def of_bad_rows(directory: Path) -> dict:
    values = {}
    for name, bad in BAD_ROWS.items():
        rows = [row for pair in zip(bad, ROWS[name] * len(bad), strict=False) for row in pair]
        for what in ("skip", "error"):
            values[f"{name}/{what}"] = built(directory, rows, on_bad_row=what, format=name)
    return values


def of_views(directory: Path) -> dict:
    """A held-out share, a choice of examples, and arithmetic rows."""
    options = dict(cache_dir=directory / "cache")
    examples = build_examples(open_rows("packtrain:arithmetic", num_rows=12, seed=3), tokenizer(), **options)
    train, held_out = examples.hold_out(0.25, seed=5)
    ids, labels = examples.gather([3, 1], np.array([2, 0]), np.array([9, 4]))
    test = build_examples(open_rows("packtrain:arithmetic", num_rows=3, seed=3, split="test"), tokenizer(), **options)
    return {
        "arithmetic": shown(examples),
        "arithmetic, test": shown(test),
        "train": shown(train),
        "held out": shown(held_out),
        "taken": shown(examples.take([4, 0])),
        "gathered": [ids.tolist(), labels.tolist()],
    }


def _value(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {"dtype": str(value.dtype), "shape": list(value.shape), "values": value.tolist()}
    if isinstance(value, Bounds):
        return list(value.documents)
    return value


def of_batches(directory: Path) -> dict:
    """A few documents in both layouts under both loss weightings."""
    path = written(directory, ROWS["prompt_completion"])
    examples = build_examples(open_rows(path), tokenizer(), cache_dir=directory / "cache")
    documents = [dict(examples[number], example_id=number + 7) for number in (2, 0)]
    documents.append({"input_ids": [5, 6, 7, 1]})
    settings: dict[str, dict] = {
        "flat": dict(layout="flat"),
        "padded": dict(layout="padded", pad_token_id=0),
        "padded, 40 wide": dict(layout="padded", padded_to="max_length", max_length=40),
        "padded left": dict(layout="padded", padding_side="left", pad_token_id=3),
        "flat from position 2": dict(layout="flat", position_start=2),
    }
    values = {}
    for name, options in settings.items():
        for weighting in ("token", "example"):
            batch = PackCollator(loss_weighting=weighting, **options)(documents)
            values[f"{name}/{weighting}"] = {key: _value(value) for key, value in batch.items()}
        empty = PackCollator(**options)([])
        values[f"{name}/empty"] = {key: _value(value) for key, value in empty.items()}
    return values


def of_tokenizer(directory: Path) -> dict:
    texts = [*CORPUS, "größer 😀", "12345", "  two  spaces\n"]
    return {
        "vocabulary": dict(sorted(tokenizer().get_vocab().items(), key=lambda pair: pair[1])),
        "ids": tokenizer()(texts)["input_ids"],
        "template": tokenizer().chat_template,
    }


KINDS = {
    "formats": of_formats,
    "overflow": of_overflow,
    "bad rows": of_bad_rows,
    "views": of_views,
    "batches": of_batches,
    "tokenizer": of_tokenizer,
}


def computed(kind: str, directory: Path) -> dict:
    return {f"{kind}: {case}": plain(value) for case, value in KINDS[kind](directory / kind).items()}


def store(directory: Path) -> None:
    save("tokens", {case: value for kind in KINDS for case, value in computed(kind, directory).items()})


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_batches_are_those_stored(kind, tmp_path):
    stored = {case: value for case, value in load("tokens").items() if case.startswith(f"{kind}: ")}
    found = computed(kind, tmp_path)
    assert found.keys() == stored.keys()
    for case, value in stored.items():
        assert found[case] == value, case


def test_every_format_is_here(tmp_path):
    """The message about an unknown format names those that there are."""
    with pytest.raises(PacktrainError) as refused:
        build_examples(open_rows(written(tmp_path, ROWS["text"])), tokenizer(), format="qqqq")
    known = [part.split(" (")[0].strip() for part in str(refused.value).partition("need: ")[2].split(";")]
    assert set(known) == {name.split()[0] for name in ROWS}
