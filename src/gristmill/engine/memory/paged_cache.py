"""The key-value memory that attention reads through block tables.

The token at position p of a sequence lives in slot `table[p // block_size] * block_size + p % block_size`. The pool
(see block_pool) hands out block ids, the cache here holds the tensors.

Source: Kwon et al. 2023 (PagedAttention).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gristmill.core import CAUSAL, AttentionRule
from gristmill.engine.memory.sources import Source
from gristmill.errors import RequestError
from gristmill.model.attention.kernel import masked_attention, rule_attention, visible, without_idle_window
from gristmill.model.config import ModelConfig
from gristmill.model.int8 import dequantise, quantise


@dataclass(frozen=True)
class Chunk:
    """The part of one sequence that a step computes: `length` tokens after the `start` already in the cache."""

    block_table: Sequence[int]
    start: int
    length: int
    source: Source | None = None
    """What its cross-attention reads, in a model with an encoder."""
    adapter: object | None = None
    """What is added to the weights for its tokens: as `AdaptingRunner.adapt` gave it."""


@dataclass(frozen=True)
class _Prefill:
    """One chunk of several tokens: its place in the flat batch, the position of its first token, and the slots of all
    it sees (a chunk that starts the sequence sees only itself)."""

    begin: int
    end: int
    start: int
    slots: Tensor | None


@dataclass(frozen=True)
class _Decode:
    """All chunks of one token, attended together: rows of the flat batch, slots (rows, longest), which are real, and
    the position of each row's token.

    `span` replaces slots and mask when a lone sequence lies in consecutive slots: no gather, no mask.
    """

    rows: Tensor
    slots: Tensor
    mask: Tensor | None
    positions: Tensor
    span: tuple[int, int] | None


class PagedKVCache:
    """Keys and values of all layers in two tensors (layers, slots, kv_heads, head_dim), read through block tables.

    `plan` is called once a step, `attend` by every layer of that step (see `KVCache.attend`). Layers that share keys
    and values share their place; latent attention keeps one compressed vector, whose first part is the value. With
    dtype int8 each head of a token has a float32 scale beside it.

    Raises RequestError for a model that such a memory cannot serve: an encoder, a decoder that reads one, or one with
    recurrent layers.
    """

    keeps = True

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        check_servable(config)
        self._places, self._latent = config.cache_slots, config.attention.latent
        heads, key_size, value_size = config.cache_shape
        shape = (max(self._places) + 1, num_blocks * block_size, heads)
        # not zeroed: pages of memory are touched only when a block is first used
        self.keys = torch.empty((*shape, key_size), dtype=dtype, device=device)
        self.values = torch.empty((*shape, value_size), dtype=dtype, device=device)
        self.stores = [self.keys, self.values]
        """All that a slot holds; the second dimension is the slots."""
        self._scales: tuple[Tensor, Tensor] | None = None
        if dtype == torch.int8:
            self._scales = (torch.empty((*shape, 1), device=device), torch.empty((*shape, 1), device=device))
            self.stores += self._scales
        self.block_size, self.device = block_size, device
        self._prefills: list[_Prefill] = []
        self._decode: _Decode | None = None
        self._new_slots = torch.empty(0, dtype=torch.long)
        self._chunks: Sequence[Chunk] = ()

    @property
    def lengths(self) -> Tensor:
        """See `KVCache.lengths`."""
        ends = torch.tensor([chunk.start + chunk.length for chunk in self._chunks])
        counts = torch.tensor([chunk.length for chunk in self._chunks])
        return ends.repeat_interleave(counts).to(self.device)

    @property
    def bytes_per_token(self) -> int:
        """Memory that a token takes in all layers."""
        return sum(store[:, 0].numel() * store.element_size() for store in self.stores)

    def slots_of(self, blocks: Sequence[int]) -> Tensor:
        """The slots of whole blocks, one block after another."""
        first = torch.tensor(list(blocks), dtype=torch.long, device=self.device)[:, None] * self.block_size
        return (first + torch.arange(self.block_size, device=self.device)).flatten()

    def plan(self, chunks: Sequence[Chunk]) -> None:
        """Prepare a step over `chunks`, whose tokens lie one after another in the flat batch."""
        self._chunks = chunks
        prefills, singles, new_slots, begin = [], [], [], 0
        for chunk in chunks:
            end = chunk.start + chunk.length
            slots = self.slots_of(chunk.block_table[: -(-end // self.block_size)])[:end]
            new_slots.append(slots[chunk.start :])
            if chunk.length == 1 and chunk.start > 0:
                singles.append((begin, slots))
            else:
                prefills.append(_Prefill(begin, begin + chunk.length, chunk.start, slots if chunk.start else None))
            begin += chunk.length
        self._prefills = prefills
        self._decode = _decode_plan(singles, self.device) if singles else None
        self._new_slots = torch.cat(new_slots)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule = CAUSAL) -> Tensor:
        """See `KVCache.attend`. Stores the new keys and values first, so that tokens see themselves."""
        place = self._places[layer]
        key, value = self.write(place, key, value)
        latent = None if self._latent is None else self._latent.kv_rank
        value_size = value.shape[-1] if latent is None else latent
        if self._decode is not None and not self._prefills:
            return self._attend_singles(self._decode, place, query, rule)
        out = query.new_empty((*query.shape[:2], value_size))
        for part in self._prefills:
            here = slice(part.begin, part.end)
            if part.slots is not None:
                seen = self.read(place, part.slots, query.dtype)
            else:
                seen = (key[here], value[here] if latent is None else key[here, ..., :latent])
            rows = (query[None, here], seen[0][None], seen[1][None])
            out[here] = rule_attention(*rows, rule, query_start=part.start).squeeze(0)
        if self._decode is not None:
            chosen = self._decode.rows
            out[chosen] = self._attend_singles(self._decode, place, query[chosen], rule)
        return out

    def _attend_singles(self, plan: _Decode, place: int, query: Tensor, rule: AttentionRule) -> Tensor:
        key, value = self.read(place, plan.slots if plan.span is None else slice(*plan.span), query.dtype)
        return _attend_decode(plan, query, key, value, rule)

    def write(self, place: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put the step's keys and values into their slots; returns them as later steps will read them, so that it
        does not matter how a prompt is cut into steps."""
        kept = []
        for index, (store, x) in enumerate(((self.keys, key), (self.values, value))):
            if index == 1 and self._latent is not None:
                kept.append(x)
            elif self._scales is None:
                stored = x.to(store.dtype)
                store[place].index_copy_(0, self._new_slots, stored)
                kept.append(stored.to(x.dtype))
            else:
                levels, scale = quantise(x)
                store[place].index_copy_(0, self._new_slots, levels)
                self._scales[index][place].index_copy_(0, self._new_slots, scale)
                kept.append(dequantise(levels, scale).to(x.dtype))
        return kept[0], kept[1]

    def read(self, place: int, slots: Tensor | slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of the slots, of their shape plus (kv_heads, head_dim)."""
        found: list[Tensor] = []
        for index, store in enumerate((self.keys, self.values)):
            if index == 1 and self._latent is not None:
                found.append(found[0][..., : self._latent.kv_rank])
                continue
            levels = _rows(store[place], slots)
            if self._scales is not None:
                levels = dequantise(levels, _rows(self._scales[index][place], slots))
            found.append(levels.to(dtype))
        return found[0], found[1]

    def recur(self, layer: int, mixer: Callable[[Tensor, Any], tuple[Tensor, Any]], x: Tensor) -> Tensor:
        """Never reached: a model with recurrent layers is refused at construction."""
        raise RequestError("a paged memory keeps no recurrent state", field="layers")


def check_servable(config: ModelConfig) -> None:
    """Raise RequestError, naming the field, unless a paged memory can serve such a model."""
    if not config.causal:
        raise RequestError("an encoder does not generate", field="causal")
    if config.cross_attention:
        raise RequestError("a decoder that reads an encoder is not served by the engine", field="cross_attention")
    recurrent = [index for index in range(config.num_hidden_layers) if config.layer(index).mixer != "attention"]
    if recurrent:
        raise RequestError(f"layer {recurrent[0]} is recurrent: not served by the engine", field="layers")


def _rows(store: Tensor, slots: Tensor | slice) -> Tensor:
    if isinstance(slots, slice):
        return store[None, slots]
    chosen: Tensor = store.index_select(0, slots.flatten()).unflatten(0, slots.shape)
    return chosen


def _attend_decode(plan: _Decode, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
    """One query each over its own row of keys: query (rows, heads, head_dim), key (rows, keys, kv_heads, head_dim)."""
    rule = without_idle_window(rule, key.shape[1])
    if rule.window is None and rule.pattern is None and rule.bias is None and rule.sinks is None:
        # the query heads that share a key head become its queries: nothing is copied per head
        grouped = query.unflatten(1, (key.shape[2], -1))
        rows = (grouped, key.transpose(1, 2), value.transpose(1, 2))
        return masked_attention(*rows, rule, plan.mask, None).flatten(1, 2)
    positions = torch.arange(key.shape[1], device=query.device)
    seen = visible(rule, plan.positions[:, None], positions)
    seen = None if seen is None else seen[:, None]
    if plan.mask is not None:
        seen = plan.mask if seen is None else seen & plan.mask
    bias = None if rule.bias is None else rule.bias(plan.positions, positions).transpose(0, 1)[:, :, None]
    group = query.shape[1] // key.shape[2]
    key, value = (x.transpose(1, 2).repeat_interleave(group, dim=1) for x in (key, value))
    return masked_attention(query[:, :, None], key, value, rule, seen, bias).squeeze(2)


def _decode_plan(singles: Sequence[tuple[int, Tensor]], device: torch.device) -> _Decode:
    rows = torch.tensor([row for row, _ in singles], device=device)
    positions = torch.tensor([len(slots) - 1 for _, slots in singles], device=device)
    first = singles[0][1]
    if len(singles) == 1 and int(first[-1] - first[0]) == len(first) - 1 and bool((first.diff() == 1).all()):
        return _Decode(rows, first, None, positions, (int(first[0]), int(first[-1]) + 1))
    longest = max(len(slots) for _, slots in singles)
    padded = torch.zeros(len(singles), longest, dtype=torch.long, device=device)
    mask = torch.zeros(len(singles), 1, 1, longest, dtype=torch.bool)
    for i, (_, slots) in enumerate(singles):
        padded[i, : len(slots)] = slots
        # a padded place repeats a slot of its own, never one that may hold uninitialised memory
        padded[i, len(slots) :] = slots[0]
        mask[i, 0, 0, : len(slots)] = True
    return _Decode(rows, padded, None if bool(mask.all()) else mask.to(device), positions, None)
