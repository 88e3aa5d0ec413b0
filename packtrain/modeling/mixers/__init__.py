"""Flat outside, padded inside: modules that mix positions and know no documents."""
