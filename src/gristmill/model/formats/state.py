"""Give a meta-device model its weights, refusing what does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gristmill.errors import CheckpointError
from gristmill.model.config import ModelConfig
from gristmill.model.transformer import Transformer


class _NothingToDraw(TorchFunctionMode):
    """Skips initial values: there is no memory to draw them into, and on the meta device a normal draw alone imports
    the compiler, which takes longer than the rest of loading a small model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def meta_model(config: ModelConfig) -> Transformer:
    """The module without memory for its weights. Raises CheckpointError for sizes beyond any memory."""
    try:
        with torch.device("meta"), _NothingToDraw():
            return Transformer(config)
    except RuntimeError as error:
        raise CheckpointError(f"no model can have these sizes ({error})") from error


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
        check_tensor(name, found[name], shape, where)


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], where: str) -> None:
    """Raise CheckpointError unless the tensor has this shape and a floating type."""
    if tensor.shape != shape:
        raise CheckpointError(f"{where}: tensor {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if not tensor.is_floating_point():
        raise CheckpointError(f"{where}: tensor {name} has type {tensor.dtype}, expected a floating type")


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


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Raises OSError when it cannot be written, as every other writer does: safetensors has
    an error of its own for a full disk, which `atomic_directory` would not know."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"
