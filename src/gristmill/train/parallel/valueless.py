"""Running a model on tensors without values, and counting what it keeps and sends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gristmill.errors import GristmillError
from gristmill.model.attention.packed import PackedAttention
from gristmill.model.moe import MixtureOfExperts
from gristmill.model.positions.absolute import LearnedPositions
from gristmill.model.transformer import Transformer
from gristmill.objectives.causal import CausalLM, next_token_loss_sum
from gristmill.tokens.batch import PackedBatch
from gristmill.train.parallel.expert import SplitMixture

_KINDS = {
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "reduce_scatter_": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "alltoall_base_": "all-to-all",
}
Call = tuple[str, str, int]
"""Kind, name of the group, bytes of the whole tensor."""


class EveryToken(CausalLM):
    """Next-token prediction where every position has a target, so that none must be looked for."""

    def loss_sum(self, model: nn.Module, batch: PackedBatch) -> tuple[Tensor, int]:
        assert isinstance(model, Transformer)
        cache = PackedAttention(batch.segment_lengths, batch.input_ids.device)
        hidden = model.hidden_states(batch.input_ids, batch.position_ids, cache)
        return next_token_loss_sum(model, hidden, batch.target_ids), batch.tokens


class Collectives(TorchDispatchMode):
    """Counts collectives by operator, group and bytes of the largest tensor, which is the whole one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[Call] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.partition("::")[2]
            if name not in _KINDS:
                raise GristmillError(f"a collective that the dry run does not know: {name}")
            # of a list of parts, which are one tensor, the sum
            sizes = [sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, Tensor)) for arg in args]
            groups = [arg for arg in args if isinstance(arg, torch.ScriptObject)]
            self.calls[_KINDS[name], _group_name(groups), max(sizes)] += 1
        return func(*args, **(kwargs or {}))


def _group_name(found: Sequence[torch.ScriptObject]) -> str:
    for one in found:
        try:
            return str(dist.ProcessGroup.unbox(one).group_name)
        except RuntimeError:  # the operator's own options
            continue
    raise AssertionError("a collective without a group")


class Kept:
    """Bytes of what is saved for the backward pass, weights aside; views of one memory count once."""

    def __init__(self) -> None:
        self.nbytes, self._seen = 0, dict[int, Tensor]()

    def note(self, tensor: Tensor) -> Tensor:
        local = local_part(tensor)
        source = tensor if tensor._base is None else tensor._base
        storage = local.untyped_storage()
        if not (source.is_leaf and source.requires_grad) and storage._cdata not in self._seen:
            self._seen[storage._cdata] = local  # held, or another might get its place
            self.nbytes += storage.nbytes()
        return tensor


def ask_no_values(model: nn.Module) -> None:
    """Replace what looks at values: routing is taken to be even, positions to be in the table."""
    for part in model.modules():
        if isinstance(part, LearnedPositions):
            part.forward = partial(_look_up, part)  # type: ignore[method-assign]
        if isinstance(part, MixtureOfExperts):
            part._one_by_one = partial(_evenly, part, part._one_by_one)  # type: ignore[method-assign]
        if isinstance(part, SplitMixture):
            part.sizes = partial(_even_sizes, part)  # type: ignore[method-assign]


def _look_up(part: LearnedPositions, positions: Tensor) -> Tensor:
    return nn.functional.embedding(positions + part.offset, part.weight)


class _Known:
    """Counts that are known without values."""

    def __init__(self, counts: list[int]) -> None:
        self._counts = counts

    def tolist(self) -> list[int]:
        return self._counts


def _evenly(part: MixtureOfExperts, compute: Callable[..., Tensor], rows: Tensor, counts: Tensor) -> Tensor:
    return compute(rows, _Known(_shares(len(rows), len(part.gate_up_proj))))


def _even_sizes(part: SplitMixture, leaving: Tensor, arriving: Tensor, rows: int) -> tuple[list[int], list[int]]:
    sent = _shares(rows, part.parts)
    return sent, [sent[part.part]] * part.parts


def _shares(number: int, parts: int) -> list[int]:
    return [number // parts + (part < number % parts) for part in range(parts)]


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    own: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return own
