"""What a model is made ready with before its first step: recomputation, dropout, compilation."""

from __future__ import annotations

import torch
from torch import nn

from gristmill.core import Loader
from gristmill.corpus.loader import PackedLoader
from gristmill.corpus.mixture import MixedLoader
from gristmill.corpus.shards import TokenSource, check_vocabulary
from gristmill.corpus.workers import Prefetched
from gristmill.model.block import Block
from gristmill.model.transformer import Stack
from gristmill.train.config import TrainConfig

_GRAPHS = 64
"""Graphs of a block: one for each number of groups of segments of like length, with gradients and without. Beyond its
usual limit of 8 torch.compile runs what is new uncompiled, and a warning in the log is all that tells."""


def check_model(model: nn.Module, *loaders: Loader | None) -> None:
    """Raise DataError when ids of a loader's token sources may have no row in the model's embedding."""
    for part in model.modules():
        if isinstance(part, Stack):
            for source in (source for loader in loaders for source in _sources(loader)):
                check_vocabulary(source, part.config)


def _sources(loader: Loader | None) -> list[TokenSource]:
    if isinstance(loader, Prefetched):
        return _sources(loader.loader)
    if isinstance(loader, MixedLoader):
        return [part.source for part in loader.parts]
    return [loader.source] if isinstance(loader, PackedLoader) else []


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
                part.compile(dynamic=None, recompile_limit=_GRAPHS)
