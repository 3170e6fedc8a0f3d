"""Context parallelism: the tokens of a batch are split over a group of processes, and attention alone crosses over.

Each process takes a contiguous piece of the flat batch. Keys and values of all pieces are gathered for each attention
layer (a reduce-scatter backward); everything else is a matter of one token. A sequence may thus be longer than fits
one process's activations.

Source: Dubey et al. 2024 (Llama 3), section 3.3.2 (all-gather of keys and values, document masks).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from gristmill.core import CAUSAL, AttentionRule, KVCache
from gristmill.errors import GristmillError
from gristmill.model.attention.kernel import rule_attention
from gristmill.model.attention.layer import Step
from gristmill.model.attention.packed import PackedAttention
from gristmill.model.config import ModelConfig
from gristmill.model.transformer import Stack, Transformer
from gristmill.objectives.causal import CausalLM
from gristmill.tokens.batch import PackedBatch
from gristmill.train.parallel.collectives import TensorGroup, paired
from gristmill.train.parallel.mesh import Mesh
from gristmill.train.world import LossModule


class ContextAttention:
    """A `KVCache` for one piece of a flat batch: this process's queries against the keys and values of all pieces.

    segment_lengths: of the whole batch, whose tokens `group` divides evenly. `rows`: tokens of the piece, and those
    behind it that only round up its length; they get zeros.
    """

    keeps = False

    def __init__(self, segment_lengths: Sequence[int], group: TensorGroup, device: torch.device | str = "cpu") -> None:
        tokens = sum(segment_lengths)
        if tokens % group.size:
            raise ValueError(f"{tokens} tokens are not divided by {group.size} processes")
        self.group, self.device, self.tokens = group, device, tokens // group.size
        self.rows = self.tokens
        self.first = group.rank * self.tokens
        spans = list(zip((0, *accumulate(segment_lengths)), accumulate(segment_lengths), strict=False))
        last = self.first + self.tokens
        pieces = [span for span in spans if span[0] < last and span[1] > self.first and span[0] < span[1]]
        # only the first and the last segment of a piece can be cut; those between are attended together
        whole = [span for span in pieces if span[0] >= self.first and span[1] <= last]
        self.head = [span for span in pieces if span[0] < self.first]
        self.tail = [span for span in pieces if span[0] >= self.first and span[1] > last]
        self.whole = PackedAttention([end - begin for begin, end in whole], device)
        self.inside = whole[0][0] if whole else 0, whole[-1][1] if whole else 0
        self.pieces = pieces

    @property
    def lengths(self) -> Tensor:
        """See `KVCache.lengths`: of the whole sequences, not of their parts here."""
        last = self.first + self.tokens
        surplus = self.rows - self.tokens
        lengths = torch.tensor([*(end - begin for begin, end in self.pieces), 1])
        here = torch.tensor([*(min(end, last) - max(begin, self.first) for begin, end in self.pieces), surplus])
        return lengths.repeat_interleave(here).to(self.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule = CAUSAL) -> Tensor:
        """See `KVCache.attend`."""
        query, key, value = (x[: self.tokens] for x in (query, key, value))
        keys, values = self._gather(key, value)
        if torch.is_autocast_enabled("cpu") and query.device.type == "cpu":  # as PackedAttention
            with torch.autocast("cpu", enabled=False):
                out = self._attend(query.float(), keys.float(), values.float(), rule)
        else:
            out = self._attend(query, keys, values, rule)
        return torch.cat((out, out.new_zeros((self.rows - self.tokens, *out.shape[1:]))))

    def _gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.group.tokens = self.tokens * self.group.size
        both = paired(torch.cat((key, value), dim=-1), self.group.gather, self.group.sum_scatter)
        return both[..., : key.shape[-1]], both[..., key.shape[-1] :]

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule) -> Tensor:
        parts = [self._cut(span, query, keys, values, rule) for span in self.head]
        begin, end = self.inside
        if end > begin:
            here = query[begin - self.first : end - self.first]
            parts.append(self.whole.attend(0, here, keys[begin:end], values[begin:end], rule))
        parts += [self._cut(span, query, keys, values, rule) for span in self.tail]
        return torch.cat(parts)

    def _cut(self, span: tuple[int, int], query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule) -> Tensor:
        """The part here of a segment that other processes have parts of."""
        begin, end = span
        low, high = max(begin, self.first), min(end, self.first + self.tokens)
        seen = slice(begin, high if rule.causal else end)  # under a causal rule later keys are seen by none
        here = query[None, low - self.first : high - self.first]
        return rule_attention(here, keys[None, seen], values[None, seen], rule, query_start=low - begin)[0]

    def recur(self, layer: int, mixer: Callable[[Tensor, Any], tuple[Tensor, Any]], x: Tensor) -> Tensor:
        """Refused: a recurrent layer's state would have to wait for the piece before."""
        raise GristmillError("parallel.context does not split recurrent layers; use parallel.shard")


class _Context:
    """Splits each batch and knows the plan of the one at work."""

    def __init__(self, group: TensorGroup, context: int) -> None:
        self.group, self.longest = group, context
        self.cache: ContextAttention | None = None

    def enter(self, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        batch = given[0]
        if not isinstance(batch, PackedBatch):
            raise GristmillError(f"parallel.context splits packed batches, got {type(batch).__name__}")
        whole = batch.rounded_up(self.group.size, self.longest)
        self.cache = ContextAttention(whole.segment_lengths, self.group, whole.input_ids.device)
        first, last = self.cache.first, self.cache.first + self.cache.tokens
        here = tuple(
            max(min(end, last) - max(end - length, first), 0)
            for end, length in zip(accumulate(whole.segment_lengths), whole.segment_lengths, strict=True)
        )
        piece = slice(first, last)
        return (PackedBatch(whole.input_ids[piece], whole.target_ids[piece], whole.position_ids[piece], here),)

    def leave(self, module: nn.Module, given: tuple[Any, ...], sums: dict[str, Tensor]) -> dict[str, Tensor]:
        # every process of the group gives the sum of all pieces; its gradient belongs to its own piece
        return {name: self.group.reduce(value) for name, value in sums.items()}

    def step(self, stack: Stack, position_ids: Tensor, cache: KVCache, dtype: torch.dtype, memory: Any = None) -> Step:
        if self.cache is None:
            raise GristmillError("a model with parallel.context runs through its loss alone")
        self.cache.rows = len(position_ids)
        return Stack.step(stack, position_ids, self.cache, dtype, memory)


def check_context(config: ModelConfig) -> None:
    """Raise GristmillError for a model whose tokens cannot be split."""
    if any(layer.mixer != "attention" for layer in config.layers):
        raise GristmillError("parallel.context does not split recurrent layers; use parallel.shard")
    if config.cross_attention:
        raise GristmillError("parallel.context does not split models with cross-attention; use parallel.shard")


def split_context(module: LossModule, mesh: Mesh) -> None:
    """Make a module take its piece of each batch, in place; its sums are those of the whole batch on every process.

    Gradients are those of the piece: they are to be summed over the context group. Raises GristmillError for a model or
    an objective that looks further than one token outside of attention.
    """
    model, objective = module.model, module.objective
    if not isinstance(model, Transformer) or not isinstance(objective, CausalLM):
        raise GristmillError(
            f"parallel.context trains decoders on next-token prediction (CausalLM), got {type(model).__name__} with "
            f"{type(objective).__name__}"
        )
    check_context(model.config)
    context = _Context(TensorGroup(mesh.group("context")), model.config.context)
    module.register_forward_pre_hook(context.enter)
    module.register_forward_hook(context.leave)
    model.step = partial(context.step, model)  # type: ignore[method-assign]
