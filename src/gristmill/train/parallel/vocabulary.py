"""An embedding and an output head whose vocabulary is split over a tensor group.

Source: Shoeybi et al. 2019, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gristmill.tokens.batch import IGNORED
from gristmill.train.parallel.collectives import TensorGroup, paired
from gristmill.train.parallel.slices import Slice

_CHUNK_ROWS = 1024


class VocabularyEmbedding(nn.Embedding):
    """Looks up the ids of its own part; the group adds up."""

    def __init__(self, group: TensorGroup, vocabulary: Slice, width: int) -> None:
        self.group, self.begin = group, first_row(group, vocabulary)
        super().__init__(vocabulary.sizes(group.rank, group.size)[0], width, device="meta")

    def forward(self, input: Tensor) -> Tensor:
        """ids (tokens,) -> (tokens, width), whole."""
        local, mine = _local_ids(input, self.begin, self.num_embeddings)
        return self.group.reduce(F.embedding(local, self.weight) * mine[..., None])


class VocabularyHead(nn.Linear):
    """Scores of its own part of the vocabulary, gathered. A loss goes by `vocabulary_cross_entropy_sum` instead."""

    def __init__(self, group: TensorGroup, vocabulary: Slice, width: int, bias: bool) -> None:
        super().__init__(width, vocabulary.sizes(group.rank, group.size)[0], bias=bias, device="meta")
        self.group, self.vocabulary = group, vocabulary

    def forward(self, input: Tensor) -> Tensor:
        """hidden (..., width) -> logits (..., vocabulary), whole."""
        group, begin, rows = self.group, first_row(self.group, self.vocabulary), self.out_features
        own = F.linear(group.copy(input), self.weight, self.bias)
        return paired(own, self._gather, lambda whole: whole[..., begin : begin + rows].contiguous())

    def mark(self) -> None:
        """Give the weight its own cross-entropy, which `linear_cross_entropy_sum` hands over to. FSDP makes the weight
        anew, so this is for every forward pass."""
        self.weight.cross_entropy_sum = self._cross_entropy_sum  # type: ignore[attr-defined]

    def _cross_entropy_sum(self, hidden: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
        begin = first_row(self.group, self.vocabulary)
        return vocabulary_cross_entropy_sum(self.group, begin, hidden, self.weight, targets, bias, softcap)

    def _gather(self, own: Tensor) -> Tensor:
        sizes = [self.vocabulary.sizes(part, self.group.size)[0] for part in range(self.group.size)]
        widest = F.pad(own, (0, max(sizes) - own.shape[-1])).contiguous()
        parts = [torch.empty_like(widest) for _ in sizes]
        dist.all_gather(parts, widest, group=self.group.group)
        return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], dim=-1)


def vocabulary_cross_entropy_sum(
    group: TensorGroup,
    begin: int,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`gristmill.objectives.cross_entropy.linear_cross_entropy_sum` where `weight` and `bias` hold the rows of the
    vocabulary from `begin` on. hidden and targets are the same on every process of the group, and so is the sum.

    Three numbers per row travel (greatest logit, sum of exponentials, logit of the target), never the logits.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    learning = torch.is_grad_enabled()
    total: Tensor = _VocabularyCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, group, begin, dtype, softcap, learning
    )
    return total


class _VocabularyCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        group: TensorGroup,
        begin: int,
        dtype: torch.dtype,
        softcap: float | None,
        learning: bool,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden, grad_weight = (torch.zeros_like(part, dtype=torch.float32) for part in (hidden, weight))
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        head = weight.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), _CHUNK_ROWS):
                rows = slice(start, start + _CHUNK_ROWS)
                part, counted = hidden[rows].to(dtype), (targets[rows] != IGNORED)[:, None]
                logits = part @ head.T if bias is None else part @ head.T + bias.to(dtype)
                logits = logits.float() if softcap is None else softcap * torch.tanh(logits.float() / softcap)
                local, mine = _local_ids(targets[rows, None], begin, len(weight))
                logprob, shares = _softmax(group, logits, local, mine)
                total -= (logprob * counted).sum()
                if not learning:
                    continue
                grad = shares.scatter_add_(1, local, -mine.float()).mul_(counted)
                if softcap is not None:
                    grad *= 1 - (logits / softcap).square()
                if grad_bias is not None:
                    grad_bias += grad.sum(dim=0)
                grad_hidden[rows] = grad.to(dtype) @ head
                grad_weight += grad.to(dtype).T @ part
        if learning:
            dist.all_reduce(grad_hidden, group=group.group)
        ctx.save_for_backward(*((grad_hidden, grad_weight, grad_bias) if learning else ()))
        ctx.dtypes = [None if part is None else part.dtype for part in (hidden, weight, bias)]
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (upstream,) = grads
        found = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (*(None if grad is None else (grad * upstream).to(dtype) for grad, dtype in found), *(None,) * 6)


def _softmax(group: TensorGroup, logits: Tensor, local: Tensor, mine: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of the targets (rows, 1), and the probabilities of the own part (rows, its vocabulary)."""
    greatest = logits.amax(dim=1, keepdim=True)
    dist.all_reduce(greatest, dist.ReduceOp.MAX, group=group.group)
    shares = (logits - greatest).exp()
    sums = torch.cat((shares.sum(dim=1, keepdim=True), logits.gather(1, local) * mine), dim=1)
    dist.all_reduce(sums, group=group.group)
    whole, target = sums.split(1, dim=1)
    return target - greatest - whole.log(), shares / whole


def first_row(group: TensorGroup, vocabulary: Slice) -> int:
    """The first id of this process's part."""
    return sum(vocabulary.sizes(part, group.size)[0] for part in range(group.rank))


def _local_ids(ids: Tensor, begin: int, rows: int) -> tuple[Tensor, Tensor]:
    """Ids counted from `begin`, and which of them are inside; those outside become 0."""
    mine = (ids >= begin) & (ids < begin + rows)
    return (ids - begin).masked_fill(~mine, 0), mine
