"""Two tokenizers, trained on the spot, that know the special tokens of a template.

byte-level      GPT-2's alphabet of bytes; an emoji is some tokens of parts of a character
sentencepiece   Metaspace and byte fallback, as Llama 2 has; a blank before every text; added tokens swallow blanks
                behind them (`rstrip`), as those of Phi-3 do
"""

from __future__ import annotations

import json
import re
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from results.templates.conversations import CONVERSATIONS

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
_TAG = re.compile(r"<[^<>{}\s%=]{1,40}>|\[/?[A-Z_]{2,20}\]")
_NAMES = (
    "think tool_call tool_response tool_calls tools start_of_turn end_of_turn start_of_image end_of_utterance image"
)


def special_tokens(template: str) -> list[str]:
    """What a model with this template would have as added tokens: tags with a bar, and those of known names."""
    tags = {tag for tag in _TAG.findall(template) if "|" in tag or "｜" in tag or tag.strip("</>") in _NAMES.split()}
    return sorted(tags - {BOS, EOS, PAD})


def make_byte_level(template: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(_trained_bytes())
    return _finished(backend, template, rstrip=False)


def make_sentencepiece(template: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(_trained_pieces())
    return _finished(backend, template, rstrip=True)


TOKENIZERS = {"byte-level": make_byte_level, "sentencepiece": make_sentencepiece}


def _finished(backend: Tokenizer, template: str, *, rstrip: bool) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(token, special=True) for token in (PAD, BOS, EOS)])
    backend.add_special_tokens([AddedToken(token, special=True, rstrip=rstrip) for token in special_tokens(template)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template
    return tokenizer


def _corpus() -> list[str]:
    """The words of the conversations but those of signs, so that these are byte tokens."""
    texts = [json.dumps(row, ensure_ascii=True) for row in CONVERSATIONS.values()]
    return [re.sub(r"\\u[0-9a-f]{4}", "", text) for text in texts] * 2


@cache
def _trained_bytes() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        _corpus(), trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    return backend.to_str()


@cache
def _trained_pieces() -> str:
    space = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    backend.train_from_iterator(
        _corpus(), trainers.BpeTrainer(vocab_size=260, special_tokens=["<unk>"], show_progress=False)
    )
    trained = json.loads(backend.to_str())["model"]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [piece for piece in sorted(trained["vocab"], key=trained["vocab"].get) if piece not in pieces]
    merges = [tuple(merge) for merge in trained["merges"]]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.pre_tokenizer = space
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend.to_str()
