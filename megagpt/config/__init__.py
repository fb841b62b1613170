"""What a run may be told: every key, its default and its unit, and how files become it."""
