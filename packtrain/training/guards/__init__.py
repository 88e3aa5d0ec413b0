"""Guards that stop a run before it does harm: numbers that are not finite, signals, memory that runs out."""
