"""Checkpoints: atomic, checksummed, readable by any layout."""
