"""The one block all stacks are made of."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from gristmill.model.attention.latent import LatentAttention
from gristmill.model.attention.layer import Attention, CrossAttention, Step
from gristmill.model.config import LayerConfig, ModelConfig
from gristmill.model.feedforward import FeedForward
from gristmill.model.mixers.delta import GatedDeltaNet
from gristmill.model.mixers.linear import LinearAttention
from gristmill.model.mixers.selective import SelectiveSSM
from gristmill.model.moe import MixtureOfExperts
from gristmill.model.norm import build_norm


class Block(nn.Module):
    """A mixer over tokens, in a decoder that reads an encoder cross-attention, then a feed-forward layer, each with
    its residual connection and norms where `config.norm.placement` puts them.

    Source: Vaswani et al. 2017 (post); Xiong et al. 2020 (pre); OLMo 2 2024 (residual post-norm); Gemma 2 2024
    (sandwich); Wang and Komatsuzaki 2021 (parallel).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.pre, self.post = config.norm.placement == "pre", config.norm.placement == "post"
        self.parallel = config.parallel is not None
        self.dropout = 0.0
        """Share of each sub-layer's output that training leaves out."""
        before = config.norm.placement in ("pre", "sandwich")
        after = config.norm.placement != "pre"
        entry = config.layer(layer)

        def norm(wanted: bool) -> nn.Module:
            return build_norm(config.norm, config.hidden_size) if wanted else nn.Identity()

        self.attention_norm = norm(before and entry.input_norm)
        self.self_attn = _mixer(config, layer)
        self.attention_out_norm = norm(after)
        if config.cross_attention:
            self.cross_norm = norm(before)
            self.cross_attn = CrossAttention(config)
            self.cross_out_norm = norm(after)
        self.feedforward_norm = norm(before and config.parallel != "one_norm")
        self.mlp = _feedforward(config, entry)
        self.feedforward_out_norm = norm(after)

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        """x (tokens, hidden) -> (tokens, hidden). `layer` counts executed layers, which shared weights have several
        of."""
        if self.parallel:
            normed = self.attention_norm(x)
            second = normed if isinstance(self.feedforward_norm, nn.Identity) else self.feedforward_norm(x)
            parallel: Tensor = x + self.drop(self.self_attn(normed, step, layer)) + self.drop(self.mlp(second))
            return parallel
        if self.post:
            x = self.attention_out_norm(x + self.drop(self.self_attn(x, step, layer)))
            if step.memory is not None:
                x = self.cross_out_norm(x + self.drop(self.cross_attn(x, step.memory, layer)))
            out: Tensor = self.feedforward_out_norm(x + self.drop(self.mlp(x)))
            return out
        if self.pre and step.memory is None:
            # the same as below without its identities, which cost as much as a product where tokens come one by one
            x = x + self.drop(self.self_attn(self.attention_norm(x), step, layer))
            bare: Tensor = x + self.drop(self.mlp(self.feedforward_norm(x)))
            return bare
        x = x + self.drop(self.attention_out_norm(self.self_attn(self.attention_norm(x), step, layer)))
        if step.memory is not None:
            x = x + self.drop(self.cross_out_norm(self.cross_attn(self.cross_norm(x), step.memory, layer)))
        out = x + self.drop(self.feedforward_out_norm(self.mlp(self.feedforward_norm(x))))
        return out

    def drop(self, x: Tensor) -> Tensor:
        """Dropout of a sub-layer's output. Source: Srivastava et al. 2014; Vaswani et al. 2017, section 5.4."""
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class Recurrent(nn.Module):
    """A layer with a state in the place of attention: what runs it over each sequence is the cache."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        """x (tokens, hidden) -> (tokens, hidden)."""
        return step.cache.recur(layer, self.mixer, x)


def _mixer(config: ModelConfig, layer: int) -> nn.Module:
    hidden, heads, head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
    kind = config.layer(layer).mixer
    if kind == "linear":
        return Recurrent(LinearAttention(hidden, heads, head_dim))
    if kind == "selective":
        return Recurrent(SelectiveSSM(hidden))
    if kind == "delta":
        return Recurrent(GatedDeltaNet(hidden, heads, head_dim))
    return Attention(config, layer) if config.attention.latent is None else LatentAttention(config, layer)


def _feedforward(config: ModelConfig, entry: LayerConfig) -> nn.Module:
    parts = config.feed_forward
    if parts.moe is not None and entry.sparse:
        return MixtureOfExperts(config.hidden_size, parts.moe, parts.activation)
    return FeedForward(config.hidden_size, config.intermediate_size, parts.activation, parts.gated, parts.bias)
