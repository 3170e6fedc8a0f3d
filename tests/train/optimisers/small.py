"""A tiny mixture of experts with every kind of weight, and gradients by number."""

from __future__ import annotations

import torch
from torch import nn

from gristmill.model.config import FeedForwardConfig, ModelConfig, MoEConfig
from gristmill.model.transformer import Transformer

NAMES = ["adamw", "muon", "lion", "adafactor", "sgd"]


def small_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> Transformer:
    """Two layers, width 16, three experts, an output head of its own."""
    mixture = MoEConfig(num_experts=3, top_k=1, intermediate_size=8, shared_intermediate_size=8)
    model = Transformer(
        ModelConfig(
            vocab_size=24,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            intermediate_size=32,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            feed_forward=FeedForwardConfig(moe=mixture),
        )
    )
    model.initialise(seed)
    return model.to(dtype)


def set_gradients(model: nn.Module, number: int) -> None:
    """Gradients that depend on the number alone."""
    draw = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw).to(parameter.dtype)


def walk(model: nn.Module, optimiser: torch.optim.Optimizer, numbers: range) -> None:
    """One step for each number, the rate falling with it."""
    for number in numbers:
        set_gradients(model, number)
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 / (1 + number) * group["scale"]
        optimiser.step()
        optimiser.zero_grad()


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the weights of `source`."""
    with torch.no_grad():
        for new, old in zip(target.parameters(), source.parameters(), strict=True):
            new.copy_(old)


def equal(left: nn.Module, right: nn.Module) -> bool:
    """Whether all weights are equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))
