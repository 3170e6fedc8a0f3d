"""Stacks of blocks: what decoders and encoders share, and the decoder with its output head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gristmill.core import KVCache
from gristmill.errors import RequestError
from gristmill.model.attention.layer import Memory, Step
from gristmill.model.attention.packed import PackedAttention
from gristmill.model.block import Block
from gristmill.model.config import ModelConfig
from gristmill.model.initialise import initialise
from gristmill.model.norm import build_norm
from gristmill.model.positions.absolute import LearnedPositions, sinusoidal
from gristmill.model.positions.bias import position_bias
from gristmill.model.positions.rope import RopeTables, rope_tables


class Stack(nn.Module):
    """Embedding, blocks and final norm, over flat tokens.

    Source: Vaswani et al. 2017.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        """Keep only the input of each block and compute the rest again in the backward pass."""
        width = config.embedding.size or config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        if config.embedding.token_types:
            self.embed_token_types = nn.Embedding(config.embedding.token_types, width)
        if config.positions.absolute == "learned":
            rows = config.max_position_embeddings + config.positions.offset
            self.embed_positions = LearnedPositions(rows, width, offset=config.positions.offset)
        self.embed_norm = build_norm(config.norm, width) if config.embedding.norm else nn.Identity()
        if width != config.hidden_size:
            self.embed_proj = nn.Linear(width, config.hidden_size)
        if config.positions.bias is not None:
            self.position_bias = position_bias(
                config.positions.bias,
                config.num_attention_heads,
                causal=config.causal,
                buckets=config.positions.buckets,
                max_distance=config.positions.max_distance,
                scale=config.head_dim**-0.5 if config.positions.scale_bias else 1.0,
            )
        # executed layer -> block; layers that share all weights have one block
        self.order: list[int] = []
        owners: list[int] = []
        for layer in range(config.num_hidden_layers):
            source = config.layer(layer).weights_from
            if source is None:
                owners.append(layer)
            self.order.append(len(owners) - 1 if source is None else self.order[source])
        self.layers = nn.ModuleList(Block(config, layer) for layer in owners)
        self.norm = build_norm(config.norm, config.hidden_size) if config.norm.final else nn.Identity()

    def hidden_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        cache: KVCache,
        row_length: int | None = None,
        *,
        token_type_ids: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """Final states (tokens, hidden) of flat `input_ids` (tokens,).

        Without `position_ids`, positions count from 0 in each row of `row_length` tokens. `token_type_ids` (tokens,)
        default to 0. `memory` is what cross-attention reads.
        """
        if position_ids is None:
            row_length = max(row_length or len(input_ids), 1)
            position_ids = torch.arange(input_ids.shape[0], device=input_ids.device) % row_length
        if self.config.cross_attention and memory is None:
            raise RequestError("this decoder reads an encoder: memory is missing", field="memory")
        if memory is not None and not self.config.cross_attention:
            raise RequestError("this stack has no cross-attention to read a memory with", field="memory")
        x = self.embed(input_ids, position_ids, token_type_ids)
        step = self.step(position_ids, cache, x.dtype, memory)
        for layer, block in enumerate(self.order):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(self.layers[block], x, step, layer, use_reentrant=False)
            else:
                x = self.layers[block](x, step, layer)
        out: Tensor = self.norm(x)
        return out

    def embed(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """What the first layer reads, (tokens, hidden): tokens, positions and token types, added."""
        config = self.config
        x: Tensor = self.embed_tokens(input_ids)
        if config.embedding.scale is not None:
            x = x * torch.tensor(config.embedding.scale, dtype=x.dtype)
        if config.positions.absolute == "learned":
            x = x + self.embed_positions(position_ids)
        elif config.positions.absolute == "sinusoidal":
            x = x + sinusoidal(position_ids + config.positions.offset, x.shape[-1]).to(x.dtype)
        if config.embedding.token_types:
            x = x + self.embed_token_types(torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids)
        elif token_type_ids is not None:
            raise RequestError("this model has no token types", field="token_type_ids")
        x = self.embed_norm(x)
        if config.embedding.size is not None and config.embedding.size != config.hidden_size:
            x = self.embed_proj(x)
        return x

    def step(self, position_ids: Tensor, cache: KVCache, dtype: torch.dtype, memory: Memory | None = None) -> Step:
        """What all layers of one forward share, for tokens at `position_ids` (tokens,)."""
        step = Step(cache=cache, memory=memory)
        step.rope, step.local_rope = self._rope(position_ids, cache, dtype)
        if self.config.positions.bias is not None:
            step.bias = self.position_bias
        return step

    def _rope(
        self, position_ids: Tensor, cache: KVCache, dtype: torch.dtype
    ) -> tuple[RopeTables | None, RopeTables | None]:
        """The rotations of the layers whose `rotary` is "global", and of those where it is "local"."""
        latent, positions = self.config.attention.latent, self.config.positions
        width = self.config.head_dim if latent is None else latent.rope_dim
        found: list[RopeTables | None] = []
        for rope in (positions.rope, positions.local_rope):
            if rope is None:
                found.append(None)
                continue
            lengths = cache.lengths if rope.scaling is not None and rope.scaling.needs_lengths else None
            found.append(rope_tables(position_ids, rope, width, dtype, lengths))
        return found[0], found[1]

    def count_parameters(self) -> int:
        """Number of weights; a tied matrix counts once. Works on the meta device."""
        return sum(parameter.numel() for parameter in self.parameters())

    def initialise(self, seed: int) -> None:
        """Draw all weights; see gristmill.model.initialise."""
        initialise(self, self.config, seed)


class Transformer(Stack):
    """A decoder-only language model over token ids.

    Source: Radford et al. 2018 (GPT); Touvron et al. 2023 (Llama).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        width = config.embedding.size or config.hidden_size
        if config.tie_word_embeddings and width != config.hidden_size:
            raise RequestError("a tied output head needs an embedding as wide as the model", field="embedding.size")
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        prefix_lengths: Sequence[int] | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """Logits, shape of `input_ids` plus the vocabulary.

        `input_ids` is (batch, tokens), each row a sequence of its own, or flat (tokens,). A flat batch of several
        sequences needs `cache` (who sees whom) and `position_ids` (tokens,). `prefix_lengths` (batch,) makes it a
        prefix decoder: that many first tokens of a row see each other.
        """
        rows = input_ids.shape[0] if input_ids.ndim == 2 else 1
        if cache is None:
            cache = PackedAttention([input_ids.shape[-1]] * rows, input_ids.device, prefix_lengths=prefix_lengths)
        elif prefix_lengths is not None:
            raise RequestError("give prefix_lengths to the cache, or leave the cache out", field="prefix_lengths")
        hidden = self.hidden_states(input_ids.flatten(), position_ids, cache, input_ids.shape[-1], memory=memory)
        return self.logits(hidden).view(*input_ids.shape, self.config.vocab_size)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token of the vocabulary, (..., vocabulary), from final states (..., hidden)."""
        if self.config.logit_scale is not None:
            hidden = hidden * self.config.logit_scale
        logits: Tensor = self.lm_head(hidden)
        if self.config.logit_softcap is not None:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        return logits
