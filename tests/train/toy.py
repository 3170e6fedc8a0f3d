"""A model of a few thousand weights and sequences that it can learn at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gristmill.corpus.loader import PackedLoader
from gristmill.corpus.shards import TokenList
from gristmill.model.config import ModelConfig
from gristmill.model.transformer import Transformer
from gristmill.objectives.causal import CausalLM
from gristmill.tokens.batch import PackedBatch
from gristmill.train import checkpoint, loop
from gristmill.train.config import TrainConfig
from gristmill.train.loop import train

VOCABULARY = 24
CONFIG = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=32,
    max_position_embeddings=64,
)


def toy_model(seed: int = 0) -> Transformer:
    """The same weights for the same seed."""
    model = Transformer(CONFIG)
    model.initialise(seed)
    return model


def toy_loader(documents: int = 60, *, seed: int = 0, mask: bool = False, rows: int = 2) -> PackedLoader:
    """Sequences in which each token follows from the one before it."""
    draw = np.random.default_rng(seed)
    items: list[tuple[np.ndarray, np.ndarray | None]] = []
    for _ in range(documents):
        ids = (draw.integers(VOCABULARY) + 5 * np.arange(draw.integers(4, 28))) % VOCABULARY
        learned = (draw.random(len(ids)) < 0.5) | (np.arange(len(ids)) == 1)
        items.append((ids, learned.astype(np.uint8) if mask else None))
    return PackedLoader(TokenList(items, vocab_size=VOCABULARY), row_length=32, rows_per_batch=rows, seed=seed)


def toy_config(**changes: Any) -> TrainConfig:
    """Thirty steps with a checkpoint after every fourth."""
    options: dict[str, Any] = {"steps": 30, "learning_rate": 1e-2, "validate_every": 7, "checkpoint_every": 4}
    return TrainConfig(**{**options, **changes})


class Hooked(CausalLM):
    """The causal objective that calls `hook(number)` before the loss of every training batch, counted from 1."""

    def __init__(self, hook: Callable[[int], object]) -> None:
        self.hook, self.calls = hook, 0

    def loss_sum(self, model: torch.nn.Module, batch: PackedBatch) -> tuple[Tensor, int]:
        if model.training:
            self.calls += 1
            self.hook(self.calls)
        return super().loss_sum(model, batch)


def toy_run(directory: Path, config: TrainConfig | None = None, *, objective: CausalLM | None = None) -> Transformer:
    """Train the toy model, or go on with it."""
    model = toy_model()
    train(
        model,
        objective or CausalLM(),
        toy_loader(),
        config or toy_config(),
        directory,
        validation=toy_loader(8, seed=1),
        identity="toy",
    )
    return model


def slow_run(directory: Path) -> None:
    """The run at a pace at which one can kill it."""
    toy_run(directory, objective=Hooked(lambda _: time.sleep(0.01)))


def wide_run(directory: Path) -> None:
    """A few slow steps of a model whose products are large enough for PyTorch to share them among threads."""
    model = Transformer(replace(CONFIG, hidden_size=256, intermediate_size=256))
    model.initialise(0)
    loader = toy_loader(100, rows=16)
    train(model, Hooked(lambda _: time.sleep(0.01)), loader, toy_config(steps=6, checkpoint_every=2), directory)


def run_and_die(directory: Path, where: str) -> None:
    """The run, killed in the middle of its third checkpoint: before anything is written, between its files, or when
    it stands but older ones are not yet deleted."""
    owner, name = {
        "before": (loop, "save_checkpoint"),
        "between": (checkpoint, "write_json"),
        "after": (checkpoint.shutil, "rmtree"),
    }[where]
    original, calls = getattr(owner, name), [0]

    def dying(*arguments: Any, **keywords: Any) -> Any:
        if where == "after" and Path(arguments[0]).name != "step-00000004":
            return original(*arguments, **keywords)
        calls[0] += 1
        if calls[0] == (1 if where == "after" else 3):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)

    setattr(owner, name, dying)
    toy_run(directory, toy_config(background_checkpoints=False))


def weights(model: Transformer) -> dict[str, Tensor]:
    """All weights by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two sets of weights are equal bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
