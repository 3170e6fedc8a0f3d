"""The inference engine: scheduler, block pool, sampling, and the LLM class."""
