"""`packtrain:arithmetic`: answers are right, lengths long-tailed, rows the same everywhere."""

from __future__ import annotations

import hashlib
import json
import re

import numpy as np

from packtrain.data.examples import build_examples
from packtrain.data.sources import open_rows, texts
from packtrain.data.synthetic import HIGHEST, arithmetic_row, check_answer

WORDS = {"finds": "+", "gets": "+", "buys": "+", "loses": "-", "gives": "-", "sells": "-"}


def solve(prompt: str) -> tuple[int, list[str]]:
    """The answer and the worked lines, read from the prompt's words alone."""
    first, *told, question = re.findall(r"[^.?]+[.?]", prompt.strip())
    total, lines = int(re.search(r"\d+", first)[0]), []
    assert question.strip().startswith("How many")
    for sentence in told:
        if "doubles" in sentence or "half" in sentence:
            sign, n = ("*" if "doubles" in sentence else "/"), 2
        else:
            sign, n = next(WORDS[word] for word in WORDS if word in sentence), int(re.search(r"\d+", sentence)[0])
        result = {"+": total + n, "-": total - n, "*": total * n, "/": total / n}[sign]
        assert result == int(result) and 0 <= result <= HIGHEST
        lines.append(f"{total} {sign} {n} = {int(result)}")
        total = int(result)
    return total, lines


def test_first_rows():
    """The same on every platform and in every version: draws are integers, seeded row by row."""
    assert arithmetic_row(0, 2) == {
        "prompt": "Finn has 42 cups. Finn gets 7 from a friend. How many cups does Finn have now?\n",
        "completion": "42 + 7 = 49\n#### 49",
    }
    rows = json.dumps(list(open_rows("packtrain:arithmetic", num_rows=100)))
    assert (
        hashlib.sha256(rows.encode()).hexdigest() == "45d4cf9fa2481979d9be301624f9e1d9b630ad9aece97847fe8d14c64765a8a2"
    )


def test_worked_answers_are_right():
    for row in open_rows("packtrain:arithmetic", num_rows=500, seed=3):
        answer, lines = solve(row["prompt"])
        assert row["completion"].split("\n") == [*lines, f"#### {answer}"]


def test_check_answer():
    row = arithmetic_row(0, 5)
    answer, _ = solve(row["prompt"])
    assert check_answer(row, row["completion"])
    assert check_answer(row, f"#### {answer}") and check_answer(row, f"so\n####{answer}\n#### {answer + 1}")
    for wrong in (
        "",
        str(answer),
        f"#### {answer + 1}",
        f"#### {answer}1",
        f"#### -{answer + 1}",
        f"#### {answer + 1}\n#### {answer}",
    ):
        assert not check_answer(row, wrong)


def test_rows_depend_on_seed_split_and_number_only():
    rows = open_rows("packtrain:arithmetic", num_rows=50, seed=1)
    assert rows[49] == open_rows("packtrain:arithmetic", seed=1)[49] == arithmetic_row(1, 49)
    for other in (dict(seed=2), dict(seed=1, split="test")):
        others = open_rows("packtrain:arithmetic", num_rows=50, **other)
        assert sum(a == b for a, b in zip(rows, others, strict=True)) == 0
        assert others.fingerprint != rows.fingerprint
    state = np.random.get_state()[1].tolist()
    list(rows)
    assert np.random.get_state()[1].tolist() == state


def test_lengths_have_a_long_tail():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rows = open_rows("packtrain:arithmetic", num_rows=2000)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["</s>"], show_progress=False)
    backend.train_from_iterator(texts(rows), trainer)
    examples = build_examples(rows, PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    median, p99 = np.percentile(examples.lengths, [50, 99])
    assert 50 <= median <= 70 and p99 > 600
    assert examples.lengths.max() < 2048  # the default max_length
