"""Tensor parallelism at inference: every process computes its share of heads, feed-forward columns and vocabulary.

The split is the trainer's (gristmill.train.parallel.tensor): two sums over the processes a layer. Each keeps the keys
and values of its own heads only.

Source: Shoeybi et al. 2019, section 3; Pope et al. 2022, section 3.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.distributed.device_mesh import init_device_mesh

from gristmill.engine.memory.paged_cache import PagedKVCache
from gristmill.engine.parallel.group import Part, Ranks
from gristmill.model.transformer import Transformer
from gristmill.objectives.causal import CausalLM
from gristmill.train.parallel.layout import Parallel
from gristmill.train.parallel.mesh import Mesh
from gristmill.train.parallel.tensor import split_tensors
from gristmill.train.world import LossModule


class TensorPart(Part):
    """Splits a model, the same on every process, in place. Raises GristmillError, naming sizes or features, for one
    that cannot be split so."""

    along = 2  # heads
    splits_head = True

    def __init__(self, model: Transformer, ranks: Ranks) -> None:
        super().__init__(model, ranks)
        layout = Parallel(tensor=ranks.size)
        layout.check_model(model.config)
        split_tensors(LossModule(model, CausalLM()), mesh_of("tensor", layout, ranks))
        heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
        self.shares = [kv_heads // ranks.size] * ranks.size
        self._config = replace(
            model.config, num_attention_heads=heads // ranks.size, num_key_value_heads=kv_heads // ranks.size
        )

    def make_cache(self, num_blocks: int, block_size: int, kv_dtype: torch.dtype) -> PagedKVCache:
        """See `Part.make_cache`: all layers, the own heads."""
        return PagedKVCache(self._config, num_blocks, block_size, kv_dtype, self.device)


def mesh_of(name: str, layout: Parallel, ranks: Ranks) -> Mesh:
    """All processes as the one group of that name, for the trainer's splits."""
    devices = init_device_mesh(ranks.device.type, (ranks.size,), mesh_dim_names=(name,))
    return Mesh(layout, ranks.device, devices, {name: ranks.states})
