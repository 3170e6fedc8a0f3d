"""Tensor parallelism: every matrix product of a block is shared by a group of processes.

The first matrix of a pair (queries, keys and values; gate and up) is split by outputs, the second (output, down) by
inputs, so a pair costs one sum over the group in each direction: hW = [hW_1 ... hW_M], and the sum over m of
act(hW_m) V_m is act(hW) V. Attention splits by heads. A decoder's embedding and head split by vocabulary.

Source: Shoeybi et al. 2019, section 3; with `sequence`, Korthikanti et al. 2022.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gristmill.model.attention.layer import Attention
from gristmill.model.block import Block
from gristmill.model.feedforward import FeedForward
from gristmill.model.transformer import Stack, Transformer
from gristmill.train.parallel.collectives import TensorGroup
from gristmill.train.parallel.mesh import Mesh
from gristmill.train.parallel.slices import Slice
from gristmill.train.parallel.vocabulary import VocabularyEmbedding, VocabularyHead
from gristmill.train.world import LossModule


class RowLinear(nn.Linear):
    """A part of the inputs of a linear layer: x (tokens, own inputs) -> (tokens, outputs). The bias is whole."""

    def __init__(self, group: TensorGroup, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(inputs, outputs, bias=bias, device="meta")
        self.group = group

    def forward(self, input: Tensor) -> Tensor:
        out = self.group.leave(F.linear(input, self.weight))
        return out if self.bias is None else out + self.bias


def split_tensors(module: LossModule, mesh: Mesh, *, sequence: bool = False) -> tuple[dict[str, Slice], set[str]]:
    """Replace the layers of a model by this process's parts, in place; names stay.

    Returns which part of which parameter stands now, and the parameters whose gradients each process knows in part
    only: they must be summed over the tensor group after the backward pass. The layout is checked before
    (`Parallel.check_model`).
    """
    split = _Split(TensorGroup(mesh.group("tensor"), sequence))
    model = module.model
    for name, part in list(model.named_modules()):
        if isinstance(part, Transformer):
            split.vocabulary(part, f"{name}." if name else "")
        if isinstance(part, Block):
            split.block(part, f"{name}.")
        if isinstance(part, Stack) and sequence:
            split.sequence(part)
    heads = [part for part in model.modules() if isinstance(part, VocabularyHead)]

    def mark(_module: nn.Module, _arguments: Any) -> None:
        for head in heads:
            head.mark()

    module.register_forward_pre_hook(mark)
    return split.slices, split.partial


class _Split:
    """Collects what became of which parameter."""

    def __init__(self, group: TensorGroup) -> None:
        self.group = group
        self.slices: dict[str, Slice] = {}
        self.partial: set[str] = set()

    def block(self, block: Block, prefix: str) -> None:
        attention, mlp = block.self_attn, block.mlp
        assert isinstance(attention, Attention)
        assert isinstance(mlp, FeedForward)
        self._attention(attention, f"{prefix}self_attn.")
        inner = mlp.down_proj.in_features
        if mlp.gated:
            self._column(mlp.gate_up_proj, f"{prefix}mlp.gate_up_proj", (inner, inner))
        else:
            self._column(mlp.up_proj, f"{prefix}mlp.up_proj", (inner,))
        mlp.down_proj = self._row(mlp.down_proj, f"{prefix}mlp.down_proj")
        for part in (attention, mlp):
            part.register_forward_pre_hook(lambda _part, given: (self.group.enter(given[0]), *given[1:]))
        if self.group.sequence:
            whole = (name for name, _ in block.named_parameters(prefix[:-1]) if name not in self.slices)
            self.partial.update(whole)

    def _attention(self, attention: Attention, prefix: str) -> None:
        config, parts = attention.config, self.group.size
        sizes = (
            attention.own_query * config.query_size,
            attention.own_key * config.key_value_size,
            attention.own_value * config.key_value_size,
        )
        sections = tuple(size for size in sizes if size)
        self._column(attention.qkv_proj, f"{prefix}qkv_proj", sections)
        attention.o_proj = self._row(attention.o_proj, f"{prefix}o_proj")
        if attention.sinks is not None:
            attention.sinks = self._part(attention.sinks, f"{prefix}sinks", 0, (config.num_attention_heads,))
        # the norm of a head is the same for all heads, and each process has some of them
        self.partial.update(f"{prefix}{norm}.weight" for norm in ("q_norm", "k_norm") if getattr(attention, norm))
        attention.heads, attention.kv_heads = attention.heads // parts, attention.kv_heads // parts
        attention.config = replace(config, num_attention_heads=attention.heads, num_key_value_heads=attention.kv_heads)

    def vocabulary(self, model: Transformer, prefix: str) -> None:
        rows, width = model.config.vocab_size, model.embed_tokens.embedding_dim
        vocabulary, tied = Slice("tensor", 0, (rows,)), model.lm_head.weight is model.embed_tokens.weight
        table, head = model.embed_tokens, model.lm_head
        model.embed_tokens = VocabularyEmbedding(self.group, vocabulary, width)
        model.embed_tokens.weight = self._part(table.weight, f"{prefix}embed_tokens.weight", 0, (rows,))
        model.lm_head = VocabularyHead(self.group, vocabulary, head.in_features, head.bias is not None)
        if tied:
            model.lm_head.weight = model.embed_tokens.weight
        else:
            model.lm_head.weight = self._part(head.weight, f"{prefix}lm_head.weight", 0, (rows,))
        if head.bias is not None:
            model.lm_head.bias = self._part(head.bias, f"{prefix}lm_head.bias", 0, (rows,))

    def sequence(self, stack: Stack) -> None:
        def begin(_block: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
            x, step, layer = given
            return (self.group.begin(x), step, layer) if layer == 0 else None

        stack.layers[stack.order[0]].register_forward_pre_hook(begin)
        stack.norm.register_forward_pre_hook(lambda _norm, given: (self.group.end(given[0]),))

    def _column(self, linear: nn.Linear, name: str, sections: tuple[int, ...]) -> None:
        linear.weight = self._part(linear.weight, f"{name}.weight", 0, sections)
        if linear.bias is not None:
            linear.bias = self._part(linear.bias, f"{name}.bias", 0, sections)
        linear.out_features = len(linear.weight)

    def _row(self, linear: nn.Linear, name: str) -> RowLinear:
        inputs = linear.in_features
        new = RowLinear(self.group, inputs // self.group.size, linear.out_features, linear.bias is not None)
        new.weight = self._part(linear.weight, f"{name}.weight", 1, (inputs,))
        if linear.bias is not None:
            new.bias = linear.bias
        return new

    def _part(self, whole: Tensor, name: str, dim: int, sections: tuple[int, ...]) -> nn.Parameter:
        part = self.slices[name] = Slice("tensor", dim, sections)
        with torch.no_grad():
            own = part.take(whole, self.group.rank, self.group.size)
        return nn.Parameter(own, requires_grad=whole.requires_grad)
