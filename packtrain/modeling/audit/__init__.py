"""Does attention leak between the documents of a batch? Measured on the model itself."""
