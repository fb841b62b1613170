"""Process groups and integer plans: who holds what."""
