"""The whole state of an optimiser as flat named tensors, "<parameter name>.<state key>".

The set of names follows from the model and the optimiser alone: state that does not exist yet, because no step was
made or a weight has had no gradient, is written as the zeros it would begin with. So a file is complete or refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gristmill.errors import CheckpointError
from gristmill.model.formats.state import check_shapes
from gristmill.train.optimisers.combined import Combined
from gristmill.train.optimisers.lion import Lion
from gristmill.train.optimisers.masters import MasterWeights
from gristmill.train.optimisers.muon import StackedMuon


def optimiser_tensors(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All state by name, not copied. Raises TypeError for an optimiser that `make_optimiser` does not make."""
    tensors: dict[str, Tensor] = {}
    masters = optimiser.masters if isinstance(optimiser, MasterWeights) else {}
    for name, parameter, part, group in _owned(model, optimiser):
        weight = masters.get(parameter, parameter)
        state = optimiser.state.get(weight) or initial_state(part, group, weight)
        tensors.update({f"{name}.{key}": value for key, value in state.items() if value is not None})
        if parameter in masters:
            tensors[f"{name}.master"] = weight
    return tensors


def load_optimiser_tensors(
    model: nn.Module, optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor], where: str = "optimiser state"
) -> None:
    """Put back what `optimiser_tensors` gave; the next step is then bit for bit what it would have been.

    Raises CheckpointError, naming the tensor and beginning with `where`, when one is missing, surplus or of another
    shape or type; nothing is changed then.
    """
    wanted = optimiser_tensors(model, optimiser)
    check_shapes({name: tensor.shape for name, tensor in wanted.items()}, tensors, where)
    for name, tensor in wanted.items():
        if tensors[name].dtype != tensor.dtype:
            raise CheckpointError(f"{where}: tensor {name} has type {tensors[name].dtype}, expected {tensor.dtype}")
    masters = optimiser.masters if isinstance(optimiser, MasterWeights) else {}
    with torch.no_grad():
        for name, parameter, part, group in _owned(model, optimiser):
            weight = masters.get(parameter, parameter)
            state = optimiser.state[weight]
            for key, begin in initial_state(part, group, weight).items():
                state[key] = begin.copy_(tensors[f"{name}.{key}"])
            if parameter in masters:
                weight.copy_(tensors[f"{name}.master"])


def initial_state(part: torch.optim.Optimizer, group: Mapping[str, Any], weight: Tensor) -> dict[str, Tensor]:
    """The state of one weight before its first step, as `part` will keep it."""
    if isinstance(part, torch.optim.AdamW):
        device = weight.device if group["fused"] else torch.device("cpu")
        step = torch.zeros((), dtype=torch.float32, device=device)
        return {"step": step, "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
    if isinstance(part, Lion):
        return {"exp_avg": torch.zeros_like(weight)}
    if isinstance(part, (torch.optim.Muon, StackedMuon)):
        return {"momentum_buffer": torch.zeros_like(weight)}
    if isinstance(part, torch.optim.SGD):
        return {"momentum_buffer": torch.zeros_like(weight)} if group["momentum"] else {}
    if isinstance(part, torch.optim.Adafactor):
        step = torch.zeros((), dtype=torch.float32)
        if weight.ndim < 2:
            return {"step": step, "variance": torch.zeros_like(weight)}
        rows, columns = torch.zeros_like(weight[..., :1]), torch.zeros_like(weight[..., :1, :])
        return {"step": step, "row_var": rows, "col_var": columns}
    raise TypeError(f"the state of {type(part).__name__} has no names here")


def _owned(
    model: nn.Module, optimiser: torch.optim.Optimizer
) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer, dict[str, Any]]]:
    """Name, weight, optimiser and group of every weight that is trained, in the model's order."""
    masters = optimiser.masters if isinstance(optimiser, MasterWeights) else {}
    inner = optimiser.inner if isinstance(optimiser, MasterWeights) else optimiser
    parts = inner.parts if isinstance(inner, Combined) else [inner]
    owner = {weight: (part, group) for part in parts for group in part.param_groups for weight in group["params"]}
    for name, parameter in model.named_parameters():
        if (found := owner.get(masters.get(parameter, parameter))) is not None:
            yield name, parameter, *found
