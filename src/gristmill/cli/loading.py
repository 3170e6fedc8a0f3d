"""The options of every verb that runs a model: how its weights and its memory are kept."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a model is loaded."""

    dtype: str = "float32"
    """Type of the weights: float32, bfloat16 or float16."""
    quantization: str | None = None
    """Keep the weights in fewer bits: int8, w8a8 (8-bit activations too: the fastest) or int4."""
    kv_cache_dtype: str | None = None
    """Type of keys and values: float32, bfloat16, float16 or int8; when not given, float32 for plain float32 weights
    and bfloat16 for others."""
    speculation: str | None = None
    """Draft tokens to verify several at a time: ngram, early-exit:LAYERS or the name of a smaller model."""

    @property
    def loading(self) -> dict[str, Any]:
        """These options, as `LLM` takes them."""
        return {field.name: getattr(self, field.name) for field in fields(Loading)}
