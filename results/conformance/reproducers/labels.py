"""`DataCollatorForLanguageModeling`: labels of the row are replaced, and where the tokenizer pads
with the end token (2), no end token is learnt."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

words = Tokenizer(WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
row = {"input_ids": [0, 1, 1, 2], "labels": [-100, -100, 1, 2]}
print(collator([row])["labels"].tolist())
