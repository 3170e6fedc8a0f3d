"""Model sizes by name: the one dial of the quickstart."""

from typing import Literal

from gristmill.model.config import ModelConfig

Preset = Literal["nano", "tiny", "small"]

# name: (layers, hidden size, heads, key-value heads, vocabulary)
_SHAPES: dict[Preset, tuple[int, int, int, int, int]] = {
    "nano": (4, 128, 4, 2, 2048),
    "tiny": (6, 256, 4, 2, 4096),
    "small": (12, 512, 8, 4, 8192),
}


def preset(name: Preset, vocab_size: int | None = None) -> ModelConfig:
    """The configuration of a preset: nano about 1M, tiny about 5.5M, small about 42M parameters."""
    layers, hidden, heads, kv_heads, vocabulary = _SHAPES[name]
    return ModelConfig(
        vocab_size=vocab_size or vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        intermediate_size=-(-hidden * 8 // 3 // 64) * 64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
