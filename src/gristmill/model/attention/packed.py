"""Attention over flat, document-aware batches.

Tokens of all sequences lie in one dimension, without padding. Who sees whom is the business of a `KVCache` (see
gristmill.core): `PackedAttention` here holds no memory and serves training, scoring and encoders; the engine's paged
cache serves generation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gristmill.core import CAUSAL, AttentionRule
from gristmill.errors import RequestError
from gristmill.model.attention.kernel import rule_attention


class PackedAttention:
    """Attention within each segment of a flat batch; nothing crosses a segment's border.

    Segments of similar length are attended together, padded at the end: under a causal rule a padded key comes after
    every real query, so the rule alone hides it, and the flash kernel needs no mask in memory. The plan is made once
    and serves all layers. prefix_lengths: so many first tokens of each segment are seen by all of its tokens.

    Raises RequestError for a prefix that does not lie within its segment.
    """

    keeps = False

    def __init__(
        self,
        segment_lengths: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        prefix_lengths: Sequence[int] | None = None,
    ) -> None:
        self._segment_lengths, self._device = segment_lengths, device
        if prefix_lengths is not None:
            check_prefixes(prefix_lengths, segment_lengths)
            prefix_lengths = [p for p, length in zip(prefix_lengths, segment_lengths, strict=True) if length]
        self.prefix_lengths = prefix_lengths
        segment_lengths = [length for length in segment_lengths if length]  # an empty one has nobody who attends
        self.uniform = segment_lengths[0] if len(set(segment_lengths)) == 1 else None
        if not segment_lengths:
            self.uniform = 1
        prefixes = None if prefix_lengths is None else torch.tensor(list(prefix_lengths))
        self._prefixes: list[Tensor | None] = [None if prefixes is None else prefixes.to(device)]
        if self.uniform is not None:
            return
        groups: dict[int, list[tuple[int, int]]] = defaultdict(list)
        members_of: dict[int, list[int]] = defaultdict(list)
        start = 0
        for index, length in enumerate(segment_lengths):
            groups[_bucket(length)].append((start, length))
            members_of[_bucket(length)].append(index)
            start += length
        self.shapes: list[tuple[int, int]] = []
        self._real: list[Tensor] = []
        sources, places, offset = [], [], 0
        for members in groups.values():
            starts = torch.tensor([item[0] for item in members])[:, None]
            lengths = torch.tensor([item[1] for item in members])[:, None]
            columns = torch.arange(int(lengths.max()))
            real = columns < lengths
            self.shapes.append((real.shape[0], real.shape[1]))
            self._real.append(real.to(device))
            sources.append(torch.where(real, starts + columns, starts).flatten())
            places.append(torch.stack(((starts + columns)[real], offset + real.flatten().nonzero().squeeze(1))))
            offset += real.numel()
        if prefixes is not None:
            self._prefixes = [prefixes[rows].to(device) for rows in members_of.values()]
        else:
            self._prefixes = [None] * len(groups)
        # source[j]: the token that stands at padded place j; place[i]: the padded place of token i
        self.source = torch.cat(sources).to(device)
        tokens, padded = torch.cat(places, dim=1)
        self.place = torch.empty_like(padded).index_copy_(0, tokens, padded).to(device)

    @property
    def lengths(self) -> Tensor:
        """See `KVCache.lengths`."""
        lengths = torch.tensor(list(self._segment_lengths))
        return lengths.repeat_interleave(lengths).to(self._device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule = CAUSAL) -> Tensor:
        """See `KVCache.attend`."""
        if torch.is_autocast_enabled("cpu") and query.device.type == "cpu":
            # the backward pass of the CPU kernel takes twice as long in bfloat16 as in float32
            with torch.autocast("cpu", enabled=False):
                return self._attend(query.float(), key.float(), value.float(), rule)
        return self._attend(query, key, value, rule)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        if self.uniform is not None:
            query, key, value = (x.unflatten(0, (-1, self.uniform)) for x in (query, key, value))
            return rule_attention(query, key, value, rule, prefix=self._prefixes[0]).flatten(0, 1)
        groups = zip(*(self._pad(x) for x in (query, key, value)), self._real, self._prefixes, strict=True)
        return self._unpad(
            [
                rule_attention(q, k, v, rule, key_mask=None if rule.causal else real, prefix=prefix).flatten(0, 1)
                for q, k, v, real, prefix in groups
            ]
        )

    def recur(self, layer: int, mixer: Callable[[Tensor, Any], tuple[Tensor, Any]], x: Tensor) -> Tensor:
        """See `KVCache.recur`. The state starts empty in each segment; padding follows the last real token."""
        if self._prefixes[:1] != [None]:
            raise RequestError("a recurrent layer reads one way: it has no prefix", field="prefix_lengths")
        if self.uniform is not None:
            out, _ = mixer(x.unflatten(0, (-1, self.uniform)), None)
            return out.flatten(0, 1)
        return self._unpad([mixer(part, None)[0].flatten(0, 1) for part in self._pad(x)])

    def _pad(self, x: Tensor) -> list[Tensor]:
        flat: Tensor = _Pad.apply(x, self.source, self.place)  # type: ignore[no-untyped-call]
        parts = flat.split([rows * longest for rows, longest in self.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def _unpad(self, parts: list[Tensor]) -> Tensor:
        flat: Tensor = _Unpad.apply(torch.cat(parts), self.place)  # type: ignore[no-untyped-call]
        return flat


def segment_positions(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """(tokens,): positions that count from 0 in each segment."""
    return torch.cat([torch.arange(length) for length in (0, *lengths)]).to(device)


def check_prefixes(prefix_lengths: Sequence[int], segment_lengths: Sequence[int]) -> None:
    """Raise RequestError for a prefix that does not lie within its segment."""
    if len(prefix_lengths) != len(segment_lengths):
        raise RequestError(
            f"{len(prefix_lengths)} prefix_lengths for {len(segment_lengths)} sequences", field="prefix_lengths"
        )
    for row, (prefix, length) in enumerate(zip(prefix_lengths, segment_lengths, strict=True)):
        if not 0 <= prefix <= length:
            raise RequestError(
                f"prefix_lengths[{row}] must be between 0 and {length}, the length of its sequence, got {prefix}",
                field="prefix_lengths",
            )


class PackedCross:
    """Attention of the tokens of each target segment to all tokens of its source segment, both flat."""

    def __init__(
        self, query_lengths: Sequence[int], key_lengths: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        if len(query_lengths) != len(key_lengths):
            raise ValueError(f"{len(query_lengths)} target segments for {len(key_lengths)} source segments")
        self._queries, self._keys = _Rows(query_lengths, device), _Rows(key_lengths, device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        """query (target tokens, heads, head_dim); key, value (source tokens, kv_heads, head_dim)."""
        rows = (self._queries.pad(query), self._keys.pad(key), self._keys.pad(value))
        return self._queries.unpad(rule_attention(*rows, rule, key_mask=self._keys.mask))


class _Rows:
    """Flat tokens as rows padded at the end, and back."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str) -> None:
        sizes = torch.tensor(list(lengths))
        columns = torch.arange(max(lengths, default=0))
        real = columns < sizes[:, None]
        starts = (sizes.cumsum(0) - sizes)[:, None]
        self.shape = (real.shape[0], real.shape[1])
        self.full = bool(real.all())
        self.mask = None if self.full else real.to(device)
        self._source = torch.where(real, starts + columns, starts).flatten().to(device)
        self._place = real.flatten().nonzero().squeeze(1).to(device)

    def pad(self, x: Tensor) -> Tensor:
        if self.full:
            return x.view(*self.shape, *x.shape[1:])
        flat: Tensor = _Pad.apply(x, self._source, self._place)  # type: ignore[no-untyped-call]
        return flat.view(*self.shape, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        if self.full:
            return x.flatten(0, 1)
        flat: Tensor = _Unpad.apply(x.flatten(0, 1), self._place)  # type: ignore[no-untyped-call]
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


def segment_mask(segment_lengths: Sequence[int]) -> Tensor:
    """(tokens, tokens), True where a token may see another: same segment, and not later."""
    segments = torch.repeat_interleave(torch.arange(len(segment_lengths)), torch.tensor(segment_lengths))
    same = segments[:, None] == segments[None, :]
    return same & torch.ones_like(same).tril()
