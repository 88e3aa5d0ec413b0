"""Answers to many prompts, in batches that fill a budget of tokens.

A batch of prompts takes `rows * (longest prompt + new tokens)` positions, in memory for keys and values and in time for
attention. So prompts of like length go together, as many as fit (the token budget of DeepSpeed-FastGen, 2401.08671, for
whole generations): one long prompt stands alone, and short ones fill a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from packtrain.errors import PacktrainError

if TYPE_CHECKING:
    from peft import PeftModel

MAX_TOKENS = 8192  # positions of a batch
NEW_TOKENS = 256
COLDEST = 1e-6  # a temperature above 0: logits divided by less may overflow


def batches(lengths: Sequence[int], *, max_new_tokens: int, max_tokens: int = MAX_TOKENS) -> list[list[int]]:
    """Deals prompts to batches: longest first, each batch as many of the next ones as fit.

    Args:
        lengths: tokens of each prompt.
        max_new_tokens: most tokens of an answer.
        max_tokens: most positions of a batch; a prompt that exceeds it stands alone.

    Returns:
        Prompt numbers, batch by batch.

    >>> batches([5, 50, 6, 7], max_new_tokens=10, max_tokens=60)
    [[1], [3, 2, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    dealt: list[list[int]] = []
    for number in order:
        rows = len(dealt[-1]) + 1 if dealt else 1
        if not dealt or rows * (lengths[dealt[-1][0]] + max_new_tokens) > max_tokens:
            dealt.append([])
        dealt[-1].append(number)
    return dealt


@torch.no_grad()  # not inference_mode: the model may be training, and what it caches now has to take gradients later
def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
) -> Iterator[tuple[int, list[int]]]:
    """Answers tokenised prompts; yields (prompt number, token ids of the answer without its end), batch by batch.

    At temperature 0 an answer is that of its prompt alone, up to rounding. Above it, one also depends on the batch.

    Args:
        model: a causal language model, in eval mode.
        max_new_tokens: most tokens of an answer; 256 by default, or fewer where the model has fewer positions.
        temperature: 0 takes the most likely token.
        top_p: samples among the most likely tokens that reach this probability.
        max_tokens: most positions of a batch.
        seed: of the sampling.

    Raises:
        PacktrainError: a temperature or seed that can't be sampled with, an empty prompt, or one with which an answer
            exceeds the positions that the model has.
    """
    if not math.isfinite(temperature) or 0 < temperature < COLDEST:
        fix = f"0 takes the most likely token; sampling takes {COLDEST} or more"
        raise PacktrainError("can't be sampled at", key="--temperature", value=temperature, fix=fix)
    if not 0 <= seed < 1 << 63:
        raise PacktrainError("must be from 0 to 2^63 - 1", key="--seed", value=seed)
    max_new_tokens = room_for_answers(model, [len(prompt) for prompt in prompts], max_new_tokens)
    ends = end_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id
    # instead of the model's own defaults, which may sample, penalise or bias: an answer follows from its arguments
    how = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_p=top_p if temperature > 0 else None,
        top_k=0 if temperature > 0 else None,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        eos_token_id=ends or None,
        pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id,
    )
    torch.manual_seed(seed)
    answering: Any = model  # whose `generate` is annotated as a module
    device = next(model.parameters()).device
    for numbers in batches([len(prompt) for prompt in prompts], max_new_tokens=max_new_tokens, max_tokens=max_tokens):
        width = max(len(prompts[number]) for number in numbers)
        rows = [[pad] * (width - len(prompts[number])) + list(prompts[number]) for number in numbers]
        real = [[0] * (width - len(prompts[number])) + [1] * len(prompts[number]) for number in numbers]
        written = answering.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(real, device=device),
            generation_config=how,
        )
        for number, answer in zip(numbers, written[:, width:].tolist(), strict=True):
            end = next((place for place, token in enumerate(answer) if token in ends), len(answer))
            yield number, answer[:end]


def end_token_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens that end an answer: the tokenizer's end, and those that the model names."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return list(dict.fromkeys(end for end in ends if end is not None))


def room_for_answers(model: PreTrainedModel | PeftModel, lengths: Sequence[int], asked: int | None) -> int:
    """Returns how many tokens an answer may have behind prompts of these lengths.

    Args:
        asked: None for 256, or fewer where the model has fewer positions.

    Raises:
        PacktrainError: a prompt is empty, or the model has too few positions.
    """
    for number, length in enumerate(lengths):
        if length == 0:
            raise PacktrainError("is empty", key=f"prompt {number + 1}", fix="write at least one token")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = limit - max(lengths, default=0) if limit else NEW_TOKENS
    if asked is None and room > 0:
        return min(NEW_TOKENS, room)
    if limit and (asked or 1) > room:
        what = f"exceeds the {limit:,} positions of the model behind a prompt of {limit - room:,} tokens"
        fix = f"at most {room:,} fit" if room > 0 else "shorten the prompt"
        raise PacktrainError(what, key="--max-new-tokens", value=asked, fix=fix)
    return asked or NEW_TOKENS
