"""Tails of diffusion models: the oracle, the trained experiment, `packtrain sample` and `evaluate`."""
