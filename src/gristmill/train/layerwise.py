"""Greedy layer-wise pretraining without labels: each layer learns to rebuild what it reads, from the first one up.

Source: Bengio et al. 2006, section 4; Vincent et al. 2008 (corrupted inputs).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from gristmill.errors import DataError


def pretrain_layers(
    layers: Sequence[nn.Linear],
    inputs: Tensor,
    *,
    epochs: int = 30,
    learning_rate: float = 3e-3,
    batch_size: int = 64,
    corruption: float = 0.0,
    seed: int = 0,
) -> list[list[float]]:
    """Train a stack of sigmoid layers in place on `inputs` (samples, size), values in [0, 1], without any label.

    Layer k is trained once layers below it are, on what they give: it codes s(W x + b) and rebuilds s(W' code + c),
    and W, b and c (thrown away afterwards) minimise the cross-entropy of the rebuilt vector against x. `corruption`
    is the share of values of x set to 0 before coding. Returns, per layer, the cross-entropy in nats per sample of
    each epoch, first to last. Raises DataError for inputs out of range or of another size than the first layer's.
    """
    if inputs.ndim != 2 or inputs.shape[1] != layers[0].in_features:
        raise DataError(f"inputs must be (samples, {layers[0].in_features}), got {tuple(inputs.shape)}")
    if len(inputs) == 0 or not bool(((inputs >= 0) & (inputs <= 1)).all()):
        raise DataError("inputs must hold at least one sample and values in [0, 1]; scale them first")
    history = []
    for layer in layers:
        generator = Generator().manual_seed(seed)
        rebuilt_bias = nn.Parameter(torch.zeros(layer.in_features))
        optimiser = torch.optim.Adam([*layer.parameters(), rebuilt_bias], lr=learning_rate)
        losses = []
        for _ in range(epochs):
            total = 0.0
            for rows in torch.randperm(len(inputs), generator=generator).split(batch_size):
                x = inputs[rows]
                kept = torch.rand(x.shape, generator=generator) >= corruption
                loss = reconstruction_loss_sum(layer, rebuilt_bias, x, x * kept)
                optimiser.zero_grad()
                (loss / len(rows)).backward()
                optimiser.step()
                total += float(loss.detach())
            losses.append(total / len(inputs))
        history.append(losses)
        with torch.no_grad():
            inputs = torch.sigmoid(layer(inputs))
    return history


def reconstruction_loss_sum(layer: nn.Linear, rebuilt_bias: Tensor, x: Tensor, seen: Tensor) -> Tensor:
    """Summed cross-entropy in nats between `x` (samples, size) and what `layer`, read in both directions, rebuilds
    from `seen` of the same shape. It is least, and not 0, where both are equal."""
    code = torch.sigmoid(layer(seen))
    return F.binary_cross_entropy_with_logits(F.linear(code, layer.weight.T, rebuilt_bias), x, reduction="sum")
