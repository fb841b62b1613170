"""`megagpt verify`: a run's own configuration, shrunk, in its own layout on local processes and without DeepSpeed."""
