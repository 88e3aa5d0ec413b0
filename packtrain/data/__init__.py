"""Rows -> examples."""
