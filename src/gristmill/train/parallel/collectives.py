"""Collectives that gradients flow through: each pass forward has its counterpart backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Move = Callable[[Tensor], Tensor]


class _Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Move, backward: Move) -> Tensor:
        ctx.move = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return ctx.move(grads[0]), None, None


def paired(x: Tensor, forward: Move, backward: Move) -> Tensor:
    """forward(x), whose gradient goes through `backward`."""
    out: Tensor = _Pair.apply(x, forward, backward)  # type: ignore[no-untyped-call]
    return out


@dataclass(eq=False)
class TensorGroup:
    """Processes that share every matrix product, and how states go in and out of it.

    Outside of products states are whole on every process. With `sequence` they are, within the blocks, rows of tokens:
    `tokens` is how many there are altogether, rounded up to equal parts by rows of zeros.

    Source: Shoeybi et al. 2019, section 3; sequence: Korthikanti et al. 2022, section 4.2.2.
    """

    group: dist.ProcessGroup
    sequence: bool = False
    tokens: int = 0

    def __post_init__(self) -> None:
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)

    def copy(self, x: Tensor) -> Tensor:
        """The same forward; backward the sum over the group."""
        return paired(x, _same, self.sum)

    def reduce(self, x: Tensor) -> Tensor:
        """The sum over the group; backward the same."""
        return paired(x, self.sum, _same)

    def enter(self, x: Tensor) -> Tensor:
        """States (tokens, hidden) on their way into products that are split by their outputs."""
        return paired(x, self.gather, self.sum_scatter) if self.sequence else self.copy(x)

    def leave(self, x: Tensor) -> Tensor:
        """Partial sums (tokens, hidden) on their way out of a product that is split by its inputs."""
        return paired(x, self.sum_scatter, self.gather) if self.sequence else self.reduce(x)

    def begin(self, x: Tensor) -> Tensor:
        """From whole states to this process's tokens, before the first block."""
        self.tokens = len(x)
        return paired(x, self.take, self.gather)

    def end(self, x: Tensor) -> Tensor:
        """Back to whole states, after the last block."""
        return paired(x, self.gather, self.take)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the group."""
        out = x.contiguous().clone()
        dist.all_reduce(out, group=self.group)
        return out

    def gather(self, x: Tensor) -> Tensor:
        """All tokens, from the part of every process."""
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts)[: self.tokens]

    def take(self, x: Tensor) -> Tensor:
        """The part of this process, a copy."""
        return self._padded(x).chunk(self.size)[self.rank].clone()

    def sum_scatter(self, x: Tensor) -> Tensor:
        """The part of this process of the sum over the group."""
        parts = [part.contiguous() for part in self._padded(x).chunk(self.size)]
        out = torch.empty_like(parts[0])
        dist.reduce_scatter(out, parts, group=self.group)
        return out

    def _padded(self, x: Tensor) -> Tensor:
        return torch.cat((x, x.new_zeros((-len(x) % self.size, *x.shape[1:]))))


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)
