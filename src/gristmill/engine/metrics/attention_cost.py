"""What attention costs when keys and values are kept: counted as it happens, and in closed form.

The token at position i (from 1) takes i products with keys and i weighted values: 2 i vector products of head_dim
multiply-adds, for each layer and head. A sequence takes length * (length + 1); recomputing all for every token, without
a cache, takes the sum of that over all lengths, which is cubic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gristmill.core import CAUSAL, AttentionRule
from gristmill.errors import RequestError


def vector_products(length: int, *, cached: bool = True) -> int:
    """Products with keys and values, for one layer and head, to compute a sequence token by token."""
    if cached:
        return length * (length + 1)
    return sum(vector_products(known) for known in range(1, length + 1))


class CountedAttention:
    """A key-value memory of one sequence that attends one vector at a time and counts. Plain causal rules alone.

    scores: products of a query with a key. sums: weighted values. rows_read: keys read, where the tokens of one step
    share a reading. All by layer, for one head.
    """

    keeps = True

    def __init__(self) -> None:
        self.keys: dict[int, list[Tensor]] = {}
        self.values: dict[int, list[Tensor]] = {}
        self.scores: dict[int, int] = {}
        self.sums: dict[int, int] = {}
        self.rows_read: dict[int, int] = {}

    @property
    def lengths(self) -> Tensor:
        """See `KVCache.lengths`; rotations that depend on it are not counted."""
        raise RequestError("a counted memory knows no lengths", field="positions.rope")

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule = CAUSAL) -> Tensor:
        """See `KVCache.attend`. Raises RequestError for any rule but the plain causal one."""
        extras = (rule.window, rule.pattern, rule.softcap, rule.bias, rule.sinks)
        if not rule.causal or any(extra is not None for extra in extras):
            raise RequestError("only plain causal attention is counted", field="rule")
        group = query.shape[1] // key.shape[1]
        keys, values = self.keys.setdefault(layer, []), self.values.setdefault(layer, [])
        start = len(keys)
        keys += key.repeat_interleave(group, dim=1)
        values += value.repeat_interleave(group, dim=1)
        self.rows_read[layer] = self.rows_read.get(layer, 0) + len(keys)
        scale = rule.scale or query.shape[-1] ** -0.5
        return torch.stack([self._one(layer, q * scale, start + i + 1) for i, q in enumerate(query)])

    def _one(self, layer: int, query: Tensor, seen: int) -> Tensor:
        """(heads, value_dim) of one scaled query (heads, head_dim) over the first `seen` keys."""
        scores = []
        for key in self.keys[layer][:seen]:
            scores.append((query * key).sum(-1))
            self.scores[layer] = self.scores.get(layer, 0) + 1
        out = torch.zeros_like(self.values[layer][0])
        for weight, value in zip(torch.stack(scores).softmax(0), self.values[layer], strict=False):
            out = out + weight[:, None] * value
            self.sums[layer] = self.sums.get(layer, 0) + 1
        return out

    def recur(self, layer: int, mixer: Callable[[Tensor, Any], tuple[Tensor, Any]], x: Tensor) -> Tensor:
        """A recurrent layer has no attention: refused."""
        raise RequestError("a recurrent layer has no attention to count", field="layers")
