"""Key-value memory: the pool of blocks, the cache that attention reads, and answers kept whole."""
