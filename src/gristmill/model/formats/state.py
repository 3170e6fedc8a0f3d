"""Give a meta-device model its weights, refusing what does not fit."""

from __future__ import annotations

import torch
from torch import Tensor

from gristmill.errors import CheckpointError
from gristmill.model.config import ModelConfig
from gristmill.model.formats.llama_names import check_names
from gristmill.model.transformer import Transformer


def meta_model(config: ModelConfig) -> Transformer:
    """The module without memory for its weights."""
    with torch.device("meta"):
        return Transformer(config)


def load_state(model: Transformer, state: dict[str, Tensor], dtype: torch.dtype, where: str) -> None:
    """Put `state` (our names) into the model as `dtype`. Raises CheckpointError naming a tensor that does not fit."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    check_names(shapes, state, where)
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise CheckpointError(
                f"{where}: tensor {name} has shape {tuple(state[name].shape)}, expected {tuple(shape)}"
            )
        if not state[name].is_floating_point():
            raise CheckpointError(f"{where}: tensor {name} has type {state[name].dtype}, expected a floating type")
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
