"""Token files on disk and the pure arithmetic that turns them into samples. Never imports torch."""
