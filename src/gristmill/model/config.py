"""What an architecture is: sizes and constants, under the names Hugging Face configurations use."""

from __future__ import annotations

from dataclasses import dataclass

from gristmill.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A pre-norm decoder with rotary positions, grouped-query attention and SwiGLU (the Llama family).

    Raises CheckpointError, naming the fields, when sizes do not fit together.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        sizes = {
            name: getattr(self, name)
            for name in (
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "intermediate_size",
                "max_position_embeddings",
            )
        }
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise CheckpointError(f"{name} must be a whole number of at least 1, got {size!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        for name in ("rope_theta", "rms_norm_eps"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise CheckpointError(f"{name} must be above 0, got {getattr(self, name)}")

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of all key heads together (and of all value heads)."""
        return self.num_key_value_heads * self.head_dim

    def matrix_parameters(self) -> int:
        """Weights that take part in a matrix product per token, the output head included."""
        attention = self.hidden_size * (2 * self.query_size + 2 * self.key_value_size)
        feedforward = 3 * self.hidden_size * self.intermediate_size
        return self.num_hidden_layers * (attention + feedforward) + self.vocab_size * self.hidden_size

    def flops_per_token(self, context: int, *, training: bool = True) -> float:
        """Floating-point operations per token at a mean attended length of `context` tokens.

        Two per multiply-add: 2 x matrix parameters, plus scores and values of attention; three times that with the
        backward pass.

        Source: Kaplan et al. 2020, table 1.
        """
        attention = 4.0 * self.num_hidden_layers * self.query_size * context
        return (3.0 if training else 1.0) * (2.0 * self.matrix_parameters() + attention)

    def kv_bytes_per_token(self, bytes_per_value: int = 4) -> int:
        """Memory that one token's keys and values take in all layers."""
        return 2 * self.num_hidden_layers * self.key_value_size * bytes_per_value
