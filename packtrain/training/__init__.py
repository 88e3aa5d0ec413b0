"""The run: the fifth room."""
