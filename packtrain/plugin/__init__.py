"""packtrain's layouts inside a trainer you already have."""
