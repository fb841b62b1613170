"""The stages of a data job: which tasks each has, and what each task depends on."""
