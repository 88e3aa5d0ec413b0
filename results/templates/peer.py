"""The same rows through TRL's SFTTrainer, which tokenises a data set when it is made: which ids and labels does it give?

`messages` with `assistant_only_loss` and the template that has markers (TRL's training variant), and prompt and completion
with the template as models ship it. Where the two differ, the literal reference says who is right.
"""

from __future__ import annotations

import json
import logging
from collections import Counter

import datasets
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from results.templates.cells import Encoded, encode
from results.templates.conversations import CONVERSATIONS
from results.templates.reference import Renderer, align, expect, forms, tokens_in

IGNORED = -100


def through_trl(tokenizer: PreTrainedTokenizerFast, row: dict, output_dir: str, **options) -> tuple[list, list] | str:
    """Ids and labels as SFTTrainer gives them to its model, or the error."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    row = row | ({"tools": json.dumps(row["tools"])} if "tools" in row else {})
    arguments = SFTConfig(output_dir=output_dir, max_length=None, report_to="none", use_cpu=True, bf16=False, **options)
    try:
        with torch.device("cpu"):
            trainer = SFTTrainer(
                LlamaForCausalLM(config),
                arguments,
                train_dataset=datasets.Dataset.from_list([row]),
                processing_class=tokenizer,
            )
        (done,) = trainer.train_dataset
        return list(done["input_ids"]), [IGNORED, *done["labels"][1:]]
    except Exception as error:  # a template is foreign code
        return f"{type(error).__name__}: {error}"


def for_trl(row: dict) -> dict:
    """The row without what TRL doesn't know: switches."""
    messages = [{key: value for key, value in message.items() if key != "weight"} for message in row["messages"]]
    return row | {"messages": messages}


def split(row: dict) -> dict | None:
    """The row as prompt and completion, where its last message is the assistant's."""
    *prompt, last = row["messages"]
    if last["role"] != "assistant" or not prompt:
        return None
    return {key: value for key, value in row.items() if key != "messages"} | {"prompt": prompt, "completion": [last]}


def compare(tokenizer: PreTrainedTokenizerFast, output_dir: str, *, prompts: bool) -> Counter:
    """Counts what became of all conversations: see `verdict`."""
    quiet()
    counts: Counter = Counter()
    for row in CONVERSATIONS.values():
        row = for_trl(row)
        given = split(row) if prompts else row
        if given is None:
            continue
        options = {} if prompts else {"assistant_only": True}
        (ours,) = encode(tokenizer, [given], "prompt_completion" if prompts else "messages", **options)
        theirs = through_trl(tokenizer, given, output_dir, **({} if prompts else {"assistant_only_loss": True}))
        counts[verdict(tokenizer, row, ours, theirs, prompts=prompts)] += 1
    return counts


def verdict(
    tokenizer: PreTrainedTokenizerFast, row: dict, ours: Encoded, theirs: tuple[list, list] | str, *, prompts: bool
) -> str:
    """Says how the two differ, and who is right.

    `identical`; `both refuse`; `packtrain refuses` (TRL trains on a row without a part of what it says) and `TRL fails`;
    else, with the same ids, who has the reference's mask; with other ids, what it is that makes them other.
    """
    if ours.problem or isinstance(theirs, str):
        if ours.problem and isinstance(theirs, str):
            return "both refuse"
        return "packtrain refuses" if ours.problem else "TRL fails"
    ids, labels = theirs
    mask = ours.factors > 0
    mask[:1] = False
    learnt = np.array(labels) != IGNORED
    if ours.ids == ids and np.array_equal(mask, learnt):
        return "identical"
    own = Renderer(tokenizer, tokenizer.chat_template, row.get("tools"), row.get("chat_template_kwargs", {}))
    for messages in forms(row):
        text = own.render(messages)
        if text is None:
            continue
        places, other = align(tokenizer, ours.ids, text), align(tokenizer, ids, text)
        if places is None:
            continue
        if other is None:
            return "TRL renders another text"
        if prompts:
            before = own.render(messages[:-1], add_generation_prompt=True)
            if before is None or not text.startswith(before):
                return "the template renders the prompt otherwise when an answer follows"
            spans = [(len(before), len(text))]
            if ours.ids != ids:
                right = _spells(tokenizer, ours.ids, mask, before)
                return "prompt ends inside a token: packtrain splits it" if right else "ids differ"
        else:
            spans = expect(own, None, messages, text).spans
        right = tokens_in(spans, text, places)
        if ours.ids != ids:
            return "ids differ"
        if np.array_equal(mask, right):
            return "same ids, packtrain has the reference's mask"
        return "same ids, TRL has the reference's mask" if np.array_equal(learnt, right) else "both masks differ"
    return "packtrain renders another text"


def _spells(tokenizer: PreTrainedTokenizerFast, ids: list[int], mask: np.ndarray, text: str) -> bool:
    """Whether the tokens that aren't learnt spell a text as it is tokenised alone."""
    return tokenizer(text, add_special_tokens=False)["input_ids"] == [
        n for n, on in zip(ids, mask, strict=True) if not on
    ]


def quiet() -> None:
    """Silences bars and warnings of some hundred trainers."""
    datasets.disable_progress_bars()
    for name in ("trl", "transformers", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
