"""From raw shards to token files. Never imports torch."""
