"""Model, tokenizer, attention and the audit of both: the third room."""
