"""A decoder of about so many parameters: one family of shapes, from thousands to hundreds of billions."""

from __future__ import annotations

import math

from gristmill.errors import GristmillError
from gristmill.model.accounting import matrix_parameters
from gristmill.model.config import ModelConfig


def shape_for(parameters: float, vocab_size: int, context: int) -> ModelConfig:
    """The shape whose matrix parameters (blocks and tied head) are nearest, in logarithms.

    Depth grows as half the root of the width: 32 layers at 4096, as in Llama 2 7B. Raises GristmillError when even the
    smallest shape is more than a third too large, which the vocabulary then causes.
    """
    best = _shape(16, vocab_size, context)
    width = 16
    while matrix_parameters(_shape(width, vocab_size, context)) < 2 * parameters:
        candidate = _shape(width, vocab_size, context)
        if abs(math.log(matrix_parameters(candidate) / parameters)) < abs(
            math.log(matrix_parameters(best) / parameters)
        ):
            best = candidate
        width += 8 if width < 128 else 32 if width < 512 else 128
    if matrix_parameters(best) > 4 / 3 * parameters:
        raise GristmillError(
            f"{parameters:.3g} parameters are too few for a vocabulary of {vocab_size}: the smallest model here has "
            f"{matrix_parameters(best):,}"
        )
    return best


def _shape(width: int, vocab_size: int, context: int) -> ModelConfig:
    head_dim = 8 if width % 16 else 16 if width < 128 else 32 if width < 512 else 64 if width < 4096 else 128
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=max(2, round(math.sqrt(width) / 2)),
        num_attention_heads=width // head_dim,
        num_key_value_heads=width // head_dim,
        head_dim=head_dim,
        intermediate_size=-(-width * 8 // 3 // 32) * 32,
        max_position_embeddings=context,
    )
