"""Measurements of the toolkit itself, on the machine at hand."""
