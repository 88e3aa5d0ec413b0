"""The memory that a run needs, by formula before it and by count in it."""
