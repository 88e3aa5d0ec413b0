"""The recipe's tokenizer: loaded, or a byte-level BPE trained on the spot (no download, any text, seconds).

Byte-level: the 256 bytes are in the vocabulary, so there is no unknown token and every string comes back
exactly. Digits stay single tokens, so that arithmetic is learnt on digits and not on memorised numbers.

    train_bpe(["12 + 30 = 42"], vocab_size=512)("7 * 6")["input_ids"]
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from packtrain.errors import ModelError
from packtrain.modeling.hub import explained, warn_of_code
from packtrain.recipe.sections import ModelSection

logger = logging.getLogger(__name__)

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


def load_tokenizer(section: ModelSection, corpus: Iterable[str] = ()) -> PreTrainedTokenizerBase:
    """Returns the recipe's tokenizer, or a byte-level BPE trained on `corpus`; it always has a pad token.

    Args:
        section: the recipe's `model:`. Its revision and trust are those of the model's own tokenizer only.
        corpus: read only where a tokenizer is trained.

    Raises:
        ModelError: the tokenizer can't be loaded, or the chat template can't be read.
    """
    own = section.tokenizer_name_or_path is None
    name = section.tokenizer_name_or_path or section.model_name_or_path
    if name is None:
        assert section.tokenizer_vocab_size is not None, "a tokenizer is either named or trained"
        tokenizer: PreTrainedTokenizerBase = train_bpe(corpus, section.tokenizer_vocab_size)
    else:
        revision, trust = (section.revision, section.trust_remote_code) if own else (None, False)
        warn_of_code(name, revision, trust)
        with explained(f"model.{'model' if own else 'tokenizer'}_name_or_path", name, revision):
            auto: Any = AutoTokenizer  # which says that it may return None
            tokenizer = auto.from_pretrained(name, revision=revision, trust_remote_code=trust)
    if section.chat_template is not None:
        try:
            tokenizer.chat_template = Path(section.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            fix = "give the path of a UTF-8 Jinja file"
            raise ModelError(
                f"cannot be read: {error}", key="model.chat_template", value=section.chat_template, fix=fix
            ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = _padding_token(tokenizer)
        logger.warning("the tokenizer has no pad token; %s is used for padding", tokenizer.pad_token)
    return tokenizer


def _padding_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the token that text needs least: one made for padding, a reserved one, unk, and at last eos.

    Even eos is safe: labels are masked by position, never by token id, so the real end stays in the loss.
    """
    vocabulary = sorted(tokenizer.get_added_vocab()) or sorted(tokenizer.get_vocab())
    for pattern in (r"[<\[|]+(\w+_)?pad(_\w+)?[>\]|]+", r"[<\[|]+(reserved|unused)\w*[>\]|]+"):
        for token in vocabulary:
            if re.fullmatch(pattern, token, re.IGNORECASE):
                return token
    for token in (tokenizer.unk_token, tokenizer.eos_token):
        if token is not None:
            return token
    fix = "name another tokenizer with `model.tokenizer_name_or_path`"
    raise ModelError("the tokenizer has no pad, unk or eos token to pad with", fix=fix)
