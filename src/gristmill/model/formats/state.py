"""Give a meta-device model its weights, refusing what does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from gristmill.errors import CheckpointError
from gristmill.model.config import ModelConfig
from gristmill.model.transformer import Transformer


def meta_model(config: ModelConfig) -> Transformer:
    """The module without memory for its weights."""
    with torch.device("meta"):
        return Transformer(config)


def check_names(wanted: Iterable[str], found: Iterable[str], where: str) -> None:
    """Raise CheckpointError unless the two sets of tensor names are the same."""
    wanted, found = set(wanted), set(found)
    problems = []
    if missing := sorted(wanted - found):
        problems.append(f"missing: {_some(missing)}")
    if surplus := sorted(found - wanted):
        problems.append(f"no place in this configuration: {_some(surplus)}")
    if problems:
        raise CheckpointError(f"{where}: tensors do not match the model; {'; '.join(problems)}")


def check_shapes(wanted: Mapping[str, torch.Size], found: Mapping[str, Tensor], where: str) -> None:
    """Raise CheckpointError unless `found` has exactly the wanted tensors, of the wanted shapes and floating."""
    check_names(wanted, found, where)
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise CheckpointError(
                f"{where}: tensor {name} has shape {tuple(found[name].shape)}, expected {tuple(shape)}"
            )
        if not found[name].is_floating_point():
            raise CheckpointError(f"{where}: tensor {name} has type {found[name].dtype}, expected a floating type")


def load_state(model: Transformer, state: dict[str, Tensor], dtype: torch.dtype, where: str) -> None:
    """Put `state` (our names) into the model as `dtype`. Raises CheckpointError naming a tensor that does not fit."""
    check_shapes({name: parameter.shape for name, parameter in model.named_parameters()}, state, where)
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    if model.config.tie_word_embeddings:
        # assigning made two parameters of the one matrix
        model.lm_head.weight = model.embed_tokens.weight


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"
