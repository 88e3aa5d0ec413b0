"""A byte-level BPE tokenizer trained on the spot: no download, any text, seconds.

Byte-level: the 256 bytes are in the vocabulary, so there is no unknown token and every string comes back
exactly. Digits stay single tokens, so that arithmetic is learnt on digits and not on memorised numbers.

    train_bpe(["12 + 30 = 42"], vocab_size=512)("7 * 6")["input_ids"]
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL_TOKENS = (PAD, BOS, EOS, *ROLES)
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)

# <|bos|><|user|>question<|assistant|>answer<|eos|>; the answer and its end are between the generation marks
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|' + message['role'] + '|>' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a tokenizer on `texts`; the same texts in the same order give the same tokenizer.

    Args:
        texts: the corpus; read once.
        vocab_size: with the special tokens and the 256 bytes, at least 262; a small corpus may not fill it.

    Returns:
        A tokenizer with distinct bos, eos and pad tokens and a chat template. It adds none of them itself.
    """
    assert vocab_size >= SMALLEST_VOCABULARY, vocab_size
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,  # or decoding would eat the space in "3 ."
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
