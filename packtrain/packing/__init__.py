"""Lengths -> strategy -> plan -> batch: the second room."""
