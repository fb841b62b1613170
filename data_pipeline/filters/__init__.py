"""Filters: one file a rule set, each with its source."""
