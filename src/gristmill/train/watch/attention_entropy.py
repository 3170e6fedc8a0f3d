"""How widely attention spreads: near 0 it has collapsed onto single tokens, at 1 every token counts the same.

Source: Zhai et al. 2023 (entropy collapse), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gristmill.core import CAUSAL, AttentionRule, KVCache
from gristmill.model.attention.kernel import reference_attention, visible

_QUERIES = 128
"""Queries of a sequence that are looked at, its last ones: it bounds the memory of the weights."""


def attention_entropy(query: Tensor, key: Tensor, mask: Tensor, rule: AttentionRule = CAUSAL) -> tuple[Tensor, Tensor]:
    """Entropy in nats of the attention weights, and its share of the greatest possible, each (heads, queries).

    Arguments as of `reference_attention`, by which the weights are computed; a bias is asked for the positions 0, 1,
    ... A sink counts as one more thing to attend to. A query that sees fewer than two things has NaN.
    """
    keys = key.shape[0]
    one_hot = torch.eye(keys, dtype=query.dtype, device=query.device)[:, None].expand(-1, key.shape[1], -1)
    weights = reference_attention(query, key, one_hot, mask, rule).float().transpose(0, 1)
    entropy = torch.special.entr(weights).sum(dim=-1)
    seen = mask.sum(dim=-1)
    if rule.sinks is not None:
        entropy = entropy + torch.special.entr((1.0 - weights.sum(dim=-1)).clamp(min=0.0))
        seen = seen + 1
    entropy = entropy.masked_fill(seen < 2, math.nan)
    return entropy, entropy / seen.log()


class EntropyTap:
    """A `KVCache` that hands on everything, and tells `report` the entropies of the first `rows` sequences."""

    def __init__(self, cache: KVCache, rows: int, report: Callable[[Tensor, Tensor], None]) -> None:
        self._cache, self._rows, self._report = cache, rows, report

    @property
    def keeps(self) -> bool:
        """See `KVCache.keeps`."""
        return self._cache.keeps

    @property
    def lengths(self) -> Tensor:
        """See `KVCache.lengths`."""
        return self._cache.lengths

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule = CAUSAL) -> Tensor:
        """See `KVCache.attend`."""
        lengths, start = self.lengths, 0
        prefixes = getattr(self._cache, "prefix_lengths", None)
        for row in range(self._rows):
            if start >= len(query):
                break
            end = start + int(lengths[start])
            part = slice(start, end)
            self._look(query[part], key[part], rule, 0 if prefixes is None else int(prefixes[row]))
            start = end
        return self._cache.attend(layer, query, key, value, rule)

    def recur(self, layer: int, mixer: Callable[[Tensor, Any], tuple[Tensor, Any]], x: Tensor) -> Tensor:
        """See `KVCache.recur`."""
        return self._cache.recur(layer, mixer, x)

    def _look(self, query: Tensor, key: Tensor, rule: AttentionRule, prefix: int) -> None:
        """Entropies of one sequence, whose keys are at positions 0, 1, ..."""
        positions = torch.arange(len(key), device=key.device)
        last = positions[-_QUERIES:]
        mask = visible(rule, last, positions)
        if mask is None:
            mask = torch.ones((len(last), len(positions)), dtype=torch.bool, device=key.device)
        mask = mask | (positions < prefix)
        if rule.bias is not None:
            bias = rule.bias(last, positions).float()
            rule = replace(rule, bias=lambda *_: bias)
        if rule.sinks is not None:
            rule = replace(rule, sinks=rule.sinks.float())
        # outside of autocast, so that the logarithm of a small weight is not rounded
        with torch.autocast(key.device.type, enabled=False):
            self._report(*attention_entropy(query[-_QUERIES:].float(), key.float(), mask, rule))
