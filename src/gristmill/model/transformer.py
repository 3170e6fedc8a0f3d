"""The decoder: one `nn.Module` for training, scoring and generation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gristmill.core import KVCache
from gristmill.model.attention import Attention, PackedCausal
from gristmill.model.config import ModelConfig
from gristmill.model.feedforward import SwiGLU
from gristmill.model.norm import RMSNorm
from gristmill.model.positions import rope_tables


class Block(nn.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache) -> Tensor:
        """x (tokens, hidden) -> (tokens, hidden)."""
        x = x + self.self_attn(self.input_layernorm(x), rope, cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Transformer(nn.Module):
    """A decoder-only language model over token ids.

    Source: Vaswani et al. 2017; Touvron et al. 2023 (Llama).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids: Tensor, *, position_ids: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits, shape of `input_ids` plus the vocabulary.

        `input_ids` is (batch, tokens), each row a sequence of its own, or flat (tokens,). A flat batch of several
        sequences needs `cache` (who sees whom) and `position_ids` (tokens,).
        """
        hidden = self.hidden_states(input_ids.flatten(), position_ids, cache or _rows(input_ids), input_ids.shape[-1])
        logits: Tensor = self.lm_head(hidden)
        return logits.view(*input_ids.shape, -1)

    def hidden_states(
        self, input_ids: Tensor, position_ids: Tensor | None, cache: KVCache, row_length: int | None = None
    ) -> Tensor:
        """Final normed states (tokens, hidden) of flat `input_ids` (tokens,).

        Without `position_ids`, positions count from 0 in each row of `row_length` tokens.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[0], device=input_ids.device) % (row_length or len(input_ids))
        x = self.embed_tokens(input_ids)
        config = self.config
        rope = rope_tables(position_ids, config.head_dim, config.rope_theta, x.dtype)
        for layer in self.layers:
            x = layer(x, rope, cache)
        out: Tensor = self.norm(x)
        return out

    def count_parameters(self) -> int:
        """Number of weights; a tied matrix counts once. Works on the meta device."""
        return sum(parameter.numel() for parameter in self.parameters())

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw all weights: normal, std `initializer_range`; matrices that write to the residual stream are divided
        by sqrt(2 x layers), so that its variance does not grow with depth.

        Source: Radford et al. 2019 (GPT-2), section 2.3.
        """
        generator = torch.Generator().manual_seed(seed)
        std = self.config.initializer_range
        residual = std / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.normal_(0.0, residual if into_residual else std, generator=generator)


def _rows(input_ids: Tensor) -> PackedCausal:
    rows = input_ids.shape[0] if input_ids.ndim == 2 else 1
    return PackedCausal([input_ids.shape[-1]] * rows, input_ids.device)
