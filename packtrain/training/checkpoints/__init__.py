"""What is saved and read again: sealed, verified, of the same run, on any number of ranks."""
