"""Model, tokenizer and attention, and the audit that measures whether attention leaks."""
