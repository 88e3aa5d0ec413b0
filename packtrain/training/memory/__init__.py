"""What a run needs, by formula before it and by count in it."""
