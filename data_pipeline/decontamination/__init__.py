"""Benchmark items that stand in the documents: an index of their n-grams, and what is done about a hit."""
