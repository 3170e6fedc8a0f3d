"""Softmax attention as layers: over the tokens of a sequence, and over the states of an encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from gristmill.core import CAUSAL, AttentionRule, KVCache
from gristmill.model.attention.packed import PackedCross
from gristmill.model.config import ModelConfig
from gristmill.model.norm import build_norm
from gristmill.model.positions.rope import RopeTables, apply_rope

Project = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A layer's keys and values, each (source tokens, kv_heads, head_dim), of encoder states (source tokens, hidden)."""


class Memory(Protocol):
    """What a decoder reads of an encoder. One object serves all layers of one forward; who reads whose source, and
    where keys and values live, is its business alone."""

    def attend(self, layer: int, query: Tensor, project: Project, rule: AttentionRule) -> Tensor:
        """Attended values of queries (target tokens, heads, head_dim), of the same shape."""


@dataclass
class StatesMemory:
    """An encoder's final states, flat (source tokens, hidden), and who reads whose.

    Keys and values of a layer are computed once and kept in `kept`, so that steps of generation share them.
    """

    states: Tensor
    plan: PackedCross
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, project: Project, rule: AttentionRule) -> Tensor:
        """See `Memory.attend`."""
        if layer not in self.kept:
            self.kept[layer] = project(self.states)
        return self.plan.attend(query, *self.kept[layer], rule)


@dataclass
class Step:
    """What all layers of one forward share. `kept` holds queries, keys and values that a later layer uses again."""

    cache: KVCache
    rope: RopeTables | None = None
    local_rope: RopeTables | None = None
    bias: Callable[[Tensor, Tensor], Tensor] | None = None
    memory: Memory | None = None
    kept: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)


class Attention(nn.Module):
    """Grouped-query self-attention. Queries, keys and values come from one matrix, rows in this order; a layer that
    uses those of an earlier layer has no rows for them.

    Source: Vaswani et al. 2017, eq. 1; Ainslie et al. 2023 (grouped queries); Brandon et al. 2024 (keys and values of
    another layer); Xiao et al. 2019 (attention weights of another layer).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.entry = config, config.layer(layer)
        self.used_again = config.shared_sources
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        parts, entry = config.attention, self.entry
        self.own_query = entry.scores_from is None
        self.own_key = entry.scores_from is None and entry.keys_from is None
        self.own_value = entry.keys_from is None
        rows = self.own_query * config.query_size + (self.own_key + self.own_value) * config.key_value_size
        self.qkv_proj = nn.Linear(config.hidden_size, rows, bias=parts.qkv_bias)
        self.o_proj = nn.Linear(config.query_size, config.hidden_size, bias=parts.output_bias)
        norm = replace(config.norm, kind="rms", bias=False)
        head = parts.qk_norm == "head"
        query_norm, key_norm = parts.qk_norm and self.own_query, parts.qk_norm and self.own_key
        self.q_norm = build_norm(norm, self.head_dim if head else config.query_size) if query_norm else None
        self.k_norm = build_norm(norm, self.head_dim if head else config.key_value_size) if key_norm else None
        self.sinks = nn.Parameter(torch.zeros(self.heads)) if parts.sinks else None
        # the rule of a layer that adds nothing of its own never changes
        self.plain = None
        if config.positions.bias is None and self.sinks is None:
            self.plain = layer_rule(config, layer)

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        """x (tokens, hidden) -> (tokens, hidden). `layer` is where the block stands: shared weights have several."""
        query, key, value = self._projections(x, step)
        if self.used_again and layer in self.used_again:  # torch.compile would make one graph for each layer
            step.kept[layer] = query, key, value
        rule = self.plain
        if rule is None:
            rule = replace(layer_rule(self.config, layer), bias=step.bias, sinks=self.sinks)
        source = self.entry.keys_from
        attended = step.cache.attend(layer if source is None else source, query, key, value, rule)
        out: Tensor = self.o_proj(attended.flatten(1))
        return out

    def _projections(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, each (tokens, its heads, head_dim)."""
        entry = self.entry
        tables = {"global": step.rope, "local": step.local_rope, "none": None}[entry.rotary]
        projected = self.qkv_proj(x)
        if self.own_key and self.q_norm is None:
            turning = self.heads + self.kv_heads
            qkv = projected.view(x.shape[0], turning + self.kv_heads, self.head_dim)
            turned = qkv[:, :turning] if tables is None else apply_rope(qkv[:, :turning], tables)
            return turned[:, : self.heads], turned[:, self.heads :], qkv[:, turning:]
        query_size, size = self.own_query * self.config.query_size, self.config.key_value_size
        query, key, value = projected.split((query_size, self.own_key * size, self.own_value * size), dim=-1)
        if entry.scores_from is not None:
            query, key, _ = step.kept[entry.scores_from]
        else:
            query = self._prepared(query, self.q_norm, tables)
            if self.own_key:
                key = self._prepared(key, self.k_norm, tables)
        if entry.keys_from is not None:
            _, key, value = step.kept[entry.keys_from]
            return query, key, value
        return query, key, value.unflatten(-1, (-1, self.head_dim))

    def _prepared(self, x: Tensor, norm: nn.Module | None, tables: RopeTables | None) -> Tensor:
        if norm is not None and self.config.attention.qk_norm == "full":
            x = norm(x)
        x = x.unflatten(-1, (-1, self.head_dim))
        if norm is not None and self.config.attention.qk_norm == "head":
            x = norm(x)
        return x if tables is None else apply_rope(x, tables)


class CrossAttention(nn.Module):
    """Queries from the decoder, keys and values from the encoder's states; no positions, no mask but the source's own.

    Source: Vaswani et al. 2017, section 3.2.3.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kv_heads, self.head_dim = config.num_key_value_heads, config.head_dim
        parts = config.attention
        self.q_proj = nn.Linear(config.hidden_size, config.query_size, bias=parts.qkv_bias)
        self.kv_proj = nn.Linear(config.hidden_size, 2 * config.key_value_size, bias=parts.qkv_bias)
        self.o_proj = nn.Linear(config.query_size, config.hidden_size, bias=parts.output_bias)
        self.rule = AttentionRule(causal=False, scale=parts.scale)

    def forward(self, x: Tensor, memory: Memory, layer: int) -> Tensor:
        """x (target tokens, hidden) -> (target tokens, hidden)."""
        query = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        attended = memory.attend(layer, query, self._keys_values, self.rule)
        out: Tensor = self.o_proj(attended.flatten(1))
        return out

    def _keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.kv_proj(states).view(states.shape[0], 2, self.kv_heads, self.head_dim).unbind(1)
        return key, value


def layer_rule(config: ModelConfig, layer: int) -> AttentionRule:
    """The rule of a layer, without what needs weights (bias, sinks)."""
    entry, parts = config.layer(layer), config.attention
    rule = AttentionRule(
        causal=config.causal, window=entry.window, pattern=entry.pattern, scale=parts.scale, softcap=parts.softcap
    )
    same = (rule.causal, rule.window, rule.pattern, rule.scale, rule.softcap) == (True, None, None, None, None)
    return CAUSAL if same else rule
