"""Attention over flat, document-aware batches.

Tokens of all sequences lie in one dimension, without padding. Who sees whom is the business of a `KVCache` (see
gristmill.core): `PackedCausal` here holds no memory and serves training and scoring; the engine's paged cache serves
generation. `reference_attention` is the plain softmax that every fast path must equal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gristmill.core import KVCache
from gristmill.model.config import ModelConfig
from gristmill.model.positions import apply_rope


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions. Queries, keys and values come from one matrix.

    Source: Vaswani et al. 2017, eq. 1; Ainslie et al. 2023 (grouped queries).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.qkv_proj = nn.Linear(config.hidden_size, config.query_size + 2 * config.key_value_size, bias=False)
        self.o_proj = nn.Linear(config.query_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache) -> Tensor:
        """x (tokens, hidden) -> (tokens, hidden)."""
        qkv = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        rotated = apply_rope(qkv[:, : self.heads + self.kv_heads], rope)
        query, key = rotated.split((self.heads, self.kv_heads), dim=1)
        attended = cache.attend(self.layer, query, key, qkv[:, self.heads + self.kv_heads :])
        out: Tensor = self.o_proj(attended.reshape(x.shape[0], -1))
        return out


class PackedCausal:
    """Causal attention within each segment of a flat batch; nothing crosses a segment's border.

    Segments of similar length are attended together, padded at the end: a padded key comes after every real query,
    so the causal mask alone hides it, and the flash kernel needs no mask in memory. The plan is made once and serves
    all layers.
    """

    def __init__(self, segment_lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.groups: list[tuple[Tensor, Tensor]] = []
        self.uniform = segment_lengths[0] if len(set(segment_lengths)) == 1 else None
        if self.uniform is not None:
            return
        members: dict[int, list[tuple[int, int]]] = defaultdict(list)
        start = 0
        for length in segment_lengths:
            members[_bucket(length)].append((start, length))
            start += length
        for group in members.values():
            starts = torch.tensor([item[0] for item in group])[:, None]
            lengths = torch.tensor([item[1] for item in group])[:, None]
            columns = torch.arange(int(lengths.max()))
            real = columns < lengths
            indices = torch.where(real, starts + columns, starts)
            self.groups.append((indices.to(device), real.to(device)))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `KVCache.attend`."""
        if self.uniform is not None:
            rows = (-1, self.uniform)
            out = causal_attention(*(x.unflatten(0, rows) for x in (query, key, value)))
            return out.flatten(0, 1)
        attended, places = [], []
        for indices, real in self.groups:
            flat = indices.flatten()
            padded = (x.index_select(0, flat).unflatten(0, indices.shape) for x in (query, key, value))
            attended.append(causal_attention(*padded)[real])
            places.append(indices[real])
        order = torch.cat(places)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        return torch.cat(attended).index_select(0, inverse)


def _bucket(length: int) -> int:
    """Lengths that share a padded group: powers of two and their halfway points, so that at most a third is padding."""
    power = 1 << max(length - 1, 15).bit_length()
    return power * 3 // 4 if length <= power * 3 // 4 else power


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of equal-length sequences by the fused kernel.

    query (batch, tokens, heads, head_dim); key, value (batch, tokens, kv_heads, head_dim); returns query's shape.
    """
    group = query.shape[2] // key.shape[2]
    if group > 1:
        key, value = key.repeat_interleave(group, dim=2), value.repeat_interleave(group, dim=2)
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True
    )
    return out.transpose(1, 2)


def reference_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k' / sqrt(head_dim)) v in plain tensor operations: the oracle of every fast path.

    query (tokens, heads, head_dim); key, value (keys, kv_heads, head_dim); mask (tokens, keys), True where seen.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def segment_mask(segment_lengths: Sequence[int]) -> Tensor:
    """(tokens, tokens), True where a token may see another: same segment, and not later."""
    segments = torch.repeat_interleave(torch.arange(len(segment_lengths)), torch.tensor(segment_lengths))
    same = segments[:, None] == segments[None, :]
    return same & torch.ones_like(same).tril()
