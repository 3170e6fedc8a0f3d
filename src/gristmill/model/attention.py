"""Attention over flat, document-aware batches.

Tokens of all sequences lie in one dimension, without padding. Who sees whom is the business of a `KVCache` (see
gristmill.core): `PackedCausal` here holds no memory and serves training and scoring; the engine's paged cache serves
generation. `reference_attention` is the plain softmax that every fast path must equal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

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
        self.uniform = segment_lengths[0] if len(set(segment_lengths)) == 1 else None
        if self.uniform is not None:
            return
        groups: dict[int, list[tuple[int, int]]] = defaultdict(list)
        start = 0
        for length in segment_lengths:
            groups[_bucket(length)].append((start, length))
            start += length
        self.shapes: list[tuple[int, int]] = []
        sources, places, offset = [], [], 0
        for members in groups.values():
            starts = torch.tensor([item[0] for item in members])[:, None]
            lengths = torch.tensor([item[1] for item in members])[:, None]
            columns = torch.arange(int(lengths.max()))
            real = columns < lengths
            self.shapes.append((real.shape[0], real.shape[1]))
            sources.append(torch.where(real, starts + columns, starts).flatten())
            places.append(torch.stack(((starts + columns)[real], offset + real.flatten().nonzero().squeeze(1))))
            offset += real.numel()
        # source[j]: the token that stands at padded place j; place[i]: the padded place of token i
        self.source = torch.cat(sources).to(device)
        tokens, padded = torch.cat(places, dim=1)
        self.place = torch.empty_like(padded).index_copy_(0, tokens, padded).to(device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `KVCache.attend`."""
        if torch.is_autocast_enabled("cpu") and query.device.type == "cpu":
            # the backward pass of the CPU kernel takes twice as long in bfloat16 as in float32
            with torch.autocast("cpu", enabled=False):
                return self._attend(query.float(), key.float(), value.float())
        return self._attend(query, key, value)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.uniform is not None:
            rows = (-1, self.uniform)
            out = causal_attention(*(x.unflatten(0, rows) for x in (query, key, value)))
            return out.flatten(0, 1)
        sizes = [rows * longest for rows, longest in self.shapes]
        padded = [_Pad.apply(x, self.source, self.place).split(sizes) for x in (query, key, value)]  # type: ignore[no-untyped-call]
        attended = [
            causal_attention(*(part.unflatten(0, shape) for part in parts)).flatten(0, 1)
            for shape, *parts in zip(self.shapes, *padded, strict=True)
        ]
        flat: Tensor = _Unpad.apply(torch.cat(attended), self.place)  # type: ignore[no-untyped-call]
        return flat


class _Pad(torch.autograd.Function):
    """Tokens to padded places. Each token has one real place, so its gradient is a read, not a sum over places."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return grads[0].index_select(0, place), None, None


class _Unpad(torch.autograd.Function):
    """Padded places back to tokens. What stands at a padded place has no gradient."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.rows = padded.shape[0]
        return padded.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        out = grads[0].new_zeros((ctx.rows, *grads[0].shape[1:]))
        return out.index_copy_(0, place, grads[0]), None


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
