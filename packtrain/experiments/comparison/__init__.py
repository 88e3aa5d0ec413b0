"""`packtrain compare`: variants run side by side, and the report of it."""
