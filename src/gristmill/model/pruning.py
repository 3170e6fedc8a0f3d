"""Magnitude pruning: set the smallest weights of every linear layer to zero.

Source: Han et al. 2015, section 3.2, without its retraining.
"""

from __future__ import annotations

import torch
from torch import nn

from gristmill.errors import RequestError


@torch.no_grad()
def prune_linears(model: nn.Module, share: float) -> int:
    """Zero the `share` of smallest magnitude in each `nn.Linear` but the output head, in place; share in [0, 1).

    Returns the number of weights set to zero; 0 changes nothing. Time and memory stay the same: the zeros are stored
    and multiplied like other numbers. Raises RequestError for another share.
    """
    if not 0 <= share < 1:
        raise RequestError(f"share must be in [0, 1), got {share}", field="share")
    count = 0
    for name, layer in model.named_modules():
        if type(layer) is nn.Linear and name.rpartition(".")[2] != "lm_head":
            smallest = layer.weight.abs().flatten().argsort(stable=True)[: int(share * layer.weight.numel())]
            layer.weight.view(-1)[smallest] = 0
            count += len(smallest)
    return count
