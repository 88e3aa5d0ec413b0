"""Which engine trains (DDP, ZeRO, FSDP), how it is started, and that it is the one asked for."""
