"""A pipeline at inference: consecutive layers per process, hidden states sent from one to the next.

Rank 0 has the embedding, the first layers and the output head; the last stage has the final norm. Each keeps the keys
and values of its own layers only. A step is in one stage at a time, so this buys memory, not speed.

Source: Huang et al. 2019 (GPipe), forward half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from gristmill.core import CAUSAL, AttentionRule
from gristmill.engine.memory.paged_cache import Chunk, PagedKVCache
from gristmill.engine.parallel.group import Part, Ranks
from gristmill.model.config import LayerConfig, ModelConfig
from gristmill.model.transformer import Transformer
from gristmill.train.parallel.layout import Parallel
from gristmill.train.parallel.pipeline import check_pipeline, stage_layers


class PipelinePart(Part):
    """Keeps this process's layers of a model, in place. Raises GristmillError, naming what, for a model that cannot be
    cut into so many stages."""

    along = 0  # layers

    def __init__(self, model: Transformer, ranks: Ranks) -> None:
        super().__init__(model, ranks)
        config, layout = model.config, Parallel(pipeline=ranks.size)
        layout.check_model(config)
        check_pipeline(config, layout)
        stages = stage_layers(config, ranks.size)
        self.layers, self.is_last = stages[ranks.rank], ranks.rank == ranks.size - 1
        self.shares = [max(_stage_config(config, layers).cache_slots) + 1 for layers in stages]
        kept = {model.order[layer] for layer in self.layers}
        for block in range(len(model.layers)):
            if block not in kept:
                model.layers[block] = nn.Identity()
        if ranks.rank:
            for name in ("embed_tokens", "embed_positions", "embed_token_types", "embed_norm", "embed_proj", "lm_head"):
                if hasattr(model, name):
                    setattr(model, name, nn.Identity())
        if not self.is_last:
            model.norm = nn.Identity()

    def make_cache(self, num_blocks: int, block_size: int, kv_dtype: torch.dtype) -> PagedKVCache:
        """See `Part.make_cache`: the own layers, all heads."""
        return _StageCache(self.model.config, self.layers, num_blocks, block_size, kv_dtype, self.device)

    @torch.inference_mode()
    def hidden_states(self, ids: Sequence[int], chunks: Sequence[Chunk]) -> Tensor:
        """See `Runner.hidden_states`."""
        model, ranks = self.model, self.ranks
        self.cache.plan(chunks)
        positions = torch.tensor([p for c in chunks for p in range(c.start, c.start + c.length)], device=self.device)
        if ranks.rank == 0:
            x = model.embed(torch.tensor(ids, device=self.device), positions)
        else:
            x = ranks.receive(self._empty(len(ids)), ranks.rank - 1)
        step = model.step(positions, self.cache, x.dtype)
        for layer in self.layers:
            x = model.layers[model.order[layer]](x, step, layer)
        if self.is_last:
            x = model.norm(x)
        if ranks.size > 1:
            ranks.send(x, (ranks.rank + 1) % ranks.size)
        return ranks.receive(self._empty(len(ids)), ranks.size - 1) if ranks.rank == 0 and ranks.size > 1 else x

    def _empty(self, tokens: int) -> Tensor:
        return torch.empty((tokens, self.hidden_size), dtype=self.weights_dtype, device=self.device)


class _StageCache(PagedKVCache):
    """A memory of consecutive layers, which go by their numbers in the whole model."""

    def __init__(
        self,
        config: ModelConfig,
        layers: range,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(_stage_config(config, layers), num_blocks, block_size, dtype, device)
        self._first = layers.start

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule = CAUSAL) -> Tensor:
        """See `KVCache.attend`."""
        return super().attend(layer - self._first, query, key, value, rule)


def _stage_config(config: ModelConfig, layers: range) -> ModelConfig:
    """The configuration of some layers as a model of their own."""

    def shifted(entry: LayerConfig) -> LayerConfig:
        sources = {name: getattr(entry, name) for name in ("keys_from", "scores_from", "weights_from")}
        return replace(entry, **{name: at - layers.start for name, at in sources.items() if at is not None})

    entries = tuple(shifted(config.layers[layer]) for layer in layers) if config.layers else ()
    return replace(config, num_hidden_layers=len(layers), layers=entries)
