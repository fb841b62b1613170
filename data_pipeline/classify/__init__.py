"""Text classifiers: our own hashed linear one, trained by `megagpt data train-classifier`, and fastText models."""
