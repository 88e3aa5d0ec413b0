"""The rows, the tokenizer and the models that every trainer of the study gets; needs torch and transformers only.

Every word is one token, and the first token of a row is that of no other row, so that documents are found again in any
batch, wherever a trainer laid them.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
PAD, EOS = 0, 2
STARTS = range(8, 72)  # the first tokens of rows
WORDS = range(72, 200)  # all others
VOCABULARY, PACK = 200, 64
_DECODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.1,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=EOS,
    pad_token_id=PAD,
)
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": dict(model_type="llama", **_DECODER),
    "lfm2": dict(model_type="lfm2", **_DECODER, layer_types=["conv", "full_attention"], conv_L_cache=3),
}


@dataclass(frozen=True)
class Row:
    """A prompt that is not supervised, and a completion that is, with the end token behind it."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.completion, EOS]

    def labels(self, *, everywhere: bool) -> list[int]:
        return self.ids if everywhere else [-100] * len(self.prompt) + [*self.completion, EOS]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a trainer is asked to do.

    Attributes:
        rows, held_out: to train and to evaluate on.
        directory: an empty directory of this run.
        model: a key of CONFIGS.
        everywhere: whether prompts are supervised, too.
        pad_is_eos: whether the tokenizer pads with the end token, as those of many models do.
        per_device, accumulation: examples of a micro-batch, and micro-batches of a rank in an update; for a packer, packs.
        parts: instead of the two, micro-batches of a rank in which one update sees all rows.
        max_length: most tokens of an example and, for a packer, of a pack.
        updates: of the whole run; -1 for one epoch.
        save: the update after which a checkpoint is written; 0 for none.
        per_device_eval: examples of a micro-batch in evaluation.
        probe: whether to try if documents leak into each other.
    """

    rows: tuple[Row, ...]
    directory: str
    held_out: tuple[Row, ...] = ()
    model: str = "llama"
    everywhere: bool = False
    pad_is_eos: bool = False
    per_device: int = 4
    accumulation: int = 2
    parts: int = 0
    max_length: int = PACK
    updates: int = -1
    save: int = 0
    per_device_eval: int = 4
    probe: bool = False


def even_rows() -> tuple[Row, ...]:
    """Eight rows that fill four packs exactly, in whatever way they are packed; supervised parts of very different size."""
    return tuple(draw(length, start, seed=1) for start, length in enumerate((40, 24, 30, 34, 50, 14, 20, 44)))


def ragged_rows(number: int, *, seed: int = 2) -> tuple[Row, ...]:
    """Rows of 6 to 48 tokens, most of them short."""
    lengths = np.clip(np.random.default_rng(seed).lognormal(2.6, 0.7, number), 6, 48).astype(int).tolist()
    return tuple(draw(length, start, seed=seed) for start, length in enumerate(lengths))


def draw(length: int, start: int, *, seed: int) -> Row:
    """Draws a row of so many tokens, the end token among them; prompts are a tenth to three quarters of it."""
    generator = np.random.default_rng((seed, start))
    body = [STARTS[start], *generator.integers(WORDS.start, WORDS.stop, length - 2).tolist()]
    prompt = max(1, int(length * generator.uniform(0.1, 0.75)))
    return Row(tuple(body[:prompt]), tuple(body[prompt:]))


def words(ids: Sequence[int]) -> str:
    return " ".join(f"w{number}" for number in ids)


def as_texts(job: Job, rows: Sequence[Row]) -> list[dict[str, str]]:
    """Rows as people write them, for a trainer that tokenises and adds the end token itself."""
    if job.everywhere:
        return [{"text": words([*row.prompt, *row.completion])} for row in rows]
    return [{"prompt": words(row.prompt), "completion": " " + words(row.completion)} for row in rows]


def as_ids(job: Job, rows: Sequence[Row], *, labels: bool = True) -> list[dict[str, list[int]]]:
    """Rows as tokens, for a trainer that leaves tokenising to its user; without labels for a collator that makes them."""
    own = [{"labels": row.labels(everywhere=job.everywhere)} if labels else {} for row in rows]
    return [{"input_ids": row.ids} | labels for row, labels in zip(rows, own, strict=True)]


def write(path: Path, text: str) -> str:
    """Writes a file in one go, as several ranks write the same one."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    return str(draft.replace(path))


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def make_tokenizer(*, pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    names = SPECIAL + [f"w{number}" for number in range(len(SPECIAL), VOCABULARY)]
    backend = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    pad = "</s>" if pad_is_eos else "<pad>"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def model_directory(job: Job, root: Path) -> str:
    """Returns a directory with the model, the same weights every time, and its tokenizer; writes it where there is none.

    The first rank writes it, and the others wait for it: once ranks know of each other, transformers saves there only.
    """
    directory = root / f"{job.model}{'-pad-is-eos' if job.pad_is_eos else ''}"
    if not directory.exists() and os.environ.get("RANK", "0") == "0":
        draft = directory.with_name(f"{directory.name}.draft")
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIGS[job.model])).save_pretrained(draft)
        make_tokenizer(pad_is_eos=job.pad_is_eos).save_pretrained(draft)
        draft.rename(directory)
    while not directory.exists():
        time.sleep(0.05)
    return str(directory)


# Documents in a batch


@dataclass(frozen=True)
class Document:
    """Where a document, or a piece of one without its beginning, lies in a batch: `batch[row, start:stop]`.

    Attributes:
        example: the number of its row; None where its beginning is elsewhere.
    """

    row: int
    start: int
    stop: int
    example: int | None


def documents(ids: Tensor, padded: Tensor) -> list[Document]:
    """Finds the documents of a batch by their first tokens.

    Args:
        ids: tokens, int64 `[B, T]`.
        padded: where padding is, bool `[B, T]`.
    """
    found = []
    for row, (tokens, padding) in enumerate(zip(ids.tolist(), padded.tolist(), strict=True)):
        real = [place for place, is_padding in enumerate(padding) if not is_padding]
        if not real:
            continue
        starts = [place for place in real if tokens[place] in STARTS]
        places = starts if starts[:1] == real[:1] else [real[0], *starts]
        for start, stop in zip(places, [*places[1:], real[-1] + 1], strict=True):
            example = tokens[start] - STARTS.start if tokens[start] in STARTS else None
            found.append(Document(row, start, stop, example))
    return found


# The reference: every document alone


@functools.cache
def alone(directory: str, rows: tuple[Row, ...], everywhere: bool) -> tuple[float, dict[str, Tensor]]:
    """Computes loss and gradients of an update over rows, one document at a time, as a mean over supervised tokens.

    Returns:
        The loss and, of every weight, the gradient in float64.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    total = sum(len(targets(row, everywhere)) for row in rows)
    loss = 0.0
    for row in rows:
        ids, labels = torch.tensor([row.ids]), torch.tensor(row.labels(everywhere=everywhere))
        logits = model(input_ids=ids).logits[0, :-1]
        share = torch.nn.functional.cross_entropy(logits.float(), labels[1:], reduction="sum") / total
        share.backward()
        loss += float(share.detach())
    return loss, {name: weight.grad.double() for name, weight in model.named_parameters()}


def targets(row: Row, everywhere: bool) -> list[int]:
    """Returns the labels that a model is trained on: all but that of the first token."""
    return [label for label in row.labels(everywhere=everywhere)[1:] if label != -100]


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Returns the distance of gradients, relative to the second."""
    assert one.keys() == other.keys(), sorted(one.keys() ^ other.keys())
    squares = sum(float((one[name] - other[name]).square().sum()) for name in other)
    return (squares / sum(float(gradient.square().sum()) for gradient in other.values())) ** 0.5


def changed(tokens: Tensor, where: Tensor) -> Tensor:
    """Replaces words by other words where `where` is true; first and special tokens stay."""
    word = where & (tokens >= WORDS.start) & (tokens < WORDS.stop)
    return torch.where(word, (tokens - WORDS.start + 7) % len(WORDS) + WORDS.start, tokens)
