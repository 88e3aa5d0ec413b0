"""Answers to many prompts, in batches that fill a budget of tokens.

A batch of prompts takes `rows * (longest prompt + new tokens)` positions, in memory for keys and values and in time for
attention. So prompts of like length go together, as many as fit (the token budget of DeepSpeed-FastGen, 2401.08671, for
whole generations): one long prompt stands alone, and short ones fill a batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from packtrain.errors import PacktrainError
from packtrain.modeling.audit.settings import base

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

MAX_TOKENS = 8192  # positions of a batch
NEW_TOKENS = 256
COLDEST = 1e-6  # a temperature above 0: logits divided by less may overflow


def batches(
    lengths: Sequence[int], *, new_tokens: Sequence[int], max_tokens: int = MAX_TOKENS, padded: bool = True
) -> list[list[int]]:
    """Deals prompts to batches: longest first, each batch as many of the next ones as fit.

    Args:
        lengths: tokens of each prompt.
        new_tokens: most tokens of each answer; only those with as many share a batch.
        max_tokens: most positions of a batch; a prompt that exceeds it stands alone.
        padded: whether prompts of other lengths may share a batch.

    Returns:
        Prompt numbers, batch by batch.

    >>> batches([5, 50, 6, 7], new_tokens=[10] * 4, max_tokens=60)
    [[1], [3, 2, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    dealt: list[list[int]] = []
    for number in order:
        first = dealt[-1][0] if dealt else None
        if (
            first is None
            or new_tokens[first] != new_tokens[number]
            or (len(dealt[-1]) + 1) * (lengths[first] + new_tokens[first]) > max_tokens
            or not (padded or lengths[first] == lengths[number])
        ):
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

    At temperature 0 an answer is that of its prompt alone, up to rounding. Above it, one also depends on the batch. A model
    that padding changes (RWKV, which reads it) is asked prompts of one length at a time.

    Args:
        model: a causal language model, in eval mode.
        max_new_tokens: most tokens of an answer; 256 by default, or fewer where the model has fewer positions behind its
            prompt.
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
    lengths = [len(prompt) for prompt in prompts]
    rooms = rooms_for_answers(model, lengths, max_new_tokens)
    ends = end_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id
    # instead of the model's own defaults, which may sample, penalise or bias: an answer follows from its arguments
    how = GenerationConfig(
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
    most = max(lengths, default=0) - min(lengths, default=0)
    padded = not most or padding_is_not_read(model, min(prompts, key=len), min(most, 5), pad)
    if not padded:
        logger.warning(
            "%s reads the padding of a batch, so only prompts of one length are answered together",
            type(base(model)).__name__,
        )
    torch.manual_seed(seed)
    for numbers in batches(lengths, new_tokens=rooms, max_tokens=max_tokens, padded=padded):
        width = max(lengths[number] for number in numbers)
        how.max_new_tokens = rooms[numbers[0]]
        written = _write(model, [prompts[number] for number in numbers], width, pad, how)
        for number, answer in zip(numbers, written[:, width:].tolist(), strict=True):
            end = next((place for place, token in enumerate(answer) if token in ends), len(answer))
            yield number, answer[:end]


def _write(model: Any, prompts: Sequence[Sequence[int]], width: int, pad: int | None, how: GenerationConfig) -> Any:
    """Calls `generate` with prompts padded on the left to `width`."""
    device = next(model.parameters()).device
    rows = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    real = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return model.generate(
        input_ids=torch.tensor(rows, device=device),
        attention_mask=torch.tensor(real, device=device),
        generation_config=how,
    )


def padding_is_not_read(model: PreTrainedModel | PeftModel, prompt: Sequence[int], count: int, pad: int | None) -> bool:
    """Returns whether a model goes on from a prompt behind `count` tokens of padding as without, by the logits of the next
    token."""
    how = GenerationConfig(
        max_new_tokens=1, do_sample=False, pad_token_id=pad, output_logits=True, return_dict_in_generate=True
    )
    alone, behind = (_write(model, [prompt], len(prompt) + more, pad, how).logits[0].float() for more in (0, count))
    close = 1e-3 if model.dtype == torch.float32 else 6e-2  # of the largest
    return bool((alone - behind).abs().max() <= close * alone.abs().max())


def end_token_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens that end an answer: the tokenizer's end, and those that the model names."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return list(dict.fromkeys(end for end in ends if end is not None))


def rooms_for_answers(model: PreTrainedModel | PeftModel, lengths: Sequence[int], asked: int | None) -> list[int]:
    """Returns how many tokens each answer may have, behind prompts of these lengths.

    Args:
        asked: None for 256, or fewer where the model has fewer positions behind a prompt.

    Raises:
        PacktrainError: a prompt is empty, or the model has too few positions.
    """
    for number, length in enumerate(lengths):
        if length == 0:
            raise PacktrainError("is empty", key=f"prompt {number + 1}", fix="write at least one token")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = limit - max(lengths, default=0) if limit else NEW_TOKENS
    if limit and (asked or 1) > room:
        what = f"exceeds the {limit:,} positions of the model behind a prompt of {limit - room:,} tokens"
        fix = f"at most {room:,} fit" if room > 0 else "shorten the prompt"
        raise PacktrainError(what, key="--max-new-tokens", value=asked, fix=fix)
    return [asked or min(NEW_TOKENS, limit - length if limit else NEW_TOKENS) for length in lengths]
