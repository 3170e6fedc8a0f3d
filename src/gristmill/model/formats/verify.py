"""Compare an exported model with transformers on the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from gristmill.errors import MissingExtra
from gristmill.model.transformer import Transformer


def logits_difference(model: Transformer, directory: Path, token_ids: Sequence[int]) -> float:
    """Greatest absolute difference between our logits and those of transformers' AutoModelForCausalLM.

    Raises MissingExtra when transformers is not installed.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise MissingExtra("transformers", "verify") from error
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.tensor([list(token_ids)])
    with torch.inference_mode():
        return float((model(ids) - theirs(ids).logits).abs().max())
