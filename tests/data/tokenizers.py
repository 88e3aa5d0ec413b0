"""Small tokenizers of every family, and the bytes that each of their tokens stands for, read off the tokens themselves."""

from __future__ import annotations

import re
from collections.abc import Callable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<unk>",
    "<pad>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
]
CORPUS = [
    "What is 2+2? It is 4.",
    "Hello there, fine. I am fine.",
    "one two three four five six seven\nUser: Assistant: ",
]
_LETTERS = sorted({letter for text in CORPUS for letter in text} - {" "})
_UNKNOWN = {"<unk>", "[UNK]"}
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _fast(backend: Tokenizer, *added: AddedToken) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.add_tokens(list(added))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def byte_level(*added: AddedToken, trim: bool = True, nfc: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2, Llama 3, Qwen: the post-processor trims offsets; Qwen composes characters first."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    if nfc:
        backend.normalizer = normalizers.NFC()
    return _fast(backend, *added)


def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama 2, Mistral, Gemma: SentencePiece's blanks, and bytes for what the vocabulary lacks."""
    vocabulary = {token: n for n, token in enumerate([*SPECIAL, *_BYTES, "▁", *_LETTERS, "▁I", "▁f", "in"])}
    merges = [("▁", "I"), ("▁", "f"), ("i", "n")]
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _fast(backend)


def unigram() -> PreTrainedTokenizerFast:
    """T5, XLM-R: Metaspace, one unknown token for a run of characters."""
    pieces = [
        *((token, 0.0) for token in SPECIAL),
        ("▁", -2.0),
        *((letter, -4.0) for letter in _LETTERS),
        ("▁fine", -3.0),
    ]
    backend = Tokenizer(models.Unigram(pieces, 0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return _fast(backend)


def word_piece() -> PreTrainedTokenizerFast:
    """BERT: white space is nobody's token."""
    words = ["what", "is", "it", "hello", "fine", "one", "two", "i", "am", "4", ".", ",", "?", "😀"]
    vocabulary = {token: n for n, token in enumerate([*SPECIAL, "[UNK]", *words, *(f"##{l}" for l in "abcdefinost")])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(strip_accents=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return _fast(backend)


def words() -> PreTrainedTokenizerFast:
    """Whole words between blanks."""
    known = ["What", "is", "2+2?", "It", "4.", "Hello", "there", "fine", "one", "two", "three", "four", "I", "😀"]
    vocabulary = {token: n for n, token in enumerate([*SPECIAL, *known])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _fast(backend)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte level": byte_level,
    "byte level, NFC": lambda: byte_level(nfc=True),
    "byte fallback": byte_fallback,
    "Unigram": unigram,
    "WordPiece": word_piece,
    "words": words,
}


def places(tokenizer: PreTrainedTokenizerFast, ids: list[int], text: str) -> list[tuple[int, int] | None]:
    """Returns which bytes of a text (as UTF-8) each token stands for, by the token's own string.

    None for unknown tokens, and behind one until the next added token. Only for texts in composed form. A token of no bytes,
    a blank that the tokenizer puts first, stands where the next does.
    """
    tokens, added = tokenizer.convert_ids_to_tokens(ids), tokenizer.get_added_vocab().keys() - _UNKNOWN
    whole = (text.lower() if "##a" in tokenizer.get_vocab() else text).encode()
    found, at, lost = [], 0, False
    for token in tokens:
        lost = token in _UNKNOWN or (lost and token not in added)
        if lost:
            found.append(None)
            continue
        own = _bytes_of(token, tokenizer)
        own = own if whole.startswith(own, at) else own.removeprefix(b" ")
        start = whole.index(own, at)
        assert not whole[at:start].strip() or found[-1] is None, (text, token)
        at = start + len(own)
        found.append((start, at))
    nexts = [*found, None][1:] if found else []
    return [behind if place and place[0] == place[1] else place for place, behind in zip(found, nexts, strict=True)]


def expected_mask(
    tokenizer: PreTrainedTokenizerFast, ids: list[int], pieces: list[tuple[str, bool]]
) -> list[bool | None]:
    """Returns which tokens stand for a byte of a piece that is learnt; None for unknown tokens."""
    learnt = [on for text, on in pieces for _ in text.encode()]
    found = places(tokenizer, ids, "".join(text for text, _ in pieces))
    return [None if place is None else any(learnt[slice(*place)]) for place in found]


def _bytes_of(token: str, tokenizer: PreTrainedTokenizerFast) -> bytes:
    if token in tokenizer.get_added_vocab():
        return token.encode()
    if "Ġ" in tokenizer.get_vocab():
        return bytes(_BYTE_OF[character] for character in token)
    if re.fullmatch(r"<0x..>", token):
        return bytes([int(token[3:5], 16)])
    return token.removeprefix("##").replace("▁", " ").encode()


def _byte_of_character() -> dict[str, int]:
    """Returns GPT-2's characters for bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_of_character()
