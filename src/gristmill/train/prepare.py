"""What a model is made ready with before its first step: type of the weights, recomputation, compilation."""

from __future__ import annotations

import torch
from torch import nn

from gristmill.model.block import Block
from gristmill.model.transformer import Stack
from gristmill.train.config import TrainConfig


def device_of(model: nn.Module) -> torch.device:
    """Where the weights are."""
    return next(model.parameters()).device


def prepare_model(model: nn.Module, config: TrainConfig) -> None:
    """Change `model` in place as the configuration asks; names and values of its weights stay."""
    for part in model.modules():
        if isinstance(part, Stack):
            part.checkpoint_activations = config.checkpoint_activations
        if isinstance(part, Block):
            part.dropout = config.dropout
            if config.compile:
                part.compile(dynamic=None)
