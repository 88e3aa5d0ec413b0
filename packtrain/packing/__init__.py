"""Lengths -> strategy -> plan -> batch."""
