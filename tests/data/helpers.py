"""Tokenizers small enough to read, and a way to write expected masks down."""

from __future__ import annotations

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from packtrain.data.examples import Examples

SPECIAL = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"]
CORPUS = ["What is 2+2? It is 4.", "Question: Answer: the sum of two numbers", "one two three four five six seven"]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role == 'developer' %}{{ raise_exception('no developers here') }}{% endif %}"
    "{{ '<|' + message.role + '|>' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(*, chat_template: str | None = None, bos: bool = True, **special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `CORPUS`; puts `<s>` in front of texts if `bos`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = chat_template
    return tokenizer


def shown(tokenizer: PreTrainedTokenizerFast, examples: Examples) -> list[str]:
    """Each example as text with what is supervised in square brackets: `<s>What is 2+2?[ 4</s>]`.

    Checks on the way that labels are the input ids or -100.
    """
    texts = []
    for example in examples:
        ids, labels = example["input_ids"], example["labels"]
        learnt = labels != -100
        assert np.array_equal(ids[learnt], labels[learnt])
        runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(learnt)) + 1)
        pieces = [(tokenizer.decode(ids[run]), learnt[run[0]]) for run in runs]
        texts.append("".join(f"[{text}]" if on else text for text, on in pieces))
    return texts
