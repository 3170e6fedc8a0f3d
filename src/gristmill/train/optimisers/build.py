"""Which optimiser updates which weight, and which weights decay.

Everything of two dimensions or more decays, embeddings and heads included; norms, biases and other vectors do not.
Weights that need no gradient are left out.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gristmill.errors import GristmillError, closest
from gristmill.model.block import Block
from gristmill.train.optimisers.combined import Combined
from gristmill.train.optimisers.lion import Lion
from gristmill.train.optimisers.masters import MasterWeights
from gristmill.train.optimisers.muon import StackedMuon

OptimiserName = Literal["adamw", "muon", "lion", "adafactor", "sgd"]

_BETAS: dict[str, tuple[float, float]] = {"adamw": (0.9, 0.95), "muon": (0.9, 0.95), "lion": (0.9, 0.99)}
_MOMENTUM = {"muon": 0.95, "sgd": 0.0}


def make_optimiser(
    model: nn.Module,
    name: OptimiserName,
    *,
    learning_rate: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] | None = None,
    momentum: float | None = None,
    muon_scale: float = 1.0,
) -> torch.optim.Optimizer:
    """One optimiser over all trainable weights; set `group["lr"] = rate * group["scale"]` before each step.

    adamw: fused. muon: hidden matrices by Muon, scaled so that AdamW's rates and decay fit, all else by AdamW; expert
    stacks (experts, rows, columns) are a batch of matrices; `muon_scale` multiplies Muon's rate alone. lion: wants
    rates 3 to 10 times below AdamW's and a decay as many times higher. adafactor: the rate bounds the relative
    step, min(rate, 1 / sqrt(step)) times the RMS of the weight. sgd: decay is part of the gradient, which without
    momentum is the same as decoupled.

    `betas` (adamw, muon's AdamW, lion) and `momentum` (muon, sgd) default to what is usual: (0.9, 0.95), lion's
    (0.9, 0.99); 0.95, sgd's 0. Weights in bfloat16 or float16 get float32 masters (see MasterWeights), so make the
    optimiser once the weights are in place. Raises GristmillError for an option that the optimiser has not.

    Source: Loshchilov and Hutter 2019 (AdamW); Jordan et al. 2024 and Liu et al. 2025, eq. 4 (Muon and its scale);
    Chen et al. 2023 (Lion); Shazeer and Stern 2018 (Adafactor).
    """
    _check(name, betas, momentum, muon_scale)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not weights:
        raise GristmillError("the model has no weight to train: every one is frozen")
    masters = {p: p.detach().float() for p in weights if p.dtype in (torch.bfloat16, torch.float16)}
    hidden = hidden_matrices(model) if name == "muon" else set()
    if name == "muon" and not hidden:
        raise GristmillError("optimiser muon: the model has no hidden matrix to train; use adamw")
    first = betas or _BETAS.get(name, (0.0, 0.0))
    speed = _MOMENTUM.get(name, 0.0) if momentum is None else momentum

    def groups(chosen: list[nn.Parameter], scale: float = 1.0) -> list[dict[str, Any]]:
        tensors = [masters.get(p, p) for p in chosen]
        matrices, vectors = [t for t in tensors if t.ndim >= 2], [t for t in tensors if t.ndim < 2]
        pairs = ((matrices, weight_decay), (vectors, 0.0))
        own = {"lr": learning_rate * scale, "scale": scale}
        return [{"params": some, "weight_decay": decay, **own} for some, decay in pairs if some]

    optimiser: torch.optim.Optimizer
    if name == "muon":
        shared: dict[str, Any] = {"momentum": speed, "adjust_lr_fn": "match_rms_adamw"}
        parts: list[torch.optim.Optimizer] = []
        if flat := [p for p in weights if p in hidden and p.ndim == 2]:
            parts.append(torch.optim.Muon(groups(flat, muon_scale), **shared))
        if stacks := [p for p in weights if p in hidden and p.ndim == 3]:
            parts.append(StackedMuon(groups(stacks, muon_scale), momentum=speed))
        if rest := [p for p in weights if p not in hidden]:
            parts.append(_adamw(groups(rest), first))
        optimiser = Combined(parts)
    elif name == "adamw":
        optimiser = _adamw(groups(weights), first)
    elif name == "lion":
        optimiser = Lion(groups(weights), betas=first)
    elif name == "adafactor":
        optimiser = torch.optim.Adafactor(groups(weights))
    else:
        optimiser = torch.optim.SGD(groups(weights), momentum=speed)
    return MasterWeights(optimiser, masters) if masters else optimiser


def hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """The weights of a model's blocks that map states to states: matrices, and stacks of them (experts, rows, columns).

    Not among them: embeddings, heads and whatever else is outside the blocks; convolutions, which work channel by
    channel; and decay rates (A_log), which are a table.
    """
    found = set()
    for block in model.modules():
        if not isinstance(block, Block):
            continue
        for module in block.modules():
            if isinstance(module, (nn.Embedding, nn.Conv1d)):
                continue
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.ndim in (2, 3) and leaf != "A_log" and parameter.requires_grad:
                    found.add(parameter)
    return found


def _adamw(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.AdamW:
    tensors: list[Tensor] = [tensor for group in groups for tensor in group["params"]]
    return torch.optim.AdamW(groups, betas=betas, fused=not any(tensor.is_meta for tensor in tensors))


def _check(name: str, betas: tuple[float, float] | None, momentum: float | None, muon_scale: float) -> None:
    known = get_args(OptimiserName)
    if name not in known:
        raise GristmillError(f"optimiser must be one of {', '.join(known)}, got {name!r}.{closest(name, known)}")
    if betas is not None and name not in _BETAS:
        raise GristmillError(f"optimiser {name} has no betas; leave them out, or use {', '.join(_BETAS)}")
    if momentum is not None and name not in _MOMENTUM:
        raise GristmillError(f"optimiser {name} has no momentum; leave it out, or use {', '.join(_MOMENTUM)}")
    if muon_scale != 1.0 and name != "muon":
        raise GristmillError(f"muon_scale is of the optimiser muon, not of {name}; leave it out")
    for option, values in (("betas", betas or ()), ("momentum", () if momentum is None else (momentum,))):
        if not all(0.0 <= value < 1.0 for value in values):
            raise GristmillError(f"{option} must be in [0, 1), got {', '.join(map(str, values))}")
    if not muon_scale > 0.0:
        raise GristmillError(f"muon_scale must be above 0, got {muon_scale}")
