"""`megagpt bench data`: the pipeline measured side by side with datatrove, and its stages against their limits."""
