"""After training: load what a run has left, answer prompts, merge an adapter into its model.

trained = load_trained("out/sft")                       # a run, a model, or an adapter with its base
generate(trained.model, trained.tokenizer, prompts)     # batches by a budget of tokens, not of rows
merge(trained)                                          # one ordinary model, checked by its logits
"""

from packtrain.generation.batches import generate
from packtrain.generation.merging import merge
from packtrain.generation.trained import Trained, load_trained

__all__ = ["Trained", "generate", "load_trained", "merge"]
