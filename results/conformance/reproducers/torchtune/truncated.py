"""torchtune: its tokenizers cut a row longer than their `max_seq_len`, without a message; the last token that is left
becomes the end token (9)."""

from torchtune.data import truncate

print(truncate([1, 2, 3, 4, 5], max_seq_len=3, eos_id=9))
