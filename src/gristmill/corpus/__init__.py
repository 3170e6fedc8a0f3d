"""Sources, cleaning, deduplication, shards and loaders."""
