"""Readers: one file a format, each yields records of one shard."""
