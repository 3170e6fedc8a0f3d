"""The plain key-value memory: one batch of sequences that grow together.

The engine's paged memory is the fast one; this one is a few lines, serves encoder-decoders, recurrent layers and
prefix decoders too, and is what the paged one is tested against.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gristmill.core import CAUSAL, AttentionRule
from gristmill.errors import RequestError
from gristmill.model.attention.kernel import rule_attention
from gristmill.model.config import ModelConfig


class SequenceCache:
    """Keys, values and states of `rows` sequences of equal length. Call `extend` before each forward.

    A layer with a window keeps no more than the tokens of the window, once a step is over.

    prefix_lengths (rows,): see `PackedAttention`; the prefix must lie in the first step.
    """

    keeps = True

    def __init__(self, config: ModelConfig, rows: int = 1, *, prefix_lengths: Tensor | None = None) -> None:
        self.config, self.rows, self.prefix = config, rows, prefix_lengths
        self.length = self._new = 0
        slots = max(config.cache_slots) + 1
        self.keys: list[Tensor | None] = [None] * slots
        self.values: list[Tensor | None] = [None] * slots
        self._stored = [0] * slots  # tokens that each place has seen, of which a window may have dropped the first
        self.states: dict[int, Any] = {}

    def extend(self, tokens: int) -> Tensor:
        """Announce a step of so many tokens in each row; returns its flat position ids (rows * tokens,).

        Raises RequestError for a first step shorter than a prefix, whose tokens must see each other.
        """
        if self.prefix is not None and self.length == 0 and tokens < int(self.prefix.max()):
            raise RequestError(
                f"the first step of {tokens} tokens must hold the whole prefix of {int(self.prefix.max())}",
                field="prefix_lengths",
            )
        positions = torch.arange(self.length, self.length + tokens).repeat(self.rows)
        self.length, self._new = self.length + tokens, tokens
        return positions

    @property
    def lengths(self) -> Tensor:
        """See `KVCache.lengths`."""
        return torch.full((self.rows * self._new,), self.length)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule = CAUSAL) -> Tensor:
        """See `KVCache.attend`."""
        query, key, value = (x.unflatten(0, (self.rows, self._new)) for x in (query, key, value))
        slot = self.config.cache_slots[layer]
        kept_key, kept_value = self.keys[slot], self.values[slot]
        if kept_key is not None and kept_value is not None:
            if self._stored[slot] < self.length:
                key, value = torch.cat((kept_key, key), dim=1), torch.cat((kept_value, value), dim=1)
            else:  # a layer that shares this memory has stored them
                key, value = kept_key, kept_value
        self._stored[slot] = self.length
        start = key.shape[1] - self._new
        out = rule_attention(query, key, value, rule, query_start=start, prefix=self.prefix).flatten(0, 1)
        if rule.window is not None and self._forgets(rule, slot):
            key, value = key[:, -rule.window :], value[:, -rule.window :]
        self.keys[slot], self.values[slot] = key, value
        return out

    def _forgets(self, rule: AttentionRule, slot: int) -> bool:
        """True when no later token can see what lies before the window, and only distances matter."""
        alone = self.config.cache_slots.count(slot) == 1
        return alone and self.prefix is None and rule.pattern is None and rule.bias is None

    def recur(self, layer: int, mixer: Callable[[Tensor, Any], tuple[Tensor, Any]], x: Tensor) -> Tensor:
        """See `KVCache.recur`."""
        if self.prefix is not None:
            raise RequestError("a recurrent layer reads one way: it has no prefix", field="prefix_lengths")
        out, self.states[layer] = mixer(x.unflatten(0, (self.rows, self._new)), self.states.get(layer))
        return out.flatten(0, 1)

    def nbytes(self) -> int:
        """Bytes of all keys and values. Values that are part of the keys (latent attention) count once."""
        values = [] if self.config.attention.latent else self.values
        return sum(x.numel() * x.element_size() for x in (*self.keys, *values) if x is not None)
