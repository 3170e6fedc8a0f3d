"""Paged key-value memory: a pool of fixed-size blocks and the cache that attention reads them through.

A sequence owns a list of block ids, its block table; the token at position p lives in slot
`table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE`. The pool hands out ids, the cache holds the tensors.

Source: Kwon et al. 2023 (PagedAttention).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.model.attention import causal_attention
from gristmill.model.config import ModelConfig

BLOCK_SIZE = 16


class BlockPool:
    """Free block ids, O(1) to take and give back. Every block is either free or owned by one sequence."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        # a stack whose top is the lowest id: a lone sequence gets consecutive blocks, which read without a gather
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that can be taken."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Take `count` blocks; the caller owns them until `give_back`. The caller checks `num_free` first."""
        assert count <= len(self._free), "took more blocks than are free"
        return [self._free.pop() for _ in range(count)]

    def give_back(self, blocks: list[int]) -> None:
        """Return blocks and empty the caller's list, so that they cannot be returned twice."""
        self._free.extend(reversed(blocks))
        blocks.clear()

    def check_integrity(self, owned: Sequence[Sequence[int]]) -> None:
        """free + owned == total, each block once. Raises AssertionError otherwise."""
        held = [block for table in owned for block in table]
        assert sorted(self._free + held) == list(range(self.num_blocks)), "blocks leaked or owned twice"


def blocks_for(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK_SIZE)


@dataclass(frozen=True)
class Chunk:
    """The part of one sequence that a step computes: `length` tokens after the `start` already in the cache."""

    block_table: Sequence[int]
    start: int
    length: int


@dataclass(frozen=True)
class _Prefill:
    """One chunk of several tokens: its place in the flat batch, the slots of all it sees, and the mask if it needs
    one (a chunk that starts the sequence does not)."""

    begin: int
    end: int
    slots: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True)
class _Decode:
    """All chunks of one token, attended together: rows of the flat batch, slots (rows, longest) and which are real.

    `span` replaces both when a lone sequence lies in consecutive slots: no gather, no mask.
    """

    rows: Tensor
    slots: Tensor
    mask: Tensor | None
    span: tuple[int, int] | None


class PagedKVCache:
    """Keys and values of all layers in two tensors (layers, slots, kv_heads, head_dim), read through block tables.

    `plan` is called once a step, `attend` by every layer of that step (see `KVCache.attend`).
    """

    def __init__(self, config: ModelConfig, num_blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_hidden_layers, num_blocks * BLOCK_SIZE, config.num_key_value_heads, config.head_dim)
        # not zeroed: pages of memory are touched only when a block is first used
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.device = device
        self._prefills: list[_Prefill] = []
        self._decode: _Decode | None = None
        self._new_slots = torch.empty(0, dtype=torch.long)

    def plan(self, chunks: Sequence[Chunk]) -> None:
        """Prepare a step over `chunks`, whose tokens lie one after another in the flat batch."""
        offsets = torch.arange(BLOCK_SIZE)
        prefills, singles, new_slots, begin = [], [], [], 0
        for chunk in chunks:
            end = chunk.start + chunk.length
            table = torch.tensor(chunk.block_table[: blocks_for(end)])
            slots = (table[:, None] * BLOCK_SIZE + offsets).flatten()[:end]
            new_slots.append(slots[chunk.start :])
            if chunk.length == 1 and chunk.start > 0:
                singles.append((begin, slots))
            else:
                mask = None
                if chunk.start > 0:
                    positions = torch.arange(end)
                    mask = (positions[None, :] <= positions[chunk.start :, None]).to(self.device)
                prefills.append(
                    _Prefill(begin, begin + chunk.length, slots.to(self.device) if chunk.start else None, mask)
                )
            begin += chunk.length
        self._prefills = prefills
        self._decode = _decode_plan(singles, self.device) if singles else None
        self._new_slots = torch.cat(new_slots).to(self.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `KVCache.attend`. Stores the new keys and values first, so that tokens see themselves."""
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(0, self._new_slots, key)
        values.index_copy_(0, self._new_slots, value)
        if self._decode is not None and not self._prefills:
            return self._attend_decode(self._decode, query, keys, values)
        out = torch.empty_like(query)
        for part in self._prefills:
            here = slice(part.begin, part.end)
            if part.slots is None:
                seen = causal_attention(query[None, here], key[None, here], value[None, here])
            else:
                seen = _masked_attention(query[here], keys[part.slots], values[part.slots], part.mask)
            out[here] = seen.squeeze(0)
        if self._decode is not None:
            rows = self._decode.rows
            out[rows] = self._attend_decode(self._decode, query[rows], keys, values)
        return out

    def _attend_decode(self, plan: _Decode, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if plan.span is not None:
            begin, end = plan.span
            key, value = keys[None, begin:end], values[None, begin:end]
        else:
            shape = plan.slots.shape
            key = keys.index_select(0, plan.slots.flatten()).unflatten(0, shape)
            value = values.index_select(0, plan.slots.flatten()).unflatten(0, shape)
        # the query heads that share a key head become its queries: nothing is copied per head
        grouped = query.unflatten(1, (keys.shape[1], -1))
        out = F.scaled_dot_product_attention(grouped, key.transpose(1, 2), value.transpose(1, 2), attn_mask=plan.mask)
        return out.flatten(1, 2)


def _decode_plan(singles: Sequence[tuple[int, Tensor]], device: torch.device) -> _Decode:
    rows = torch.tensor([row for row, _ in singles], device=device)
    first = singles[0][1]
    if len(singles) == 1 and int(first[-1] - first[0]) == len(first) - 1 and bool((first.diff() == 1).all()):
        return _Decode(rows, first, None, (int(first[0]), int(first[-1]) + 1))
    longest = max(len(slots) for _, slots in singles)
    padded = torch.zeros(len(singles), longest, dtype=torch.long)
    mask = torch.zeros(len(singles), 1, 1, longest, dtype=torch.bool)
    for i, (_, slots) in enumerate(singles):
        padded[i, : len(slots)] = slots
        # a padded place repeats a slot of its own, never one that may hold uninitialised memory
        padded[i, len(slots) :] = slots[0]
        mask[i, 0, 0, : len(slots)] = True
    return _Decode(rows, padded.to(device), None if bool(mask.all()) else mask.to(device), None)


def _masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None], key.transpose(0, 1)[None], value.transpose(0, 1)[None], attn_mask=mask
    )
    return out.transpose(1, 2)
