"""LLaMA-Factory: a row longer than `cutoff_len` is cut, prompt and answer, without a message."""

from llamafactory.data.processor.processor_utils import infer_seqlen

print(infer_seqlen(source_len=40, target_len=60, cutoff_len=64))  # what is left of them
