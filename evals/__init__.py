"""Evaluation of checkpoints through lm-eval, and the report of a run."""
