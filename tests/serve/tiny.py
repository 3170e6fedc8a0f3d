"""A random model of a few thousand parameters with the byte tokenizer, as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

from gristmill.model.config import ModelConfig
from gristmill.model.formats.huggingface import save_huggingface
from gristmill.model.transformer import Transformer
from serve.scripted_engine import byte_tokenizer


def save_tiny_model(directory: Path) -> Path:
    """Write the model and return its directory."""
    tokenizer = byte_tokenizer()
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    model = Transformer(config)
    model.initialise(0)
    save_huggingface(model, directory, stop_token_ids=tokenizer.stop_token_ids)
    tokenizer.save(directory)
    return directory
