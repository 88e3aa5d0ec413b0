"""Batch -> loss: the fourth room."""
