"""The tokenizer trained on the spot: nothing is lost, nothing is random, the end is not the filler."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packtrain.modeling.tokenizer import SMALLEST_VOCABULARY, train_bpe

CORPUS = [f"Add {a} and {b}: {a} + {b} = {a + b}. So the answer is {a + b}." for a in range(40) for b in range(9)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter(CORPUS), vocab_size=320)


@settings(max_examples=200)
@given(text=st.text())
def test_any_text_comes_back_exactly(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ["3 . 5 , don 't", "  two  spaces ", "<|eos|> in text", "\u0000\ufeff", "日本語 ½ 🦆"])
def test_text_that_other_tokenizers_mend_comes_back_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_stay_single_tokens(tokenizer):
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]


def test_merges_are_learnt(tokenizer):
    """Negative control of the round trip: bytes alone would pass it too."""
    sentence = CORPUS[7]
    assert len(tokenizer(sentence)["input_ids"]) < 0.8 * len(sentence)
    smallest = train_bpe(CORPUS, vocab_size=SMALLEST_VOCABULARY)
    assert len(smallest(sentence)["input_ids"]) == len(sentence)


def test_special_tokens_are_distinct_and_first(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("7")["input_ids"] == tokenizer.convert_tokens_to_ids(["7"])  # it adds none by itself


def test_chat_template_marks_answers_and_their_end(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "4 + 5?"},
        {"role": "assistant", "content": "9"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    expected = "<|bos|><|system|>Be brief.<|user|>1 + 2?<|assistant|>3<|eos|><|user|>4 + 5?<|assistant|>9<|eos|>"
    assert text == expected
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    assert tokenizer.convert_ids_to_tokens([i for i, supervised in pairs if supervised]) == [
        "3",
        "<|eos|>",
        "9",
        "<|eos|>",
    ]
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|bos|><|system|>Be brief.<|user|>1 + 2?<|assistant|>"


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == tokenizer.chat_template
    assert again.pad_token == tokenizer.pad_token
    text = CORPUS[3] + " 3 . 5"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.decode(again(text)["input_ids"]) == text


def test_same_texts_same_tokenizer_in_another_process(tokenizer):
    program = (
        "import hashlib\n"
        "from packtrain.modeling.tokenizer import train_bpe\n"
        f"tokenizer = train_bpe({CORPUS!r}, 320)\n"
        "print(hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-"], input=program, capture_output=True, text=True, check=True)
    here = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    assert other.stdout.split()[-1] == here
    # Negative control: the hash tells corpora apart.
    other = train_bpe([text.swapcase() for text in CORPUS], 320)
    assert hashlib.sha256(other.backend_tokenizer.to_str().encode()).hexdigest() != here


def test_an_empty_corpus_gives_the_bytes():
    assert len(train_bpe([], vocab_size=400)) == SMALLEST_VOCABULARY
