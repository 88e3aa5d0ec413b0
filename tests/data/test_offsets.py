"""Which characters a token stands for, by its own string; and which tokens a span holds."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from packtrain.data.offsets import OffsetTokenizer, factors_of, intersect, outside
from tests.data.tokenizers import TOKENIZERS, byte_fallback, byte_level, places, unigram, words

_PARTS = [
    "one",
    " two",
    "Hello there",
    "fine",
    "I",
    " ",
    "\n",
    "  ",
    "4.",
    "😀",
    "é",
    "中文",
    "<|im_start|>",
    "</s>",
    "User: ",
]


@pytest.fixture(scope="module", params=TOKENIZERS)
def located(request) -> OffsetTokenizer:
    return OffsetTokenizer(TOKENIZERS[request.param]())


def in_bytes(text: str, offsets: np.ndarray) -> list[tuple[int, int]]:
    return [(len(text[:start].encode()), len(text[:end].encode())) for start, end in offsets.tolist()]


@settings(max_examples=60, deadline=None)
@given(text=st.lists(st.sampled_from(_PARTS), min_size=1, max_size=8).map("".join))
def test_offsets_hold_the_bytes_of_every_token(located, text):
    """A token of some bytes of a character stands for the character; none stands for more than its bytes' characters."""
    ((ids, offsets),) = located([text])
    assert ids.tolist() == located.tokenizer(text, add_special_tokens=False)["input_ids"]
    expected = places(located.tokenizer, ids.tolist(), text)
    whole = text.encode()
    for place, (start, end) in zip(expected, in_bytes(text, offsets), strict=True):
        if place is not None:
            first, last = place
            while first and whole[first] & 0xC0 == 0x80:
                first -= 1
            while last < len(whole) and whole[last] & 0xC0 == 0x80:
                last += 1
            assert start <= first and last <= end
            assert not whole[start:first].strip() and not whole[last:end].strip()
            assert (start, end) == (first, last) or "▁" in located.tokenizer.get_vocab()


def test_transformers_offsets_leave_blanks_out():
    """Control: where the post-processor trims, the offsets that transformers gives have lost the blank."""
    tokenizer = byte_level()
    (_, offsets), *_ = OffsetTokenizer(tokenizer)(["one two"])
    trimmed = tokenizer("one two", add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert (3, 7) in [tuple(pair) for pair in offsets.tolist()] and (3, 7) not in trimmed and (4, 7) in trimmed


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_all_tokens_of_an_emoji_are_in_its_span(make):
    ((ids, offsets),) = OffsetTokenizer(make())(["I😀."])
    assert factors_of(offsets, [(1, 2, 1.0)]).tolist() == [0] * (len(ids) - 5) + [1, 1, 1, 1, 0]


def test_composed_characters_belong_to_all_of_their_parts():
    text = "Ie\u0301."
    ((_, offsets),) = OffsetTokenizer(byte_level(nfc=True))([text])
    assert factors_of(offsets, [(1, 3, 1.0)]).tolist() == [0, 1, 1, 0]
    assert factors_of(offsets, [(0, 1, 1.0)]).tolist() == [1, 0, 0, 0]
    assert factors_of(offsets, [(3, 4, 1.0)]).tolist() == [0, 0, 0, 1]


def test_unknown_token_stands_for_a_run_of_characters():
    ((_, offsets),) = OffsetTokenizer(unigram())(["one 中文"])
    assert offsets[-1].tolist() == [4, 6]


@pytest.mark.parametrize("swallows", [[], ["lstrip"], ["rstrip"], ["lstrip", "rstrip"]])
def test_blanks_that_an_added_token_swallows_are_not_its_characters(swallows):
    """Phi-3's `<|end|>` swallows the newline behind it; its token must not fall into the next turn, nor into the answer."""
    added = AddedToken("<|stop|>", special=True, normalized=False, **dict.fromkeys(swallows, True))
    tokenizer = byte_level(added, trim=False)
    text = "one <|stop|> \ntwo"
    ((ids, offsets),) = OffsetTokenizer(tokenizer)([text])
    (at,) = np.flatnonzero(ids == tokenizer.convert_tokens_to_ids("<|stop|>"))
    assert offsets[at].tolist() == [4, 12]
    raw = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets[at]
    assert (raw != (4, 12)) == bool(swallows)  # control
    assert factors_of(offsets, [(0, 4, 1.0)])[at] == 0 == factors_of(offsets, [(12, 17, 1.0)])[at]


def test_added_token_of_blanks_keeps_them():
    tokenizer = byte_level(AddedToken("\n\n", normalized=False, rstrip=True))
    ((ids, offsets),) = OffsetTokenizer(tokenizer)(["one\n\n two"])
    (at,) = np.flatnonzero(ids == tokenizer.convert_tokens_to_ids("\n\n"))
    assert factors_of(offsets, [(3, 5, 1.0)])[at] == 1


def test_white_space_is_nobodys_where_the_tokenizer_drops_it():
    text = "one two \n three"
    ((_, offsets),) = OffsetTokenizer(words())([text])
    assert offsets.tolist() == [[0, 3], [4, 7], [10, 15]]
    assert factors_of(offsets, [(7, 10, 1.0)]).tolist() == [0, 0, 0]


def test_truncation_and_padding_of_the_tokenizer_have_no_effect():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    ((ids, _),) = OffsetTokenizer(tokenizer)(["one two three"])
    assert tokenizer.decode(ids) == "one two three"


def test_pickled():
    located = pickle.loads(pickle.dumps(OffsetTokenizer(byte_level())))
    assert [array.tolist() for array in located(["I am"])[0]] == [
        array.tolist() for array in OffsetTokenizer(byte_level())(["I am"])[0]
    ]


_BOUNDS = st.lists(st.integers(0, 30), max_size=8, unique=True).map(sorted)
_SPANS = _BOUNDS.flatmap(
    lambda bounds: st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=len(bounds) // 2, max_size=len(bounds) // 2).map(
        lambda factors: [(*pair, f) for *pair, f in zip(bounds[::2], bounds[1::2], factors, strict=False)]
    )
)


def characters(spans) -> list[float]:
    return [max((factor for start, end, factor in spans if start <= at < end), default=0.0) for at in range(30)]


@settings(max_examples=150, deadline=None)
@given(spans=_SPANS, others=_SPANS, widths=st.lists(st.integers(0, 4), min_size=1, max_size=10))
def test_spans_are_sets_of_characters(spans, others, widths):
    products = [a * b for a, b in zip(characters(spans), characters(others), strict=True)]
    assert characters(intersect(spans, others)) == products
    assert characters(outside(spans, 30)) == [float(not factor) for factor in characters(spans)]
    ends = np.cumsum(widths)
    offsets = np.stack([ends - widths, ends], axis=1).clip(max=30)
    highest = [max([0.0, *characters(spans)[start:end]]) for start, end in offsets.tolist()]
    assert factors_of(offsets, spans).tolist() == highest
