"""Settings of other projects, each in an environment of its own (`environments.py`); nothing of theirs is patched."""

from results.conformance.peers import llama_factory, swift, torchtune

PEERS = (*llama_factory.SETTINGS, *torchtune.SETTINGS, *swift.SETTINGS)
