"""packtrain: a training step is a set of examples, a strategy only decides how they lie in memory."""

__version__ = "0.1.0"
