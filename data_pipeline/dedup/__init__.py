"""Exact and near-duplicate removal: signatures per shard, grouping by key, connected components."""
