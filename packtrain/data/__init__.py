"""Rows -> examples: the first room."""
