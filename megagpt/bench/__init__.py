"""The training step of our engine beside other loops over the same sizes."""
