"""Expert parallelism at inference: the experts of all mixtures are dealt to the processes.

Rank 0 computes everything else and sends each token to the processes of the experts that its router chose; the others
hold experts, and neither attention nor keys and values. The exchange is that of gristmill.train.parallel.expert.

Source: Lepikhin et al. 2020 (GShard), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gristmill.engine.memory.paged_cache import Chunk
from gristmill.engine.parallel.group import Part, Ranks
from gristmill.engine.parallel.tensor import mesh_of
from gristmill.model.transformer import Transformer
from gristmill.train.parallel.expert import SplitMixture, split_experts
from gristmill.train.parallel.layout import Parallel


class ExpertPart(Part):
    """Splits a model's mixtures, in place. Raises GristmillError for a model without any, or whose number of experts
    the processes do not divide."""

    def __init__(self, model: Transformer, ranks: Ranks) -> None:
        super().__init__(model, ranks)
        layout = Parallel(expert=ranks.size)
        layout.check_model(model.config)
        split_experts(model, mesh_of("expert", layout, ranks))
        mixtures = [part for part in model.modules() if isinstance(part, SplitMixture)]
        by_block = [[part for part in block.modules() if isinstance(part, SplitMixture)] for block in model.layers]
        self._mixtures = [mixture for block in model.order for mixture in by_block[block]]
        if ranks.rank:  # only experts are needed here
            model.layers = nn.ModuleList(mixtures)
            model.embed_tokens = model.lm_head = model.norm = nn.Identity()  # type: ignore[assignment]

    def allocate(self, num_blocks: int, block_size: int, kv_dtype: torch.dtype) -> None:
        """See `Part.allocate`: rank 0 has all keys and values."""
        if self.ranks.rank == 0:
            super().allocate(num_blocks, block_size, kv_dtype)

    @torch.inference_mode()
    def hidden_states(self, ids: Sequence[int], chunks: Sequence[Chunk]) -> Tensor:
        """See `Runner.hidden_states`. The others take part in every mixture, with no tokens of their own."""
        if self.ranks.rank == 0:
            return super().hidden_states(ids, chunks)
        x = torch.empty((0, self.hidden_size), dtype=self.weights_dtype, device=self.device)
        for mixture in self._mixtures:
            mixture(x)
        return x
