"""Comparisons and benchmarks: the sixth room."""
