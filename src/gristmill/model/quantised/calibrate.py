"""What the layers of a decoder read on calibration text, block by block.

A block is measured on what the blocks before it give once they are quantised, so that it can make up for their errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gristmill.errors import RequestError
from gristmill.model.attention.layer import Step
from gristmill.model.attention.packed import PackedAttention
from gristmill.model.block import Block
from gristmill.model.transformer import Transformer

_TOKENS_AT_ONCE = 4096


class Inputs:
    """Second moments of what one layer reads. hessian: the mean of x x', (in, in), up to a factor the Hessian of the
    squared error of its outputs; magnitude: the mean of |x|, (in,). Both float32."""

    def __init__(self, size: int) -> None:
        self.tokens = 0
        self.hessian = torch.zeros(size, size)
        self.magnitude = torch.zeros(size)

    def add(self, x: Tensor) -> None:
        """Take the inputs x (..., in) in."""
        rows = x.reshape(-1, x.shape[-1]).float()
        if not len(rows):
            return
        self.tokens += len(rows)
        share = len(rows) / self.tokens
        self.hessian = self.hessian.to(rows.device).lerp_(rows.T @ rows / len(rows), share)
        self.magnitude = self.magnitude.to(rows.device).lerp_(rows.abs().mean(0), share)


@dataclass(frozen=True)
class MeasuredBlock:
    """A block of a decoder: the prefix of its names, and what each of its linear layers reads, by full name."""

    prefix: str
    block: Block
    inputs: dict[str, Inputs]


@torch.no_grad()
def measured_blocks(model: Transformer, calibration: Sequence[Sequence[int]]) -> Iterator[MeasuredBlock]:
    """One block after the other; whatever the caller has made of it when it asks for the next is what that one reads.

    Raises RequestError for calibration without sequences, an empty one, one beyond the context, an id that is none, or
    a model whose layers share all weights, of which no block stands behind one text alone.
    """
    _check(model, calibration)
    parts = _parts(model, calibration)
    for index, module in enumerate(model.layers):
        assert isinstance(module, Block)
        prefix = f"layers.{index}."
        linears = {f"{prefix}{name}": layer for name, layer in module.named_modules() if type(layer) is nn.Linear}
        inputs = {name: Inputs(layer.in_features) for name, layer in linears.items()}
        hooks = [linears[name].register_forward_pre_hook(_taking(inputs[name])) for name in linears]
        try:
            for x, step in parts:
                module(x, step, index)
        finally:
            for hook in hooks:
                hook.remove()
        yield MeasuredBlock(prefix, module, inputs)
        parts = [(module(x, step, index), step) for x, step in parts]


def _taking(inputs: Inputs) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _, arguments: inputs.add(arguments[0])


def _parts(model: Transformer, calibration: Sequence[Sequence[int]]) -> list[tuple[Tensor, Step]]:
    """The first block's inputs (tokens, hidden), some sequences together, and what the layers share."""
    device = next(model.parameters()).device
    groups: list[list[Sequence[int]]] = [[]]
    for sequence in calibration:
        if groups[-1] and sum(map(len, groups[-1])) + len(sequence) > _TOKENS_AT_ONCE:
            groups.append([])
        groups[-1].append(sequence)
    parts = []
    for group in groups:
        lengths = [len(sequence) for sequence in group]
        ids = torch.tensor([token for sequence in group for token in sequence], device=device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
        x = model.embed(ids, positions)
        parts.append((x, model.step(positions, PackedAttention(lengths, device), x.dtype)))
    return parts


def _check(model: Transformer, calibration: Sequence[Sequence[int]]) -> None:
    def refuse(why: str) -> RequestError:
        return RequestError(f"calibration: {why}", field="calibration")

    if not calibration:
        raise refuse("there are no sequences; give some hundred tokens at least, of text like that of the model's use")
    config = model.config
    if model.order != list(range(len(model.layers))):
        raise refuse("layers that share all their weights cannot be calibrated one by one; use method 'round'")
    if config.cross_attention:
        raise refuse("a decoder that reads an encoder cannot be calibrated on text alone; use method 'round'")
    for number, sequence in enumerate(calibration):
        if not 0 < len(sequence) <= config.context:
            raise refuse(f"sequence {number} has {len(sequence)} tokens, the context holds {config.context}")
        if not 0 <= min(sequence) <= max(sequence) < config.vocab_size:
            raise refuse(f"sequence {number} has a token id outside the vocabulary of {config.vocab_size}")
