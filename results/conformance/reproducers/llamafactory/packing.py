"""LLaMA-Factory, `packing`: documents of a row attend to each other, for the mask is of ones; `neat_packing` numbers them.
With both, and prompts that are trained on (`train_on_prompt`), the first token of a document is a label."""

from types import SimpleNamespace

from llamafactory.data.processor.supervised import PackedSupervisedDatasetProcessor


class Rows(PackedSupervisedDatasetProcessor):
    def _encode_data_example(self, prompt, **_):
        return list(prompt[0]), list(prompt[0])  # tokens and labels, all supervised


for neat in (False, True):
    processor = Rows(None, SimpleNamespace(pad_token_id=0), None, SimpleNamespace(cutoff_len=5, neat_packing=neat))
    names = ("_prompt", "_response", "_system", "_tools", "_images", "_videos", "_audios")
    rows = {name: [None, None] for name in names} | {"_prompt": [[[7, 8, 9]], [[4, 5]]], "_response": [[0], [0]]}
    pack = processor.preprocess_dataset(rows)
    print(neat, pack["input_ids"], pack["attention_mask"], pack["labels"])
