"""Supervised pretraining and transfer: learn a task that has labels, change the head, learn the one that has few.

Source: Xiao and Zhu 2025, section 1.1.1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gristmill.errors import DataError
from gristmill.model.heads import HeadConfig, Headed


def transfer(source: Headed, head: HeadConfig, seed: int) -> Headed:
    """A new model with a copy of `source`'s body, bit for bit, and a new head drawn from `seed`. `source` stays as it
    is, its head is left behind."""
    body = type(source.body)(source.config)
    target = Headed(body, head)
    target.initialise(seed)
    body.load_state_dict(source.body.state_dict())
    return target.to(source.body.embed_tokens.weight)


def fit(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    *,
    steps: int,
    learning_rate: float = 3e-3,
    batch_size: int = 32,
    seed: int = 0,
) -> list[float]:
    """Train a classifier in place; returns the mean loss of each step, in nats.

    input_ids (rows, tokens), labels (rows,), both int64: a small task that fits in memory. Rows are drawn with
    replacement. Raises DataError when there is none, or not a label for each.
    """
    if len(input_ids) == 0 or labels.shape != (len(input_ids),):
        raise DataError(f"give a label for each of the rows, at least one: {len(input_ids)}, {tuple(labels.shape)}")
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
    losses = []
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(input_ids), (batch_size,), generator=generator)
        loss = F.cross_entropy(model(input_ids[rows]), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@torch.inference_mode()
def accuracy(model: Any, input_ids: Tensor, labels: Tensor) -> float:
    """Share of rows whose most probable label is the right one."""
    return float((model(input_ids).argmax(dim=-1) == labels).float().mean())
