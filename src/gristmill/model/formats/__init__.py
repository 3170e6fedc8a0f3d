"""Checkpoint formats: Hugging Face directories and GGUF files."""
