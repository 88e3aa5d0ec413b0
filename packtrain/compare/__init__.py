"""Comparisons of strategies and trainers, each run in a fresh process."""
